"""After the teacher's pass and before the student's: what every response token weighs in each term,
and what depends on whole sequences.

N samples of this data-parallel rank, R response tokens of all of them. Statistics go over the
data-parallel group, so that nothing depends on how samples are dealt. Context-parallel ranks hold
the same samples and compute the same; tensor-parallel ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.batch.batch import TERMS, Batch
from megasd.config.schema import AlgorithmConfig
from megasd.loss import credit as credits
from megasd.loss import sequence_stats
from megasd.loss.normalise import Normaliser, global_normalisers, term_weights


@dataclass
class TokenWeights:
    """What the loss of a step reads beside the logits, by response token."""

    # term -> float64 [R]
    weights: dict[str, Tensor]
    # [R] each
    streams: dict[str, Tensor]
    # for metrics, the same on all ranks
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> TokenWeights:
        """All of it on the device, so that a microbatch takes its tokens there."""
        weights, streams = (
            {name: t.to(device) for name, t in part.items()} for part in (self.weights, self.streams)
        )
        return TokenWeights(weights, streams, self.metrics)


def token_weights(
    batch: Batch,
    streams: dict[str, Tensor],
    algorithm: AlgorithmConfig,
    *,
    observe: Callable[[float | None], tuple[bool, float]],
    normaliser: str,
    mean_weight: float | None,
    room: int,
    dp_group: dist.ProcessGroup | None,
) -> TokenWeights:
    """streams [R]: the batch's, "distilled"; on the last pipeline stage, where the algorithm asks
    for them, "teacher_logp", "teacher_entropy", "contrast_logp" [C - 1, R], "contrast_present",
    "old_logp", "divergence". room: rollout.max_response_tokens. normaliser, mean_weight: what
    question weights are divided by, as loss/normalise.py's normaliser and dataset_mean. observe:
    takes the batch's median teacher entropy (None on a stage that sees no logits) to (is the
    entropy gate open, that median).

    Collectives over dp_group: one all_reduce of the normalisers, and those of
    loss/sequence_stats.py that the algorithm uses.
    """
    lens_N, streams, figures = batch.response_lens, dict(streams), {}
    masks = {
        term: _spread(batch.mask(term), lens_N) for term in TERMS if getattr(algorithm, term) is not None
    }
    if "distill" in masks:
        masks["distill"] &= _within(lens_N, algorithm.distill.skip_tokens, algorithm.distill.max_tokens)
    if algorithm.policy_gradient is not None and algorithm.policy_gradient.credit is not None:
        figures = _credit(batch, masks, streams, algorithm, observe, dp_group)
    ones_N, weight_N = torch.ones_like(batch.question_weight), batch.question_weight
    of_terms = {
        term: weight_N if term == "distill" or algorithm.question_weight.terms == "all" else ones_N
        for term in masks
    }
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
    if "distill" in weights:
        weights["distill"] = weights["distill"] * _token_factor(
            streams, masks["distill"], lens_N, algorithm, dp_group
        )
    return TokenWeights(weights, streams, figures | _question_figures(normalisers))


def entropy_gate(algorithm: AlgorithmConfig) -> sequence_stats.EntropyGate:
    """As the algorithm's credit has it; one that nothing asks where it has none."""
    credit = algorithm.policy_gradient.credit if algorithm.policy_gradient is not None else None
    return sequence_stats.EntropyGate(
        warmup=credit.gate_warmup if credit else 1, ratio=credit.gate_ratio if credit else 0.0
    )


def _question_figures(normalisers: dict[str, Normaliser]) -> dict[str, float]:
    """Of the first term, the one whose questions are weighed."""
    first = normalisers["distill" if "distill" in normalisers else next(iter(normalisers))]
    return {"informative_questions": float(first.num_questions), "mean_question_weight": first.mean_weight}


def _token_factor(
    streams: dict[str, Tensor],
    mask_R: Tensor,
    lens_N: Tensor,
    algorithm: AlgorithmConfig,
    dp_group: dist.ProcessGroup | None,
) -> Tensor | float:
    """Factor of the distillation weight of each token; 1 on stages that see no logits."""
    term = algorithm.distill
    if term.token_weight == "confidence" and "teacher_entropy" in streams:
        # those of weight 0 had no teacher's pass
        distilled_R = mask_R & streams["distilled"].cpu()
        return sequence_stats.confidence(
            streams["teacher_entropy"].cpu(), distilled_R, scale=term.token_weight_scale, group=dp_group
        )
    if term.token_weight == "scan" and "divergence" in streams:
        return sequence_stats.scan(streams["divergence"].cpu(), mask_R, lens_N, kappa=term.token_weight_scale)
    return 1.0


def _credit(
    batch: Batch,
    masks: dict[str, Tensor],
    streams: dict[str, Tensor],
    algorithm: AlgorithmConfig,
    observe: Callable[[float | None], tuple[bool, float]],
    dp_group: dist.ProcessGroup | None,
) -> dict[str, float]:
    """Adds to `streams` (and, for a second path, to `masks`) what credit needs of whole sequences
    or of the whole batch; figures.
    """
    credit, lens_N = algorithm.policy_gradient.credit, batch.response_lens
    has_logits = "teacher_logp" in streams
    if credit.kind == "rlcsd":
        second_R = torch.zeros(len(batch.response_ids), dtype=torch.bool)
        if has_logits:
            e_R = credits.contrast(
                streams["teacher_logp"], streams["contrast_logp"], streams["contrast_present"]
            )
            e_R = torch.where(streams["distilled"], e_R, 0.0)
            options = {"lam": credit.lam, "tau": credit.tau, "threshold": credit.threshold}
            streams["second_advantage"], second_R = credits.rlcsd(
                streams["advantage"].to(e_R), e_R, **options
            )
        masks["second_path"] = masks["policy_gradient"] & second_R.cpu()
        masks["policy_gradient"] &= ~second_R.cpu()
    distilled_R = streams["distilled"].cpu() & masks["policy_gradient"]
    if credit.kind == "antisd":
        is_open, median = observe(
            sequence_stats.median(streams["teacher_entropy"].cpu(), distilled_R, group=dp_group)
            if has_logits
            else None
        )
        streams["gate"] = torch.full_like(streams["advantage"], float(is_open))
        return {"gate": float(is_open), "median_teacher_entropy": median}
    if not has_logits:
        return {}
    if credit.kind == "cepo":
        streams["contrasted"] = streams["contrast_present"].any(0)
        gap_R = credits.contrast(
            streams["teacher_logp"], streams["contrast_logp"], streams["contrast_present"]
        )
        # of the mean of the contrasting teachers; one here
        streams["contrast_logp"] = streams["teacher_logp"] - gap_R
    if credit.kind == "egrsd":
        discount = {"scale": credit.entropy_scale, "window": credit.window, "group": dp_group}
        streams["discount"] = sequence_stats.entropy_discount(
            streams["teacher_entropy"].cpu(), distilled_R, lens_N, **discount
        )
    if credit.kind in ("return", "margin"):
        log_ratio_R = torch.where(
            streams["distilled"], streams["teacher_logp"] - streams["old_logp"], 0.0
        ).cpu()
        if credit.kind == "return":
            added_R = sequence_stats.returns(
                log_ratio_R, distilled_R, lens_N, clip=credit.clip_return, group=dp_group
            )
        else:
            verdicts = {"right_N": batch.right, "scored_N": batch.scored}
            added_R = sequence_stats.margin_shift(
                log_ratio_R, distilled_R, lens_N, **verdicts, margin=credit.margin, group=dp_group
            )
        streams["advantage"] = streams["advantage"] + added_R.to(streams["advantage"])
    return {}


def _spread(mask_N: Tensor, lens_N: Tensor) -> Tensor:
    return mask_N.repeat_interleave(lens_N)


def _within(lens_N: Tensor, skip: int, limit: int | None) -> Tensor:
    """bool [R]: tokens at places skip .. limit - 1 of their response."""
    starts_N = lens_N.cumsum(0) - lens_N
    places_R = torch.arange(int(lens_N.sum())) - starts_N.repeat_interleave(lens_N)
    return (places_R >= skip) & (places_R < (limit if limit is not None else places_R.numel() + 1))
