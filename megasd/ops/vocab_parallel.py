"""Vocab-parallel log-probs: a few numbers per token from logits that are split over the vocabulary.

A loss reads only these log-probs, never the logits. They are O(K) numbers per token, the same on
every tensor-parallel rank.

T tokens, V local vocabulary slice, K top-k, A size of the support (K, 2K for a union), B buckets =
A + 1 (A without a tail), R ranks.

A support is a set of ids per token: the student's K most likely tokens (SDPO 2601.20802), the
teacher's K most likely tokens, the union of both, or the ids of a teacher record that was made
earlier. All other tokens form one more bucket, the tail. The selecting distribution is the one
whose most likely tokens become the support. A rank contributes two things to a distribution over
the support and the tail: the scores of its columns in the support, and the statistics (max, sum of
exp) of its columns outside the support. These statistics are called the rest. The forward issues

    all_gather   of each rank's K first candidates of the selecting distribution, and the rest of
                 that distribution
    all_reduce   of the other distribution's scores at the chosen ids, and the rest of that
                 distribution; the target's score

In the all_reduce, one rank contributes each word and all other ranks contribute zero, so the sum is
exact. `support="full"` gives the exact divergence over the whole vocabulary and needs less: 4 words
gathered, 4 reduced. The backward needs no collective: each rank writes the gradient of its own
columns from the upstream gradient. The upstream gradient is the same on all ranks, because all
ranks hold the same outputs and compute the same loss with scale 1. Never sum such a loss over
tensor-parallel ranks.

The gradient in closed form. With p the student, g_j the upstream gradient of bucket j's
log-probability, h that of the target's, G = sum of g and c = -(G + h), the gradient in a score z_v
is

    v chosen:       g_v + c p_v
    v in the tail:  (p_v / p_tail) (g_tail + c p_tail)
    at the target:  + h

(g_tail = 0 for tail "raw"; "renormalise": g_v - p^_v G - p_v h when chosen, p^ the renormalised p,
and -p_v h in the tail). One scalar for the whole tail, and p_v / p_tail = exp(z_v - logsumexp of
the tail): nothing of size V is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.ops import kernels_torch
from megasd.ops.vocab_shard import Shard, compute_dtype, finite, shard_of

SUPPORTS = ("none", "student", "teacher", "union", "record", "full")
TAILS = ("bucket", "renormalise", "raw")


@dataclass(frozen=True)
class LogProbsSpec:
    """Which log-probs to compute.

    beta and clip have the meaning they have in ops/divergence_terms.py. Only support "full" uses
    them: it sums the divergence over the vocabulary shard by shard.
    """

    # The true vocabulary size. Padded columns take no part and get gradient zero.
    vocab_size: int
    support: str = "student"
    # A top_k above vocab_size counts as vocab_size.
    top_k: int = 100
    tail: str = "bucket"
    beta: float = 0.5
    clip: float | None = None
    temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(f"support must be one of {', '.join(SUPPORTS)}, got {self.support!r}")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if not (self.temperature > 0 and self.teacher_temperature > 0):
            raise ValueError(
                f"temperatures must be positive, got {self.temperature} and {self.teacher_temperature}"
            )
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"beta is the teacher's weight in the mixture and lies in [0, 1], got {self.beta}"
            )


@dataclass
class TeacherRecord:
    """A teacher's top-k log-probabilities and tail, kept in place of the teacher's logits.

    A record takes 8K + 4 bytes a token. The tail is kept as it was measured, never as 1 - sum.
    """

    # Global token ids, int32. -1 marks an empty place.
    ids_TK: Tensor
    # Log-probabilities of the ids, float32, nats.
    logq_TK: Tensor
    # Log of the probability mass outside the ids, float32, nats.
    log_tail_T: Tensor

    def __getitem__(self, tokens: slice | Tensor) -> TeacherRecord:
        return TeacherRecord(self.ids_TK[tokens], self.logq_TK[tokens], self.log_tail_T[tokens])


@dataclass
class LogProbs:
    """The log-probs of T tokens, bitwise equal on all tensor-parallel ranks.

    All values are float32 (float64 for float64 logits). A field is None if it was not requested.
    Differentiable: student_logq_TB, divergence_T, logp_T.
    """

    # int64 global ids of the support. -1 marks an empty place: the second copy of an id that both
    # halves of a union have, or an empty place of a teacher record.
    ids_TA: Tensor | None = None
    # Log-probabilities (nats) of the support and, with tail "bucket", of the tail.
    student_logq_TB: Tensor | None = None
    teacher_logq_TB: Tensor | None = None
    # The divergence over the whole vocabulary, with support "full" only.
    divergence_T: Tensor | None = None
    # The student's log-probabilities of the target tokens (nats).
    logp_T: Tensor | None = None
    # The student's entropy (nats).
    entropy_T: Tensor | None = None


class _Rests(NamedTuple):
    """The statistics `Rest` of every rank, [T, R] each."""

    max_TR: Tensor
    sum_TR: Tensor
    # None if the moment was not requested.
    moment_TR: Tensor | None


@dataclass
class _Side:
    """One distribution: the student's or the teacher's scores, in the parts that `_buckets` reads.

    The parts are the scores of the support, the statistics of each rank's other columns, and the
    candidates that the ranks gathered but that were not selected.
    """

    values_TA: Tensor
    rests: _Rests
    # Scores of the unselected candidates. They are in no rank's rest.
    extra_TC: Tensor


@dataclass
class _BucketState:
    """The tensors that the backward needs next to the logits, for every support but "full".

    They take at most 8 A + 64 bytes a token in float32.
    """

    # Global ids of the support, int32.
    ids_TA: Tensor
    # The student's log-probabilities with the tail as a bucket, whatever the tail mode.
    logp_TB: Tensor
    tail_max_T: Tensor
    tail_sum_T: Tensor
    targets_T: Tensor | None


@dataclass
class _FullState:
    """The tensors that the backward of support "full" needs next to the logits.

    They are the global normalisers of both distributions, and the sum of w
    (ops/divergence_terms.py) in total_T.
    """

    student_max_T: Tensor
    student_logsum_T: Tensor
    teacher_max_T: Tensor
    teacher_logsum_T: Tensor
    total_T: Tensor
    targets_T: Tensor | None


_State = _BucketState | _FullState
# The teacher's logits [T, V], a record of them, or no teacher.
_Teacher = Tensor | TeacherRecord | None


def _kernels(logits_TV: Tensor) -> ModuleType:
    """The kernels for these logits: Triton on a GPU, torch on a CPU and for float64."""
    if logits_TV.is_cuda and logits_TV.dtype != torch.float64:
        from megasd.ops import kernels_triton

        return kernels_triton
    return kernels_torch


def _local(ids: Tensor, shard: Shard) -> Tensor:
    """int32 local columns of global ids; -1 for ids of other ranks and for empty places."""
    ids = ids.to(torch.int32) - shard.start
    return torch.where((ids >= 0) & (ids < shard.num_valid), ids, -1)


def _all_gather(words_TC: Tensor, shard: Shard, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Gather words [T, C] of every rank into [T, R, C]."""
    if shard.size == 1:
        return words_TC[:, None]
    gathered = words_TC.new_empty(shard.size * words_TC.shape[0], words_TC.shape[1])
    dist.all_gather_into_tensor(gathered, words_TC.contiguous(), group=tp_group)
    return gathered.view(shard.size, *words_TC.shape).transpose(0, 1)


def _merge(values_TRK: Tensor, ids_TRK: Tensor, columns: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """All ranks' candidates as [T, C], sorted by (value descending, id ascending).

    Rounded logits have ties at the k-th place of nearly every token. The order makes the choice
    between tied tokens the same for any number of ranks. The candidates of each rank are already in
    this order and ranks own ascending ids, so a stable sort by value is enough. Places that a rank
    with fewer than K true columns could not fill are removed before the sort.
    """
    size, k = values_TRK.shape[1:]
    values_TC, ids_TC = values_TRK.flatten(1), ids_TRK.flatten(1)
    held = [min(k, max(0, min(columns, vocab_size - rank * columns))) for rank in range(size)]
    if min(held) < k:
        values_TC, ids_TC = (
            torch.cat([t[:, rank, :n] for rank, n in enumerate(held)], dim=1) for t in (values_TRK, ids_TRK)
        )
    values_TC, order_TC = values_TC.sort(dim=-1, descending=True, stable=True)
    return values_TC, ids_TC.gather(1, order_TC)


def _select(
    sides: list[tuple[Tensor, float]],
    k: int,
    rest_words: int,
    vocab_size: int,
    shard: Shard,
    tp_group: dist.ProcessGroup | None,
) -> list[tuple[Tensor, _Side]]:
    """Select the k first ids of the whole vocabulary for each (logits, temperature) in `sides`.

    Returns the ids and the distribution of each pair. `rest_words` says how many of the rest's
    statistics (max, sum, moment), in this order, are gathered. One all_gather for all pairs.
    """
    wide = compute_dtype(sides[0][0])
    word = torch.int64 if wide == torch.float64 else torch.int32
    local_k, num_tokens = min(k, shard.num_valid), sides[0][0].shape[0]
    packed = []
    for logits_TV, temperature in sides:
        values_TK = logits_TV.new_full((num_tokens, k), -torch.inf, dtype=wide)
        ids_TK = torch.zeros((num_tokens, k), dtype=word, device=logits_TV.device)
        kernels = _kernels(logits_TV)
        if local_k:
            values, ids, rest = kernels.select(
                logits_TV, local_k, num_valid=shard.num_valid, temperature=temperature
            )
            values_TK[:, :local_k], ids_TK[:, :local_k] = values, ids + shard.start
        else:
            rest = kernels.gather(logits_TV, ids_TK[:, :0].int(), num_valid=0, temperature=temperature)[1]
        packed += [values_TK.view(word), ids_TK, *(r[:, None].view(word) for r in rest[:rest_words])]
    gathered_TRC = _all_gather(torch.cat(packed, dim=1), shard, tp_group)
    found = []
    for words_TRC in gathered_TRC.split(2 * k + rest_words, dim=2):
        values_TRK, ids_TRK, rest_TRC = words_TRC.split([k, k, rest_words], dim=2)
        values_TRK = values_TRK.contiguous().view(wide)
        values_TC, ids_TC = values_TRK[:, 0], ids_TRK[:, 0]
        if shard.size > 1:
            values_TC, ids_TC = _merge(values_TRK, ids_TRK, sides[0][0].shape[1], vocab_size)
        known = rest_TRC.contiguous().view(wide).unbind(-1)
        max_TR, sum_TR = known[:2] if rest_words else (values_TC[:, :0], values_TC[:, :0])
        rests = _Rests(max_TR, sum_TR, known[2] if rest_words == 3 else None)
        found.append((ids_TC[:, :k].long(), _Side(values_TC[:, :k], rests, values_TC[:, k:])))
    return found


def _union(first_TK: Tensor, second_TK: Tensor) -> Tensor:
    """The ids of both supports side by side, with the second copy of an id replaced by -1.

    If an id counted twice, its mass would be missing from the tail.
    """
    ids_TA, order_TA = torch.cat([first_TK, second_TK], dim=1).sort(dim=-1, stable=True)
    copy_TA = torch.zeros_like(ids_TA, dtype=torch.bool)
    copy_TA[:, 1:] = ids_TA[:, 1:] == ids_TA[:, :-1]
    return torch.empty_like(ids_TA).scatter_(1, order_TA, ids_TA.masked_fill(copy_TA, -1))


class _Pack:
    """The words of one all_reduce; each word is non-zero on at most one rank."""

    def __init__(self, shard: Shard, tp_group: dist.ProcessGroup | None) -> None:
        self.shard, self.tp_group = shard, tp_group
        self.parts: list[Tensor] = []

    def add(self, words_TC: Tensor) -> int:
        """Add words [T, C] and return their place in `parts`."""
        self.parts.append(words_TC)
        return len(self.parts) - 1

    def add_side(
        self, logits_TV: Tensor, ids_TA: Tensor, temperature: float, *, moment: bool
    ) -> tuple[int, int]:
        """Add the scores at the ids and this rank's rest; return the places of both in `parts`.

        The rest stands in this rank's row of [R, 2], or of [R, 3] with the moment.
        """
        kernels = _kernels(logits_TV)
        values_TA, rest = kernels.gather(
            logits_TV, _local(ids_TA, self.shard), num_valid=self.shard.num_valid, temperature=temperature
        )
        width = 3 if moment else 2
        slots_TRC = values_TA.new_zeros(values_TA.shape[0], self.shard.size, width)
        slots_TRC[:, self.shard.rank] = torch.stack(rest[:width], dim=1)
        return self.add(values_TA), self.add(slots_TRC.flatten(1))

    def add_targets(self, logits_TV: Tensor, targets_T: Tensor, temperature: float) -> int:
        """Add the scores of the targets, [T, 1], and return their place in `parts`."""
        local_T = _local(targets_T, self.shard)
        scores_T1 = (
            logits_TV.gather(1, local_T.clamp(min=0).long()[:, None]).to(compute_dtype(logits_TV))
            / temperature
        )
        return self.add(scores_T1.masked_fill_((local_T < 0)[:, None], 0.0))

    def reduce(self) -> None:
        """Sum all parts over the ranks. One all_reduce; none if the group has one rank."""
        if self.parts and self.shard.size > 1:
            widths = [p.shape[1] for p in self.parts]
            packed = torch.cat(self.parts, dim=1)
            dist.all_reduce(packed, group=self.tp_group)
            self.parts = list(packed.split(widths, dim=1))

    def side(self, places: tuple[int, int], ids_TA: Tensor) -> _Side:
        """The reduced parts of `add_side` as a distribution."""
        values_TA, slots_TC = (self.parts[i] for i in places)
        slots_TRC = slots_TC.unflatten(1, (self.shard.size, -1))
        moment_TR = slots_TRC[..., 2] if slots_TRC.shape[2] == 3 else None
        rests = _Rests(slots_TRC[..., 0], slots_TRC[..., 1], moment_TR)
        return _Side(values_TA.masked_fill(ids_TA < 0, -torch.inf), rests, values_TA[:, :0])


def _buckets(side: _Side) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the log-probabilities of the support and the tail, and the normaliser.

    Returns (logp_TB, top_T, logsum_T, tail_max_T, tail_sum_T), B = A + 1. A log-probability is
    (score - top) - logsum. The tail is the log-sum-exp of the scores that were not chosen, never
    1 - sum.
    """
    rests, extra_TC = side.rests, side.extra_TC
    tail_max_T = torch.cat([rests.max_TR, extra_TC], dim=1).amax(-1)
    base_T = finite(tail_max_T)
    tail_sum_T = (rests.sum_TR * (rests.max_TR - base_T[:, None]).exp()).sum(-1) + (
        extra_TC - base_T[:, None]
    ).exp().sum(-1)
    top_T = finite(torch.cat([side.values_TA, tail_max_T[:, None]], dim=1).amax(-1))
    log_tail_T = (tail_max_T - top_T) + tail_sum_T.log()
    buckets_TB = torch.cat([side.values_TA - top_T[:, None], log_tail_T[:, None]], dim=1)
    logsum_T = buckets_TB.exp().sum(-1).log()
    return buckets_TB - logsum_T[:, None], top_T, logsum_T, base_T, tail_sum_T


def _entropy(side: _Side, logp_TB: Tensor, top_T: Tensor, logsum_T: Tensor) -> Tensor:
    """The entropy of a distribution in nats, from the parts of a `_Side`.

    It is -sum of p log p with log p = (score - top) - logsum, over the support, each rank's rest,
    and the unselected candidates.
    """

    def over(scores_TC: Tensor) -> Tensor:
        # 0 * log 0 = 0
        shifted_TC = (scores_TC - top_T[:, None]).clamp(min=-1e30)
        return ((shifted_TC - logsum_T[:, None]).exp() * shifted_TC).sum(-1)

    max_TR, sum_TR, moment_TR = side.rests
    if moment_TR is None:
        raise ValueError("the entropy needs the moment of every rank's rest")
    offset_TR = (max_TR - top_T[:, None]).clamp(min=-1e30)
    inside_TR = moment_TR + offset_TR * sum_TR
    rests_T = ((offset_TR - logsum_T[:, None]).exp() * inside_TR).sum(-1)
    return logsum_T - over(side.values_TA) - over(side.extra_TC) - rests_T


def _in_tail_mode(logp_TB: Tensor, tail: str) -> Tensor:
    if tail == "bucket":
        return logp_TB
    if tail == "raw":
        return logp_TB[:, :-1].clone()
    chosen_TA = logp_TB[:, :-1]
    shifted_TA = chosen_TA - finite(chosen_TA.amax(-1, keepdim=True))
    # A support without any mass has no distribution to renormalise: all its log-probabilities stay
    # -inf, not NaN.
    return shifted_TA - shifted_TA.exp().sum(-1, keepdim=True).log().clamp(min=0.0)


def _logits(teacher: _Teacher) -> Tensor:
    """The teacher as logits; call it only after `_check`, for a support that needs the logits."""
    assert isinstance(teacher, Tensor)
    return teacher


def _choose(
    student_TV: Tensor,
    teacher: _Teacher,
    spec: LogProbsSpec,
    shard: Shard,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, _Side | None, _Side | None]:
    """Choose the support; return (ids_TA, student side, teacher side).

    A side is None if the selection did not gather that distribution.
    """
    k, vocab_size = min(spec.top_k, spec.vocab_size), spec.vocab_size
    student = (student_TV, spec.temperature)
    if spec.support == "student":
        ((ids_TA, side),) = _select([student], k, 3, vocab_size, shard, tp_group)
        return ids_TA, side, None
    if spec.support == "teacher":
        chosen = (_logits(teacher), spec.teacher_temperature)
        ((ids_TA, side),) = _select([chosen], k, 2, vocab_size, shard, tp_group)
        return ids_TA, None, side
    if spec.support == "union":
        chosen = (_logits(teacher), spec.teacher_temperature)
        both = _select([student, chosen], k, 0, vocab_size, shard, tp_group)
        return _union(both[0][0], both[1][0]), None, None
    if isinstance(teacher, TeacherRecord):
        return teacher.ids_TK.long(), None, None
    empty_TA = torch.zeros(student_TV.shape[0], 0, dtype=torch.int64, device=student_TV.device)
    return empty_TA, None, None


@torch.no_grad()
def compute_logprobs(
    student_TV: Tensor,
    teacher: _Teacher,
    targets_T: Tensor | None,
    spec: LogProbsSpec,
    *,
    tp_group: dist.ProcessGroup | None,
) -> tuple[LogProbs, _State]:
    """Compute the log-probs without autograd, and the state that `write_gradient_` needs.

    Arguments, errors and collectives are those of vocab_parallel_logprobs.
    """
    _check(student_TV, teacher, spec)
    shard = shard_of(student_TV.shape[1], spec.vocab_size, tp_group)
    if spec.support == "full":
        return _read_full(student_TV, _logits(teacher), targets_T, spec, shard, tp_group)
    ids_TA, student_side, teacher_side = _choose(student_TV, teacher, spec, shard, tp_group)
    # One all_reduce brings the distributions that the selection did not gather, and the targets.
    pack = _Pack(shard, tp_group)
    student_places = teacher_places = target_place = None
    if student_side is None:
        student_places = pack.add_side(student_TV, ids_TA, spec.temperature, moment=True)
    if isinstance(teacher, Tensor) and teacher_side is None:
        teacher_places = pack.add_side(teacher, ids_TA, spec.teacher_temperature, moment=False)
    if targets_T is not None:
        target_place = pack.add_targets(student_TV, targets_T, spec.temperature)
    pack.reduce()
    if student_places is not None:
        student_side = pack.side(student_places, ids_TA)
    if teacher_places is not None:
        teacher_side = pack.side(teacher_places, ids_TA)
    assert student_side is not None

    logp_TB, top_T, logsum_T, tail_max_T, tail_sum_T = _buckets(student_side)
    logprobs = LogProbs(entropy_T=_entropy(student_side, logp_TB, top_T, logsum_T))
    if spec.support != "none":
        logprobs.ids_TA, logprobs.student_logq_TB = ids_TA, _in_tail_mode(logp_TB, spec.tail)
    if teacher_side is not None:
        logprobs.teacher_logq_TB = _in_tail_mode(_buckets(teacher_side)[0], spec.tail)
    elif isinstance(teacher, TeacherRecord):
        logq_TK = teacher.logq_TK.masked_fill(ids_TA < 0, -torch.inf)
        logq_TB = torch.cat([logq_TK, teacher.log_tail_T[:, None]], dim=1)
        logprobs.teacher_logq_TB = _in_tail_mode(logq_TB.to(logp_TB.dtype), spec.tail)
    if target_place is not None:
        logprobs.logp_T = (pack.parts[target_place][:, 0] - top_T) - logsum_T
    return logprobs, _BucketState(ids_TA.to(torch.int32), logp_TB, tail_max_T, tail_sum_T, targets_T)


def _read_full(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor | None,
    spec: LogProbsSpec,
    shard: Shard,
    tp_group: dist.ProcessGroup | None,
) -> tuple[LogProbs, _State]:
    none_T0 = torch.zeros(student_TV.shape[0], 0, dtype=torch.int32, device=student_TV.device)
    words = []
    for logits_TV, temperature in ((student_TV, spec.temperature), (teacher_TV, spec.teacher_temperature)):
        rest = _kernels(logits_TV).gather(
            logits_TV, none_T0, num_valid=shard.num_valid, temperature=temperature
        )[1]
        words += [rest.max_T, rest.sum_T]
    gathered_TRC = _all_gather(torch.stack(words, dim=1), shard, tp_group)
    norms = []
    for max_TR, sum_TR in (gathered_TRC[..., :2].unbind(-1), gathered_TRC[..., 2:].unbind(-1)):
        max_T = finite(max_TR.amax(-1))
        norms.append((max_T, (sum_TR * (max_TR - max_T[:, None]).exp()).sum(-1).log()))
    pack = _Pack(shard, tp_group)
    sums_T3 = _kernels(student_TV).full_sums(student_TV, teacher_TV, *norms, **_full_options(spec, shard))
    pack.add(sums_T3)
    if targets_T is not None:
        pack.add_targets(student_TV, targets_T, spec.temperature)
    pack.reduce()
    divergence_T, total_T, plogp_T = (t.contiguous() for t in pack.parts[0].unbind(-1))
    logprobs = LogProbs(divergence_T=divergence_T, entropy_T=-plogp_T)
    (student_max_T, student_logsum_T), (teacher_max_T, teacher_logsum_T) = norms
    if targets_T is not None:
        logprobs.logp_T = (pack.parts[1][:, 0] - student_max_T) - student_logsum_T
    state = _FullState(
        student_max_T=student_max_T,
        student_logsum_T=student_logsum_T,
        teacher_max_T=teacher_max_T,
        teacher_logsum_T=teacher_logsum_T,
        total_T=total_T,
        targets_T=targets_T,
    )
    return logprobs, state


def _full_options(spec: LogProbsSpec, shard: Shard) -> dict[str, Any]:
    return {
        "beta": spec.beta,
        "clip": spec.clip,
        "num_valid": shard.num_valid,
        "temperature": spec.temperature,
        "teacher_temperature": spec.teacher_temperature,
    }


@torch.no_grad()
def write_gradient_(
    student_TV: Tensor,
    teacher_TV: Tensor | None,
    state: _State,
    grad_TB: Tensor | None,
    grad_divergence_T: Tensor | None,
    grad_logp_T: Tensor | None,
    spec: LogProbsSpec,
    *,
    tp_group: dist.ProcessGroup | None,
    out: Tensor | None = None,
) -> None:
    """Write this rank's gradient of the logits, from the gradients of the log-probs.

    A gradient that is None counts as zero. The result goes in place into the logits, or into `out`.
    No collective.
    """
    shard = shard_of(student_TV.shape[1], spec.vocab_size, tp_group)
    kernels = _kernels(student_TV)
    wide = compute_dtype(student_TV)
    target_T = (
        student_TV.new_zeros(student_TV.shape[0], dtype=wide) if grad_logp_T is None else grad_logp_T.to(wide)
    )
    if isinstance(state, _FullState):
        upstream_T = torch.zeros_like(target_T) if grad_divergence_T is None else grad_divergence_T.to(wide)
        norms = (state.student_max_T, state.student_logsum_T), (state.teacher_max_T, state.teacher_logsum_T)
        coefficient_T = -(upstream_T * state.total_T + target_T)
        kernels.full_gradient_(
            student_TV,
            teacher_TV,
            *norms,
            upstream_T / spec.temperature,
            coefficient_T / spec.temperature,
            out=out,
            **_full_options(spec, shard),
        )
    else:
        chosen_TA, tail_T = _bucket_gradient(state.logp_TB, grad_TB, target_T, spec.tail)
        empty_T = state.tail_sum_T == 0
        scale_T = (
            torch.where(empty_T, 0.0, tail_T / torch.where(empty_T, 1.0, state.tail_sum_T)) / spec.temperature
        )
        kernels.gradient_(
            student_TV,
            _local(state.ids_TA, shard),
            chosen_TA / spec.temperature,
            scale_T,
            state.tail_max_T,
            num_valid=shard.num_valid,
            temperature=spec.temperature,
            out=out,
        )
    if grad_logp_T is not None and state.targets_T is not None and shard.num_valid:
        written_TV = student_TV if out is None else out
        local_T = _local(state.targets_T, shard)
        at_target_T = torch.where(local_T >= 0, target_T / spec.temperature, 0.0)
        written_TV.scatter_add_(
            1, local_T.clamp(min=0).long()[:, None], at_target_T[:, None].to(written_TV.dtype)
        )


def _bucket_gradient(
    logp_TB: Tensor, grad_TB: Tensor | None, target_T: Tensor, tail: str
) -> tuple[Tensor, Tensor]:
    """The gradients in the scores of the support (chosen_TA) and in the tail as a whole (tail_T).

    The formulas stand at the head of the file.
    """
    p_TB = logp_TB.exp()
    if grad_TB is None:
        gradient_TB = -p_TB * target_T[:, None]
    elif tail == "renormalise":
        renormalised_TA = _in_tail_mode(logp_TB, tail).exp()
        chosen_TA = grad_TB - renormalised_TA * grad_TB.sum(-1, keepdim=True)
        gradient_TB = torch.nn.functional.pad(chosen_TA, (0, 1)) - p_TB * target_T[:, None]
    else:
        wide_TB = grad_TB if tail == "bucket" else torch.nn.functional.pad(grad_TB, (0, 1))
        gradient_TB = wide_TB - p_TB * (wide_TB.sum(-1) + target_T)[:, None]
    return gradient_TB[:, :-1], gradient_TB[:, -1]


def _check(student_TV: Tensor, teacher: Tensor | TeacherRecord | None, spec: LogProbsSpec) -> None:
    if student_TV.dim() != 2:
        raise ValueError(
            f"logits must be [tokens, local vocabulary], got shape {tuple(student_TV.shape)}; flatten the"
            " batch first"
        )
    if spec.support in ("teacher", "union", "full") and not isinstance(teacher, Tensor):
        raise ValueError(f"support {spec.support!r} needs the teacher's logits, got {type(teacher).__name__}")
    if (spec.support == "record") != isinstance(teacher, TeacherRecord):
        raise ValueError(
            f"support {spec.support!r} with a teacher of type {type(teacher).__name__}: a record goes with"
            " support 'record'"
        )
    if isinstance(teacher, Tensor) and teacher.shape != student_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher.shape)} differ in"
            " shape"
        )
    if isinstance(teacher, TeacherRecord) and teacher.ids_TK.shape[0] != student_TV.shape[0]:
        raise ValueError(
            f"a record of {teacher.ids_TK.shape[0]} tokens next to logits of {student_TV.shape[0]}"
        )


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        teacher: Tensor | TeacherRecord | None,
        targets_T: Tensor | None,
        spec: LogProbsSpec,
        tp_group: dist.ProcessGroup | None,
        in_place: bool,
    ) -> tuple[Tensor | None, ...]:
        logprobs, state = compute_logprobs(student_TV, teacher, targets_T, spec, tp_group=tp_group)
        # For every support but "full" the teacher's logits may be freed after the forward.
        needed = teacher if spec.support == "full" else None
        ctx.save_for_backward(student_TV, needed, *(getattr(state, f.name) for f in fields(state)))
        ctx.spec, ctx.tp_group, ctx.in_place, ctx.done = spec, tp_group, in_place, False
        outputs = tuple(getattr(logprobs, f.name) for f in fields(logprobs))
        ctx.mark_non_differentiable(
            *(t for t in (logprobs.ids_TA, logprobs.teacher_logq_TB, logprobs.entropy_T) if t is not None)
        )
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _ids: Tensor | None,
        grad_TB: Tensor | None,
        _teacher: Tensor | None,
        grad_divergence_T: Tensor | None,
        grad_logp_T: Tensor | None,
        _entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        student_TV, teacher_TV, *state = ctx.saved_tensors
        if ctx.in_place and ctx.done:
            raise RuntimeError(
                "the logits were overwritten with their gradient: backward can run once when in_place=True"
            )
        ctx.done = True
        out = student_TV.detach() if ctx.in_place else torch.empty_like(student_TV)
        write_gradient_(
            student_TV,
            teacher_TV,
            _FullState(*state) if ctx.spec.support == "full" else _BucketState(*state),
            grad_TB,
            grad_divergence_T,
            grad_logp_T,
            ctx.spec,
            tp_group=ctx.tp_group,
            out=out,
        )
        return out, None, None, None, None, None


def vocab_parallel_logprobs(
    student_TV: Tensor,
    teacher: Tensor | TeacherRecord | None,
    targets_T: Tensor | None,
    spec: LogProbsSpec,
    *,
    tp_group: dist.ProcessGroup | None,
    in_place: bool = False,
) -> LogProbs:
    """Compute the log-probs that `spec` names, from logits [T, V] split over the vocabulary.

    The logits are bfloat16, float32 or float64. The log-probs are differentiable in the student's
    logits alone.

    teacher: logits of the same slice, a TeacherRecord (support "record"), or None. targets_T: int64
    global ids whose log-probabilities are wanted. T is the same on every rank of tp_group (None:
    one rank). in_place: the backward writes the gradient into the logits' own storage, which
    nothing else may read afterwards; a second backward raises RuntimeError. ValueError for
    arguments that do not fit together. Logits must not be NaN (a NaN makes that token's outputs
    NaN).

    Collectives, forward: see the head of the file; at most one all_gather and one all_reduce.
    Backward: none.
    """
    teacher = teacher.detach() if isinstance(teacher, Tensor) else teacher
    return LogProbs(*_VocabParallelLogProbs.apply(student_TV, teacher, targets_T, spec, tp_group, in_place))
