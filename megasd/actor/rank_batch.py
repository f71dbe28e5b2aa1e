"""A data-parallel rank's part of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.batch.batch import TERMS, Batch
from megasd.config.schema import AlgorithmConfig
from megasd.loss.normalise import exact_value, exact_words
from megasd.loss.token_weights import TokenWeights
from megasd.ops.vocab_parallel import LogProbsSpec

# credits that add to an advantage; the others multiply it
ADDITIVE_CREDITS = ("antisd", "log_ratio", "return", "margin")


@dataclass
class RankBatch:
    """This data-parallel rank's part of a step: its samples, and which of them need a forward."""

    batch: Batch
    # samples with a weight, indices into batch; as many on every rank, an empty one is filler
    microbatches: list[list[int]]
    # likewise of each teacher context that is read
    teacher_microbatches: list[list[list[int]]]
    # as it stands in this step
    algorithm: AlgorithmConfig
    spec: LogProbsSpec
    # [R] each, on the device: the batch's, "distilled", and those of passes before the student's
    streams: dict[str, Tensor]
    # [R], on the device: the batch's response_ids
    targets: Tensor
    # of the deal (batch/shard.py), the same on all ranks
    metrics: dict[str, float]
    # of the whole batch's samples, for a gated teacher
    pass_rate: float
    # the batch's longest response over its mean length
    length_tail: float
    # of its batch's minibatches
    is_first: bool = True
    # of the whole batch's questions, where this is a minibatch of it
    mean_weight: float | None = None
    # the batch has several optimizer steps, so pi_old is not the student
    repeats: bool = False
    token_weights: TokenWeights | None = None


def active_samples(batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
    """bool [N]: samples that some term gives a weight; the others are counted by the normalisers
    and need no forward.
    """
    active, weighed = torch.zeros(len(batch), dtype=torch.bool), batch.question_weight > 0
    for term in TERMS:
        if getattr(algorithm, term) is None:
            continue
        mask = batch.mask(term)
        if term == "distill" or algorithm.question_weight.terms == "all":
            mask = mask & weighed
        if term == "policy_gradient" and not (
            algorithm.policy_gradient.credit and algorithm.policy_gradient.credit.kind in ADDITIVE_CREDITS
        ):
            first = batch.response_lens.cumsum(0) - batch.response_lens
            mask = mask & (batch.streams["advantage"][first] != 0)
        active |= mask
    return active


def mean_question_weight(batch: Batch, normaliser: str) -> float:
    """What the question weights of a batch are divided by under "informative" or "batch", as
    loss/normalise.py has it; 0.0: nothing.
    """
    weight_N, size_N = batch.question_weight, batch.question_size.double()
    counted_N = weight_N > 0 if normaliser == "informative" else torch.ones_like(weight_N, dtype=torch.bool)
    questions = round(exact_value(exact_words(counted_N / size_N)))
    return exact_value(exact_words(weight_N / size_N)) / questions if questions else 0.0


def batch_statistics(batch: Batch) -> dict[str, float]:
    """What a gated teacher goes by."""
    return {
        "pass_rate": float(batch.right.sum() / batch.scored.sum().clamp(min=1)),
        "length_tail": float(batch.response_lens.max() / batch.response_lens.double().mean()),
    }


def softmax_temperature(algorithm: AlgorithmConfig, sampling: float) -> float:
    """That of sampling; 1 for a likelihood alone (SSD 2604.01193), and for rows, which were not
    sampled at any.
    """
    likelihood = algorithm.distill is None and algorithm.policy_gradient is None
    return 1.0 if likelihood or algorithm.source == "dataset" else sampling
