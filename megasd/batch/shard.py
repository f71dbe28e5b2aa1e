"""Plan which samples each data-parallel rank computes, in which microbatches, at which cost.

No collective: every rank holds the whole batch of the step, computes the plans of all ranks and
uses the plan of its own rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasd.batch import balance
from megasd.batch.batch import Batch
from megasd.config.schema import ActorConfig, AlgorithmConfig, Config
from megasd.config.validate_actor import sequence_multiple
from megasd.config.variants import reads_teacher_logprobs
from megasd.models.flops import forward_flops, recompute_flops
from megasd.weights.hf_files import read_hf_config


@dataclass(frozen=True)
class Costs:
    """The cost of a sequence in FLOPs, and its padded length."""

    # The student's config.json.
    student: Mapping[str, Any]
    # One config.json for each forward of the teacher.
    teachers: list[Mapping[str, Any]]
    actor: ActorConfig
    # Sequences are padded to a multiple of so many tokens (validate_actor.sequence_multiple).
    multiple: int

    def padded(self, length: int) -> int:
        """The length (tokens) with its padding."""
        return -(-length // self.multiple) * self.multiple

    def of_student(self, length: int, predicted: int) -> float:
        """FLOPs of the student's forward and backward; the backward is twice the forward."""
        return 3 * forward_flops(self.student, length, predicted)

    def of_recompute(self, length: int) -> float:
        """FLOPs that actor.recompute_granularity computes again."""
        return recompute_flops(self.student, length, self.actor)

    def of_teacher(self, length: int, predicted: int) -> float:
        """FLOPs of all forwards of the teacher over a sequence."""
        return sum(forward_flops(hf, length, predicted) for hf in self.teachers)


@dataclass(frozen=True)
class Sequences:
    """The sequences of the student or of one teacher context, one a sample of the whole batch."""

    # Whether a forward runs over the sequence.
    requested: list[bool]
    # Tokens without padding.
    lengths: list[int]
    # Tokens with padding.
    padded: list[int]
    # FLOPs without padding; 0 if the sequence is not requested.
    flops: list[float]
    # FLOPs with padding and recomputation; 0 if the sequence is not requested.
    cost: list[float]


@dataclass
class RankPlan:
    """The samples and microbatches of one data-parallel rank.

    samples: indices into the whole batch. microbatches: indices into `samples`.
    """

    samples: list[int]
    microbatches: list[list[int]]
    # The microbatches of each teacher context that is read.
    teacher_microbatches: list[list[list[int]]]
    # Metrics over all ranks, equal on every rank; see `_metrics`.
    metrics: dict[str, float]


def make_costs(config: Config, student: Mapping[str, Any], passes: int) -> Costs:
    """Read the model configs that the costs of a sequence depend on.

    student: the student's config.json. passes: forwards of the teacher over a sequence, 0 without
    a teacher.
    """
    teacher, path = config.algorithm.teacher, None
    if passes and teacher is not None and teacher.weights == "separate":
        path = teacher.model_path
    teachers = [read_hf_config(path) if path is not None else student] * passes
    return Costs(student, teachers, config.actor, sequence_multiple(config))


def contexts_read(algorithm: AlgorithmConfig, columns: int) -> int:
    """How many of a batch's teacher contexts the teacher's forward runs over.

    0 if no term reads the teacher. All `columns` if a credit or a token weight reads the teacher's
    log-probs. Otherwise 1, since plain distillation reads the first context alone.
    """
    term, pg = algorithm.distill, algorithm.policy_gradient
    credit = pg.credit if pg is not None else None
    # A stage may have no such term, and a credit may have faded out.
    if algorithm.teacher is None or (term is None and credit is None):
        return 0
    return columns if reads_teacher_logprobs(algorithm) else 1


def teacher_samples(batch: Batch, algorithm: AlgorithmConfig, active: Tensor, context: int) -> Tensor:
    """bool [N]: active samples that have the context and whose teacher is read by some term."""
    requested, pg = torch.zeros(len(batch), dtype=torch.bool), algorithm.policy_gradient
    if algorithm.distill is not None:
        requested |= batch.mask("distill") & (batch.question_weight > 0)
    if pg is not None and pg.credit is not None:
        requested |= batch.mask("policy_gradient")
    return requested & active & (batch.context_lens[:, context] > 0)


def plan_ranks(
    batch: Batch, active: Tensor, algorithm: AlgorithmConfig, costs: Costs, ranks: int
) -> list[RankPlan]:
    """The plan of each data-parallel rank. The batch must hold a sample for every rank."""
    actor, responses = costs.actor, batch.response_lens.tolist()
    student = _sequences(active.tolist(), batch.prompt_lens.tolist(), responses, costs, teacher=False)
    read = contexts_read(algorithm, batch.context_lens.shape[1])
    teacher = [
        _sequences(
            teacher_samples(batch, algorithm, active, k).tolist(),
            batch.context_lens[:, k].tolist(),
            responses,
            costs,
            teacher=True,
        )
        for k in range(read)
    ]
    if actor.max_tokens_per_microbatch is None:
        lengths = (
            torch.maximum(batch.prompt_lens, batch.context_lens.amax(1)) + batch.response_lens
        ).tolist()
        parts = balance.by_count(lengths, student.requested, ranks, actor.micro_batch_size)
    else:
        other = [sum(one) for one in zip(*(t.cost for t in teacher), strict=True)] or [0.0] * len(batch)
        work = balance.Workload(
            student.padded, student.cost, other, actor.max_tokens_per_microbatch, actor.packing
        )
        parts = balance.by_tokens(work, student.requested, ranks, least=actor.pipeline_model_parallel_size)
    packed = [_teacher_microbatches(parts, one, actor) for one in teacher]
    metrics, found = _metrics(parts, student, teacher, packed, costs), []
    for rank, part in enumerate(parts):
        place = {i: k for k, i in enumerate(part.samples)}
        cuts = [
            [[place[i] for i in one] for one in microbatches]
            for microbatches in (part.microbatches, *(one[rank] for one in packed))
        ]
        found.append(RankPlan(part.samples, cuts[0], cuts[1:], metrics))
    return found


def microbatches_in_order(batch: Batch, costs: Costs) -> list[list[int]]:
    """All samples of a batch in microbatches, for a forward that every rank runs in full.

    They are cut in order, or packed within the token budget.
    """
    actor, samples = costs.actor, range(len(batch))
    if actor.max_tokens_per_microbatch is None:
        return balance.chunks(samples, actor.micro_batch_size, -(-len(batch) // actor.micro_batch_size))
    tokens = [costs.padded(n) for n in (batch.prompt_lens + batch.response_lens).tolist()]
    return balance.pack(tokens, samples, actor.max_tokens_per_microbatch, packing=actor.packing)


def _sequences(
    requested: list[bool], prompts: list[int], responses: list[int], costs: Costs, *, teacher: bool
) -> Sequences:
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    padded = [costs.padded(length) for length in lengths]
    of = costs.of_teacher if teacher else costs.of_student
    known: dict[tuple[int, int], float] = {}

    def flops(length: int, predicted: int) -> float:
        if (length, predicted) not in known:
            known[length, predicted] = of(length, predicted)
        return known[length, predicted]

    exact = [flops(n, r) if a else 0.0 for n, r, a in zip(lengths, responses, requested, strict=True)]
    cost = [flops(n, r) if a else 0.0 for n, r, a in zip(padded, responses, requested, strict=True)]
    if not teacher and costs.actor.recompute_granularity is not None:
        extra = [costs.of_recompute(n) if a else 0.0 for n, a in zip(padded, requested, strict=True)]
        cost = [c + e for c, e in zip(cost, extra, strict=True)]
    return Sequences(requested, lengths, padded, exact, cost)


def _teacher_microbatches(
    parts: list[balance.Part], teacher: Sequences, actor: ActorConfig
) -> list[list[list[int]]]:
    """Rank -> microbatches of the rank's samples for which the teacher is requested.

    The samples are packed again, since a teacher sequence has another length than the student's.
    Every rank has the same number of microbatches.
    """
    requested = [[i for one in part.microbatches for i in one if teacher.requested[i]] for part in parts]
    budget = actor.max_tokens_per_microbatch
    if budget is None:
        return [balance.chunks(one, actor.micro_batch_size, len(parts[0].microbatches)) for one in requested]
    packed = [balance.pack(teacher.padded, one, budget, packing=actor.packing) for one in requested]
    count = max(1, max(map(len, packed)))
    return [one + [[] for _ in range(count - len(one))] for one in packed]


def _metrics(
    parts: list[balance.Part],
    student: Sequences,
    teacher: list[Sequences],
    packed: list[list[list[list[int]]]],
    costs: Costs,
) -> dict[str, float]:
    """Metrics of the plans over all ranks.

    microbatches: the student's microbatches of one rank. padding_share, teacher_padding_share:
    computed tokens that are padding over computed tokens. flops_balance: FLOPs (padding and
    recomputation included) of the costliest rank over the mean of the ranks. over_budget:
    microbatches above the budget, each a single sample. student_tflops (forward and backward),
    recompute_tflops, teacher_tflops: TFLOPs of the tokens without padding.
    """
    packing, budget = costs.actor.packing, costs.actor.max_tokens_per_microbatch
    ranks = [part.microbatches for part in parts]
    passes = [(student, ranks), *zip(teacher, packed, strict=True)]
    loads = [
        sum(
            balance.bin_cost(one.cost, group, packing=packing)
            for one, dealt in passes
            for group in dealt[rank]
        )
        for rank in range(len(parts))
    ]
    shares = [_tokens(one, dealt, packing=packing) for one, dealt in passes]
    metrics = {
        "microbatches": float(len(ranks[0])),
        "padding_share": _padding(shares[:1]),
        "flops_balance": max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0,
        "student_tflops": sum(student.flops) / 1e12,
    }
    if teacher:
        metrics |= {
            "teacher_padding_share": _padding(shares[1:]),
            "teacher_tflops": sum(sum(one.flops) for one in teacher) / 1e12,
        }
    if costs.actor.recompute_granularity is not None:
        metrics["recompute_tflops"] = (
            sum(costs.of_recompute(n) for n, a in zip(student.lengths, student.requested, strict=True) if a)
            / 1e12
        )
    if budget is not None:
        groups = [(one, group) for one, dealt in passes for rank in dealt for group in rank]
        metrics["over_budget"] = float(
            sum(balance.computed_tokens(one.padded, [g], packing=packing) > budget for one, g in groups)
        )
    return metrics


def _tokens(sequences: Sequences, dealt: list[list[list[int]]], *, packing: bool) -> tuple[int, int]:
    """(real tokens, computed tokens) over all ranks; computed tokens include padding."""
    real = sum(n for n, a in zip(sequences.lengths, sequences.requested, strict=True) if a)
    return real, sum(balance.computed_tokens(sequences.padded, rank, packing=packing) for rank in dealt)


def _padding(shares: list[tuple[int, int]]) -> float:
    computed = sum(c for _, c in shares)
    return 1 - sum(r for r, _ in shares) / computed if computed else 0.0
