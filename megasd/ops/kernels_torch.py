"""Torch kernels that read this rank's slice of the logits; kernels_triton.py has them for a GPU.

The functions use no process group and no autograd. kernels_triton.py has functions of the same
names, arguments and results.

T tokens, V local columns of which the first `num_valid` are true and the others padding, K top-k, A
size of the support. A score is logit / temperature, in float32 (float64 for float64 logits). Every
kernel walks over blocks of rows that fit a core's cache, so its temporaries do not grow with T.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megasd.ops.divergence_terms import SCRATCH, divergence_terms
from megasd.ops.vocab_shard import Rest, compute_dtype, finite

# The elements of a block of rows, per buffer, and the most rows of a block. A block is large enough
# to pay for the calls and small enough for a core's cache.
_BLOCK, _FULL_BLOCK, _BLOCK_ROWS = 1 << 19, 1 << 17, 512
# A Norm is (max_T, logsum_T) of whole rows of the vocabulary: log p = (score - max) - logsum.
Norm = tuple[Tensor, Tensor]


def _blocks(
    logits_TV: Tensor, num_valid: int, buffers: int, elements: int = _BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows as (slice of the rows, scratch memory [buffers, rows, num_valid]).

    Every block gets the same memory. Allocations of this size go back to the system when they are
    freed, and fetching them again would cost more than the arithmetic.
    """
    rows = min(max(1, elements // max(1, num_valid)), _BLOCK_ROWS, max(1, logits_TV.shape[0]))
    scratch = logits_TV.new_empty(buffers, rows, num_valid, dtype=compute_dtype(logits_TV))
    for start in range(0, logits_TV.shape[0], rows):
        yield slice(start, start + rows), scratch[:, : logits_TV.shape[0] - start]


def _scores(logits_TV: Tensor, temperature: float, out_TV: Tensor) -> Tensor:
    """The scores of the true columns, in compute precision.

    If the logits are the scores already, the result is a view of them; if not, it lies in out_TV.
    """
    logits_TV = logits_TV[:, : out_TV.shape[1]]
    if temperature == 1.0 and logits_TV.dtype == out_TV.dtype:
        return logits_TV
    out_TV.copy_(logits_TV)
    return out_TV if temperature == 1.0 else out_TV.div_(temperature)


def _rest(
    scores_TV: Tensor, rows_C: Tensor, columns_C: Tensor, shifted_TV: Tensor, weight_TV: Tensor
) -> Rest:
    """Statistics of all columns, without the cells (rows_C, columns_C).

    shifted_TV and weight_TV are scratch memory. shifted_TV may be scores_TV itself.
    """
    if scores_TV.shape[1] == 0:
        nothing = scores_TV.new_zeros(scores_TV.shape[0])
        return Rest(nothing - torch.inf, nothing, nothing)
    shifted_TV.copy_(scores_TV)
    shifted_TV[rows_C, columns_C] = -torch.inf
    max_T = shifted_TV.amax(-1)
    shifted_TV.sub_(finite(max_T)[:, None])
    torch.exp(shifted_TV, out=weight_TV)
    # The named cells are -inf with weight 0, and 0 * -inf is NaN.
    shifted_TV[rows_C, columns_C] = 0.0
    sum_T, moment_T = weight_TV.sum(-1), shifted_TV.mul_(weight_TV).sum(-1)
    # Other columns may have the score -inf too. They make NaN and must count as 0.
    if moment_T.isnan().any():
        moment_T = torch.where(weight_TV > 0, shifted_TV, 0.0).sum(-1)
    return Rest(max_T, sum_T, moment_T)


def _first(scores_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) of the k first columns, ordered by score descending, then column ascending.

    The columns are divided into groups. The k-th largest maximum of a group bounds the k-th largest
    score from below, so only groups whose maximum reaches the bound can hold a result. This takes
    one read of the row and a sort of little more than k numbers. The result is exact, also with
    ties.
    """
    num_rows, columns = scores_TV.shape
    # The number of columns per group.
    depth = columns // (8 * k)
    if depth < 2:
        values_TV, order_TV = scores_TV.sort(dim=-1, descending=True, stable=True)
        return values_TV[:, :k], order_TV[:, :k]
    grouped = columns // depth * depth
    groups_TGD = scores_TV[:, :grouped].unflatten(1, (-1, depth))
    maxima_TG = groups_TGD.amax(-1)
    bound_T = maxima_TG.topk(k, dim=-1, sorted=False).values.amin(-1)
    # The comparison is "not <" instead of ">=", so that a NaN stays a candidate.
    row_P, group_P = (maxima_TG < bound_T[:, None]).logical_not_().nonzero(as_tuple=True)
    member_PD = groups_TGD[row_P, group_P]
    pair_C, place_C = (member_PD < bound_T[row_P, None]).logical_not_().nonzero(as_tuple=True)
    row_C, column_C, value_C = row_P[pair_C], group_P[pair_C] * depth + place_C, member_PD[pair_C, place_C]
    # Columns after the last whole group are candidates too. They come last in each row.
    if grouped < columns:
        row_L, place_L = (scores_TV[:, grouped:] < bound_T[:, None]).logical_not_().nonzero(as_tuple=True)
        row_C, order_C = torch.cat([row_C, row_L]).sort(stable=True)
        column_C = torch.cat([column_C, place_L + grouped])[order_C]
        value_C = torch.cat([value_C, scores_TV[row_L, place_L + grouped]])[order_C]
    count_T = row_C.bincount(minlength=num_rows)
    index_C = torch.arange(len(row_C), device=row_C.device) - (count_T.cumsum(0) - count_T)[row_C]
    values_TC = scores_TV.new_full((num_rows, int(count_T.max())), -torch.inf)
    ids_TC = torch.zeros_like(values_TC, dtype=torch.int64)
    values_TC[row_C, index_C], ids_TC[row_C, index_C] = value_C, column_C
    values_TC, order_TC = values_TC.sort(dim=-1, descending=True, stable=True)
    return values_TC[:, :k], ids_TC.gather(1, order_TC[:, :k])


def select(logits_TV: Tensor, k: int, *, num_valid: int, temperature: float) -> tuple[Tensor, Tensor, Rest]:
    """Select the k first true columns of each token, by score descending, then id ascending.

    Returns (values_TK, ids_TK, rest). values are scores, ids int32 local columns, rest the
    statistics of the true columns that were not selected. ValueError unless 1 <= k <= num_valid.
    """
    if not 1 <= k <= num_valid:
        raise ValueError(f"k must lie in [1, {num_valid}], got {k}")
    values_TK = logits_TV.new_empty(logits_TV.shape[0], k, dtype=compute_dtype(logits_TV))
    ids_TK = torch.empty_like(values_TK, dtype=torch.int32)
    rest = Rest(*(values_TK.new_empty(logits_TV.shape[0]) for _ in Rest._fields))
    for block, (shifted_TV, weight_TV) in _blocks(logits_TV, num_valid, 2):
        scores_TV = _scores(logits_TV[block], temperature, shifted_TV)
        values, ids = _first(scores_TV, k)
        values_TK[block], ids_TK[block] = values, ids
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        for whole, part in zip(rest, _rest(scores_TV, rows, ids, shifted_TV, weight_TV), strict=True):
            whole[block] = part
    return values_TK, ids_TK, rest


def gather(logits_TV: Tensor, ids_TA: Tensor, *, num_valid: int, temperature: float) -> tuple[Tensor, Rest]:
    """Read the scores of the chosen columns, and statistics of the other true columns.

    Returns (values_TA, rest). ids_TA: int32 local columns, or -1 for an id that is not on this
    rank, which gets the value 0. The ids of a token are distinct apart from -1; A may be 0.
    """
    values_TA = logits_TV.new_zeros(ids_TA.shape, dtype=compute_dtype(logits_TV))
    rest = Rest(*(values_TA.new_empty(logits_TV.shape[0]) for _ in Rest._fields))
    for block, (shifted_TV, weight_TV) in _blocks(logits_TV, num_valid, 2):
        scores_TV = _scores(logits_TV[block], temperature, shifted_TV)
        rows, places = (ids_TA[block] >= 0).nonzero(as_tuple=True)
        columns = ids_TA[block][rows, places].long()
        values_TA[block][rows, places] = scores_TV[rows, columns]
        for whole, part in zip(rest, _rest(scores_TV, rows, columns, shifted_TV, weight_TV), strict=True):
            whole[block] = part
    return values_TA, rest


def gradient_(
    logits_TV: Tensor,
    ids_TA: Tensor,
    chosen_TA: Tensor,
    scale_T: Tensor,
    ref_T: Tensor,
    *,
    num_valid: int,
    temperature: float,
    out: Tensor | None = None,
) -> None:
    """Write the gradient of the logits for a support and its tail.

    The gradient is chosen_TA at ids_TA, scale * exp(score - ref) in every other true column, and 0
    in padded columns. It goes in place into the logits, or into `out` ([T, V] of any dtype). ref_T
    is finite and not below any unchosen score.
    """
    out = logits_TV if out is None else out
    for block, (gradient_TV,) in _blocks(logits_TV, num_valid, 1):
        scores_TV = _scores(logits_TV[block], temperature, gradient_TV)
        # A chosen score may lie above ref: the minimum keeps inf * 0 away from a cell that is
        # overwritten below.
        torch.sub(scores_TV, ref_T[block, None], out=gradient_TV).clamp_(max=0.0).exp_().mul_(
            scale_T[block, None]
        )
        rows, places = (ids_TA[block] >= 0).nonzero(as_tuple=True)
        gradient_TV[rows, ids_TA[block][rows, places].long()] = chosen_TA[block][rows, places]
        out[block, :num_valid] = gradient_TV
        out[block, num_valid:] = 0.0


def _logp(logits_TV: Tensor, norm: Norm, block: slice, temperature: float, out_TV: Tensor) -> Tensor:
    max_T, logsum_T = norm
    scores_TV = _scores(logits_TV[block], temperature, out_TV)
    return torch.sub(scores_TV, max_T[block, None], out=out_TV).sub_(logsum_T[block, None])


def full_sums(
    student_TV: Tensor,
    teacher_TV: Tensor,
    student_norm: Norm,
    teacher_norm: Norm,
    *,
    beta: float,
    clip: float | None,
    num_valid: int,
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Sum phi, w and p log p over the true columns, [T, 3].

    phi and w are those of ops/divergence_terms.py; p is the student.
    """
    sums_T3 = student_TV.new_empty(student_TV.shape[0], 3, dtype=compute_dtype(student_TV))
    for block, buffers in _blocks(student_TV, num_valid, 2 + SCRATCH, _FULL_BLOCK):
        student_logp = _logp(student_TV, student_norm, block, temperature, buffers[0])
        teacher_logp = _logp(teacher_TV, teacher_norm, block, teacher_temperature, buffers[1])
        phi_TV, w_TV = divergence_terms(
            student_logp, teacher_logp, beta=beta, normalised=True, clip=clip, scratch=buffers[2:]
        )
        sums_T3[block, 0], sums_T3[block, 1] = phi_TV.sum(-1), w_TV.sum(-1)
        p_TV = torch.exp(student_logp, out=teacher_logp)
        # 0 * log 0 = 0
        sums_T3[block, 2] = student_logp.clamp_(min=-1e30).mul_(p_TV).sum(-1)
    return sums_T3


def full_gradient_(
    student_TV: Tensor,
    teacher_TV: Tensor,
    student_norm: Norm,
    teacher_norm: Norm,
    upstream_T: Tensor,
    coefficient_T: Tensor,
    *,
    beta: float,
    clip: float | None,
    num_valid: int,
    temperature: float,
    teacher_temperature: float,
    out: Tensor | None = None,
) -> None:
    """Write the gradient of the student's logits for the divergence over the whole vocabulary.

    The gradient is upstream * w + coefficient * p in true columns (w of ops/divergence_terms.py, p
    the student) and 0 in padded columns. It goes in place into the student's logits, or into `out`.
    """
    out = student_TV if out is None else out
    for block, buffers in _blocks(student_TV, num_valid, 2 + SCRATCH, _FULL_BLOCK):
        student_logp = _logp(student_TV, student_norm, block, temperature, buffers[0])
        teacher_logp = _logp(teacher_TV, teacher_norm, block, teacher_temperature, buffers[1])
        _, w_TV = divergence_terms(
            student_logp, teacher_logp, beta=beta, normalised=True, clip=clip, scratch=buffers[2:]
        )
        w_TV.mul_(upstream_T[block, None])
        out[block, :num_valid] = w_TV.addcmul_(student_logp.exp_(), coefficient_T[block, None])
        out[block, num_valid:] = 0.0
