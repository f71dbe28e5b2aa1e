"""The weight of every response token in each term, and the streams that need whole sequences.

A stream is a named tensor with one value per response token, or per context and token. The
functions run after the teacher's forward and before the student's forward. N samples of this
data-parallel rank, R response tokens of all N samples. Statistics go over the data-parallel group,
so that no weight depends on which rank holds which sample. The context-parallel and tensor-parallel
ranks of a data-parallel rank hold the same samples and compute the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.batch.batch import TERMS, Batch
from megasd.config.schema import AlgorithmConfig, CreditConfig
from megasd.loss import sequence_stats
from megasd.loss.credit import CREDITS, CreditBatch, PreparedCredit
from megasd.loss.normalise import Normaliser, global_normalisers, term_weights

# The function takes the batch's median teacher entropy (nats), or None on a pipeline stage that
# sees no logits. It returns whether the entropy gate is open, and the median. Every rank must call
# it.
ObserveEntropy = Callable[[float | None], tuple[bool, float]]


@dataclass(frozen=True)
class TokenWeights:
    """The weights and streams by response token that the loss of a minibatch reads."""

    # Term -> weights, float64 [R]. A credit with a second path adds the term "second_path".
    weights: dict[str, Tensor]
    # The input streams and the streams that the credit made, [R] each ([C, R] for contexts).
    streams: dict[str, Tensor]
    # Metrics for the log, the same on all ranks.
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> TokenWeights:
        """A copy with all tensors on the device, where the microbatches select their tokens."""
        weights = {name: weight_R.to(device) for name, weight_R in self.weights.items()}
        streams = {name: stream.to(device) for name, stream in self.streams.items()}
        return TokenWeights(weights, streams, self.metrics)


def token_weights(
    batch: Batch,
    streams: Mapping[str, Tensor],
    algorithm: AlgorithmConfig,
    *,
    observe: ObserveEntropy,
    normaliser: str,
    mean_weight: float | None,
    room: int,
    dp_group: dist.ProcessGroup | None,
) -> TokenWeights:
    """Compute the weights, streams and metrics of a minibatch of this rank.

    streams [R]: the streams of the batch, and "distilled" (bool). On the last pipeline stage, if
    the algorithm reads them, also "teacher_logp", "teacher_entropy", "contrast_logp" [C - 1, R],
    "contrast_present" [C - 1, R], "old_logp", "divergence". normaliser, mean_weight: the divisor
    of the question weights, as `normaliser` and `dataset_mean` of loss/normalise.py. room:
    rollout.max_response_tokens.

    Collectives over dp_group: one all_reduce of the normalisers, and those of
    loss/sequence_stats.py that the algorithm uses.
    """
    lens_N = batch.response_lens
    masks = _term_masks(batch, algorithm)
    prepared = PreparedCredit()
    if algorithm.policy_gradient is not None and algorithm.policy_gradient.credit is not None:
        credit = algorithm.policy_gradient.credit
        prepared = _prepare_credit(batch, masks["policy_gradient"], streams, credit, observe, dp_group)
        masks = _with_second_path(masks, prepared.second_path_R)
    streams = {**streams, **prepared.streams}
    of_terms = _question_weights(batch, algorithm, masks)
    normalisers = global_normalisers(
        of_terms,
        batch.question_size,
        masks,
        lens_N,
        normaliser=normaliser,
        dataset_mean=mean_weight,
        dp_group=dp_group,
    )
    weights = {
        term: term_weights(
            of_terms[term],
            mask_R,
            lens_N,
            normaliser=normalisers[term],
            aggregation=algorithm.aggregation,
            room=room,
        )
        for term, mask_R in masks.items()
    }
    if algorithm.distill is not None:
        factor_R = TOKEN_FACTORS[algorithm.distill.token_weight](
            FactorInput(streams, masks["distill"], lens_N, algorithm.distill.token_weight_scale, dp_group)
        )
        weights["distill"] = weights["distill"] * factor_R
    return TokenWeights(weights, streams, prepared.metrics | _question_metrics(normalisers))


def entropy_gate(algorithm: AlgorithmConfig) -> sequence_stats.EntropyGate:
    """Make the entropy gate with the constants of the algorithm's credit.

    Without a credit the gate exists, but nothing reads it.
    """
    credit = algorithm.policy_gradient.credit if algorithm.policy_gradient is not None else None
    return sequence_stats.EntropyGate(
        warmup=credit.gate_warmup if credit else 1, ratio=credit.gate_ratio if credit else 0.0
    )


# ---- factors of distill.token_weight ----


@dataclass(frozen=True)
class FactorInput:
    """The input of a function in `TOKEN_FACTORS`."""

    streams: Mapping[str, Tensor]
    # Bool [R]: the tokens of the distillation term.
    mask_R: Tensor
    # Int64 [N]: the number of tokens of each response.
    lens_N: Tensor
    # The value of distill.token_weight_scale, per nat.
    scale: float
    dp_group: dist.ProcessGroup | None


def _no_factor(given: FactorInput) -> Tensor | float:
    return 1.0


def _confidence(given: FactorInput) -> Tensor | float:
    """exp(-scale * teacher entropy), divided by its mean; 1 on stages that see no logits."""
    if "teacher_entropy" not in given.streams:
        return 1.0
    # Samples of weight 0 had no teacher forward, so they have no teacher entropy.
    distilled_R = given.mask_R & given.streams["distilled"].cpu()
    return sequence_stats.confidence(
        given.streams["teacher_entropy"].cpu(), distilled_R, scale=given.scale, group=given.dp_group
    )


def _scan(given: FactorInput) -> Tensor | float:
    """The coefficients of DASH's backward scan; 1 on pipeline stages that see no logits."""
    if "divergence" not in given.streams:
        return 1.0
    return sequence_stats.scan(
        given.streams["divergence"].cpu(), given.mask_R, given.lens_N, kappa=given.scale
    )


# The value of distill.token_weight -> the function that computes the factor [R] of each token's
# distillation weight.
TOKEN_FACTORS: dict[str, Callable[[FactorInput], Tensor | float]] = {
    "none": _no_factor,
    "confidence": _confidence,
    "scan": _scan,
}


def _term_masks(batch: Batch, algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """Term -> bool [R]: the tokens that take part in the term."""
    lens_N = batch.response_lens
    masks = {
        term: batch.mask(term).repeat_interleave(lens_N)
        for term in TERMS
        if getattr(algorithm, term) is not None
    }
    if algorithm.distill is not None:
        distill = algorithm.distill
        masks["distill"] = masks["distill"] & _within(lens_N, distill.skip_tokens, distill.max_tokens)
    return masks


def _with_second_path(masks: dict[str, Tensor], second_path_R: Tensor | None) -> dict[str, Tensor]:
    """Move the tokens of the second path from "policy_gradient" to the term "second_path"."""
    if second_path_R is None:
        return masks
    first_R = masks["policy_gradient"]
    return masks | {"second_path": first_R & second_path_R, "policy_gradient": first_R & ~second_path_R}


def _question_weights(
    batch: Batch, algorithm: AlgorithmConfig, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Term -> float64 [N]: the raw weight of each sample's question in the term."""
    weight_N, ones_N = batch.question_weight, torch.ones_like(batch.question_weight)
    weighs_all = algorithm.question_weight.terms == "all"
    return {term: weight_N if term == "distill" or weighs_all else ones_N for term in masks}


def _question_metrics(normalisers: Mapping[str, Normaliser]) -> dict[str, float]:
    """Metrics of the questions in the first term, whose question weights always apply."""
    first = normalisers["distill" if "distill" in normalisers else next(iter(normalisers))]
    return {"informative_questions": float(first.num_questions), "mean_question_weight": first.mean_weight}


def _prepare_credit(
    batch: Batch,
    mask_R: Tensor,
    streams: Mapping[str, Tensor],
    credit: CreditConfig,
    observe: ObserveEntropy,
    dp_group: dist.ProcessGroup | None,
) -> PreparedCredit:
    return CREDITS[credit.kind].prepare(
        CreditBatch(
            config=credit,
            streams=streams,
            distilled_R=streams["distilled"].cpu() & mask_R,
            lens_N=batch.response_lens,
            right_N=batch.right,
            scored_N=batch.scored,
            observe=observe,
            dp_group=dp_group,
        )
    )


def _within(lens_N: Tensor, skip: int, limit: int | None) -> Tensor:
    """Bool [R]: the tokens at places skip .. limit - 1 of their response."""
    starts_N = lens_N.cumsum(0) - lens_N
    places_R = torch.arange(int(lens_N.sum())) - starts_N.repeat_interleave(lens_N)
    return (places_R >= skip) & (places_R < (limit if limit is not None else places_R.numel() + 1))
