"""Cuts the batch of a step into minibatches, and out of each the part of a data-parallel rank.

N samples, R response tokens of all samples of the rank, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.actor.parallel import Mesh
from megasd.actor.teacher_weights import Outcome
from megasd.batch.batch import TERMS, Batch
from megasd.batch.shard import Costs, plan_ranks
from megasd.config.schema import AlgorithmConfig
from megasd.config.variants import credit_traits
from megasd.loss.exact_sum import exact_value, exact_words
from megasd.loss.objective import logprobs_spec
from megasd.ops.vocab_parallel import LogProbsSpec


@dataclass(frozen=True)
class RankBatch:
    """One minibatch on this data-parallel rank: its samples, and how the forwards go over them."""

    # the samples of this rank
    batch: Batch
    # The samples of each student microbatch, as indices into batch. They are the samples to which
    # some term gives a weight. Every rank has the same number of microbatches; an empty one is filler.
    microbatches: list[list[int]]
    # the same for each teacher context that is read
    teacher_microbatches: list[list[list[int]]]
    # the algorithm as it stands in this step (algo/stages.py)
    algorithm: AlgorithmConfig
    # what the loss needs to know about the student's logits
    spec: LogProbsSpec
    # [R] each, on the device: the batch's streams and "distilled"
    streams: Mapping[str, Tensor]
    # int64 [R], on the device: the batch's response_ids
    targets: Tensor
    # metrics of the rank plan (batch/shard.py), the same on all ranks
    metrics: Mapping[str, float]
    # what the whole batch says to a teacher that copies the student
    outcome: Outcome
    # global_normalisers of loss/normalise.py takes these as normaliser and dataset_mean
    normaliser: str
    mean_weight: float | None


def shard(
    batch: Batch,
    algorithm: AlgorithmConfig,
    costs: Costs,
    mesh: Mesh,
    *,
    sampling_temperature: float,
    vocab_size: int,
    dataset_mean: float | None,
) -> list[RankBatch]:
    """This rank's part of each minibatch of a step, in order.

    The mean question weight, the pass rate and the length tail are those of the whole batch.
    dataset_mean: mean question weight of the training rows, where question_weight.normaliser is
    "dataset". No collective.
    """
    parts, normaliser, mean = batch.parts(algorithm.minibatches), algorithm.question_weight.normaliser, 0.0
    if len(parts) > 1 and normaliser in ("informative", "batch"):
        mean = mean_question_weight(batch, normaliser)
    outcome = batch_outcome(batch)
    spec = logprobs_spec(
        algorithm, temperature=softmax_temperature(algorithm, sampling_temperature), vocab_size=vocab_size
    )
    rank_batches = []
    for part in parts:
        plans = plan_ranks(part, active_samples(part, algorithm), algorithm, costs, mesh.dp_size)
        plan = plans[mesh.dp_rank]
        local = part.select(plan.samples)
        streams = local.streams | {"distilled": local.distilled.repeat_interleave(local.response_lens)}
        rank_batches.append(
            RankBatch(
                batch=local,
                microbatches=plan.microbatches,
                teacher_microbatches=plan.teacher_microbatches,
                algorithm=algorithm,
                spec=spec,
                streams={name: stream.to(mesh.device) for name, stream in streams.items()},
                targets=local.response_ids.to(mesh.device),
                metrics=plan.metrics,
                outcome=outcome,
                normaliser="dataset" if mean else normaliser,
                mean_weight=mean or dataset_mean,
            )
        )
    return rank_batches


def active_samples(batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
    """bool [N]: the samples to which some term of the loss gives a weight.

    All other samples need no forward. The normalisers count them nevertheless.
    """
    active, has_weight = torch.zeros(len(batch), dtype=torch.bool), batch.question_weight > 0
    for term in TERMS:
        if getattr(algorithm, term) is None:
            continue
        mask = batch.mask(term)
        if term == "distill" or algorithm.question_weight.terms == "all":
            mask = mask & has_weight
        if term == "policy_gradient" and not credit_traits(algorithm).adds_to_advantage:
            first = batch.response_lens.cumsum(0) - batch.response_lens
            mask = mask & (batch.streams["advantage"][first] != 0)
        active |= mask
    return active


def mean_question_weight(batch: Batch, normaliser: str) -> float:
    """The mean over the questions of a batch by which loss/normalise.py divides their weights.

    normaliser: "informative" (questions with a weight above 0) or "batch" (all questions). 0.0 when
    there is no such question.
    """
    weight_N, size_N = batch.question_weight, batch.question_size.double()
    counted_N = weight_N > 0 if normaliser == "informative" else torch.ones_like(weight_N, dtype=torch.bool)
    questions = round(exact_value(exact_words(counted_N / size_N)))
    return exact_value(exact_words(weight_N / size_N)) / questions if questions else 0.0


def batch_outcome(batch: Batch) -> Outcome:
    """Pass rate and length tail of a whole batch."""
    assert batch.right is not None, "a batch fills it in"
    return Outcome(
        pass_rate=float(batch.right.sum() / batch.scored.sum().clamp(min=1)),
        length_tail=float(batch.response_lens.max() / batch.response_lens.double().mean()),
    )


def softmax_temperature(algorithm: AlgorithmConfig, sampling: float) -> float:
    """The temperature of the student's softmax in the loss: the sampling temperature, or 1.

    It is 1 for an algorithm with a likelihood term alone (SSD 2604.01193), and where the responses
    are rows of the data, which were not sampled.
    """
    likelihood = algorithm.distill is None and algorithm.policy_gradient is None
    return 1.0 if likelihood or algorithm.source == "dataset" else sampling
