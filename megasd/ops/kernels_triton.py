"""The functions of kernels_torch.py as Triton kernels for Hopper.

Each function reads the logits from HBM once.

T tokens, V local columns of which the first `num_valid` are true and the others padding, K top-k, A
size of the support. Logits in bfloat16, float16 or float32 with contiguous columns; every number is
computed in float32. A score is logit * (1 / temperature), as torch divides by a number on CUDA: at
most 1.5 ulp from the exact quotient, and equal to it when the temperature is a power of two.

The kernel of `select`: a program owns a row. One pass keeps softmax statistics (max, sum, moment)
of GROUPS groups of columns in registers, so the only columns that are read twice are those of the
few groups whose maximum reaches a lower bound of the k-th largest score; they are hot in L2. The
bound comes from bisecting int32 order keys of the group maxima (k groups reach it, so k scores do).
Columns that reach it are candidates; a candidate's rank among them, by counting, is its place in
the output. Columns that are not chosen are summed where they are met: nothing is ever subtracted.
If there are more than CAP candidates (mass ties, fewer than k finite groups), the program bisects
the keys of the whole row instead, which is exact.

A NaN logit ranks above everything and makes its row's rest or values NaN. Columns at -inf add
nothing.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from megasd.ops.vocab_shard import Rest

# A Norm is (max_T, logsum_T) of whole rows of the vocabulary: log p = (score - max) - logsum.
Norm = tuple[Tensor, Tensor]
# The maximum of an empty set of columns. It is finite, so that a difference of two is not NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_KEY_OF_MINUS_INF = tl.constexpr(-0x7F800000)
_KEY_OF_NAN = tl.constexpr(0x7FFFFFFF)
# A value below every packed candidate.
_NOTHING = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
# This value stands for -inf where -inf * 0 would be NaN: exp of it is 0, and 0 times it is 0.
_GONE = tl.constexpr(-200.0)
_LOG_ZERO = tl.constexpr(-1e30)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


# Arithmetic of one column -------------------------------------------------------------------------


@triton.jit
def _order_key(score):
    """An int32 key in the order of the scores; -0 and +0 share a key, NaN has the highest."""
    bits = score.to(tl.int32, bitcast=True)
    # sign and magnitude to two's complement
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(score == score, key, _KEY_OF_NAN)


@triton.jit
def _score_of(key):
    return tl.where(key < 0, -key ^ -0x80000000, key).to(tl.float32, bitcast=True)


@triton.jit
def _packed(key, column):
    """An int64 in the total order: score descending, column ascending."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _exp(x):
    """exp(x) to about 2 ulp + |x| / 2 ulp, flushed to 0 below -87.3.

    tl.exp spends three more instructions on subnormal results.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _middle(low, high):
    """ceil((low + high) / 2) of int32 without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _expm1_negative(d):
    """(exp(-d) - 1, exp(-d) - 1 + d, exp(-d)) for d >= 0.

    Below 1 both come from d^2 * q(d), q minimax to 1.9e-8, so neither cancels. Measured in the
    interpreter against float64 on [0, 100]: relative error at most 1.6e-7 for the first, 2.1e-7 for
    the second (a GPU's exp2 may err by 2 ulp itself: 1.4e-7 of the first at d = 1).
    """
    low = _exp(-d)
    q = -0.00013700775161851197
    q = q * d + 0.0013237660750746727
    q = q * d - 0.008300237357616425
    q = q * d + 0.041658915579319
    q = q * d - 0.16666598618030548
    q = q * d + 0.5
    excess = tl.where(d < 1.0, q * d * d, (low - 1.0) + d)
    return tl.where(d < 1.0, excess - d, low - 1.0), excess, low


@triton.jit
def _log1p_negative(z, DEEP: tl.constexpr):
    """log(1 + z) for -1 < z <= 0; without DEEP for -0.5 <= z <= 0.

    Down to -0.5 z + z^2 r(z), r minimax to 2.4e-8; below it log(1 + z), where 1 + z is exact.
    Measured in the interpreter against float64: relative error at most 1.3e-7.
    """
    r = 1.414549469947815
    r = r * z + 1.639593243598938
    r = r * z + 1.208716869354248
    r = r * z + 0.1809535026550293
    r = r * z + 0.2636912167072296
    r = r * z - 0.24368257820606232
    r = r * z + 0.33363211154937744
    r = r * z - 0.49999523162841797
    series = r * z * z + z
    if DEEP:
        return tl.where(z < -0.5, tl.log(1.0 + z), series)
    return series


@triton.jit
def _terms(a, b, beta, clip, END: tl.constexpr, CLIPPED: tl.constexpr, DEEP: tl.constexpr):
    """(phi, w, p, log p, finite) of ops/divergence_terms.py.

    END: beta if beta is 0 or 1, else -1.
    """
    student_empty, teacher_empty = a == float("-inf"), b == float("-inf")
    a = tl.maximum(a, _LOG_ZERO, propagate_nan=_NAN)
    b = tl.maximum(b, _LOG_ZERO, propagate_nan=_NAN)
    x = a - b
    d = tl.abs(x)
    student_high = x >= 0
    high = _exp(tl.maximum(a, b, propagate_nan=_NAN))
    e, excess, ratio = _expm1_negative(d)
    low = high * ratio
    p = tl.where(student_high, high, low)
    q = tl.where(student_high, low, high)
    if END < 0:
        g = tl.where(student_high, beta, 1.0 - beta)
        # log(m / high)
        log_mix = _log1p_negative(g * e, DEEP)
        phi = tl.maximum(-high * (g * ratio * d + (1.0 + g * e) * log_mix), 0.0, propagate_nan=_NAN)
        w = (beta - 1.0) * p * (log_mix + tl.where(student_high, 0.0, d))
    else:
        if CLIPPED:
            if END == 0:
                phi, w = -q * x, -q
            else:
                phi, w = p * x, p * x + p
        else:
            # e + d where the numerator's distribution is the larger, else -(e + ratio * d), which
            # cancels to d^2 / 2 below 1.
            other = tl.where(d < 1.0, d * d - excess * (1.0 + d), -(e + ratio * d))
            if END == 0:
                phi = high * tl.where(student_high, other, excess)
                w = tl.where(student_high, -high * e, high * e)
            else:
                phi = high * tl.where(student_high, excess, other)
                w = p * x
            phi = tl.maximum(phi, 0.0, propagate_nan=_NAN)
        if END == 0:
            phi = tl.where(student_empty & (q > 0), float("inf"), phi)
        else:
            phi = tl.where(teacher_empty & (p > 0), float("inf"), phi)
    if CLIPPED:
        over = phi > clip
        phi, w = tl.where(over, clip, phi), tl.where(over, 0.0, w)
    return phi, w, p, a


# Softmax statistics in lanes ----------------------------------------------------------------------


@triton.jit
def _fold(raw, inverse, max_, sum_, moment):
    """Add columns [lanes, WIDTH] of float32 logits to the statistics of each lane.

    -inf stands for a column that does not exist.
    """
    top = tl.maximum(max_, tl.max(raw, 1) * inverse)
    shift = tl.maximum(raw * inverse - top[:, None], _GONE, propagate_nan=_NAN)
    weight = _exp(shift)
    drop = tl.maximum(max_ - top, _GONE)
    decay = _exp(drop)
    moment = decay * (moment + drop * sum_) + tl.sum(weight * shift, 1)
    return top, decay * sum_ + tl.sum(weight, 1), moment


@triton.jit
def _collapse(max_, sum_, moment):
    """Statistics of all lanes together."""
    top = tl.max(max_, 0)
    drop = tl.maximum(max_ - top, _GONE)
    decay = _exp(drop)
    return top, tl.sum(decay * sum_, 0), tl.sum(decay * (moment + drop * sum_), 0)


@triton.jit
def _merge(one, other):
    """Statistics of two sets of columns, (max, sum, moment) each, together."""
    top = tl.maximum(one[0], other[0])
    drop, other_drop = tl.maximum(one[0] - top, _GONE), tl.maximum(other[0] - top, _GONE)
    decay, other_decay = _exp(drop), _exp(other_drop)
    moment = decay * (one[2] + drop * one[1]) + other_decay * (other[2] + other_drop * other[1])
    return top, decay * one[1] + other_decay * other[1], moment


@triton.jit
def _store_rest(to, row, num_rows, rest):
    max_, sum_, moment = rest
    tl.store(to + row, tl.where(sum_ == 0, float("-inf"), max_))
    tl.store(to + num_rows + row, sum_)
    tl.store(to + num_rows + num_rows + row, moment)


@triton.jit
def _scan_row(
    logits, marks, num_valid, inverse, GROUPS: tl.constexpr, WIDTH: tl.constexpr, MARKED: tl.constexpr
):
    """Statistics of each group of columns; with MARKED without those whose bit is set in `marks`.

    Group g holds the columns g * WIDTH .. + WIDTH of every tile of GROUPS * WIDTH: a vector load
    each, all 32 bytes of a sector.
    """
    TILE: tl.constexpr = GROUPS * WIDTH
    group = tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)[None, :]
    column = group[:, None] * WIDTH + within
    word, bit = group * WIDTH // 32, group * WIDTH % 32
    max_ = tl.full([GROUPS], _LOWEST, tl.float32)
    sum_, moment = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    raw = tl.load(logits + column, mask=column < num_valid, other=float("-inf"))
    words = group
    if MARKED:
        words = tl.load(marks + word, mask=group * WIDTH < num_valid, other=0)
    whole = tl.maximum(num_valid // TILE * TILE, TILE)
    # Whole tiles need no mask. The next tile is loaded while the current tile is summed.
    for start in range(TILE, whole, TILE):
        ahead = tl.load(logits + start + column)
        words_ahead = words
        if MARKED:
            words_ahead = tl.load(marks + start // 32 + word)
        max_, sum_, moment = _fold(_unmarked(raw, words >> bit, within, MARKED), inverse, max_, sum_, moment)
        raw, words = ahead, words_ahead
    max_, sum_, moment = _fold(_unmarked(raw, words >> bit, within, MARKED), inverse, max_, sum_, moment)
    raw = tl.load(logits + whole + column, mask=whole + column < num_valid, other=float("-inf"))
    if MARKED:
        words = tl.load(marks + whole // 32 + word, mask=whole + group * WIDTH < num_valid, other=0)
    return _fold(_unmarked(raw, words >> bit, within, MARKED), inverse, max_, sum_, moment)


@triton.jit
def _unmarked(raw, words, within, MARKED: tl.constexpr):
    raw = raw.to(tl.float32)
    if MARKED:
        raw = tl.where(((words[:, None] >> within) & 1) == 1, float("-inf"), raw)
    return raw


# select -------------------------------------------------------------------------------------------


@triton.jit
def _count(logits, num_valid, inverse, bound, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Number of columns whose key is at least `bound`."""
    column = tl.arange(0, GROUPS * WIDTH)
    hits = tl.zeros([GROUPS * WIDTH], tl.int32)
    for start in range(0, num_valid, GROUPS * WIDTH):
        inside = start + column < num_valid
        score = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32) * inverse
        hits += (inside & (_order_key(score) >= bound)).to(tl.int32)
    return tl.sum(hits, 0)


@triton.jit(do_not_specialize=["num_rows", "k"])
def _select_kernel(
    logits_ptr,
    values_ptr,
    ids_ptr,
    rest_ptr,
    candidates_ptr,
    list_ptr,
    num_rows,
    num_valid,
    k,
    row_stride,
    room,
    inverse,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    CAP: tl.constexpr,
):
    TILE: tl.constexpr = GROUPS * WIDTH
    PLACES: tl.constexpr = 128
    RANKED: tl.constexpr = 8
    places, rank_of = tl.arange(0, PLACES), tl.arange(0, RANKED)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    candidates = candidates_ptr + program * room
    list_ = list_ptr + program * CAP
    group = tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    within = tl.arange(0, WIDTH)[None, :]
    depth = (num_valid + TILE - 1) // TILE
    limit = k + k // 4 + 4
    for turn in range(0, (num_rows - tl.program_id(0) + programs - 1) // programs):
        row = program + turn * programs
        logits = logits_ptr + row * row_stride
        max_, sum_, moment = _scan_row(logits, logits, num_valid, inverse, GROUPS, WIDTH, False)

        # A lower bound of the k-th key, as soon as not many more than k groups reach it.
        key = tl.where(max_ > _LOWEST, _order_key(max_), _KEY_OF_MINUS_INF)
        low, high, reached = tl.min(key, 0), tl.max(key, 0), GROUPS
        low = tl.where(k > GROUPS, _KEY_OF_MINUS_INF, low)
        while (low < high) & (reached > limit):
            middle = _middle(low, high)
            count = tl.sum((key >= middle).to(tl.int32), 0)
            reached = tl.where(count >= k, count, reached)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count >= k, high, middle - 1)

        # Columns of the groups that reach it: candidates, or part of the rest in lanes of its own.
        lane_max = tl.full([LANES], _LOWEST, tl.float32)
        lane_sum, lane_moment = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        found = CAP + 1
        if reached <= CAP:
            open_ = key >= low
            tl.store(list_ + tl.cumsum(open_.to(tl.int32), 0) - 1, group, mask=open_)
            max_, sum_, moment = (
                tl.where(open_, _LOWEST, max_),
                tl.where(open_, 0.0, sum_),
                tl.where(open_, 0.0, moment),
            )
            # The list of candidates passes between lanes through memory.
            tl.debug_barrier()
            found = 0
            for start in range(0, reached * depth, LANES):
                place = start + lane
                listed = place // depth
                first = (place - listed * depth) * TILE + tl.load(
                    list_ + listed, mask=listed < reached, other=0
                ) * WIDTH
                column = first[:, None] + within
                inside = (listed < reached)[:, None] & (column < num_valid)
                raw = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
                score_key = _order_key(raw * inverse)
                hit = inside & (score_key >= low)
                lane_max, lane_sum, lane_moment = _fold(
                    tl.where(hit, float("-inf"), raw), inverse, lane_max, lane_sum, lane_moment
                )
                hits = hit.to(tl.int32)
                of_lane = tl.sum(hits, 1)
                ends = tl.cumsum(of_lane, 0)
                to = found + (ends - of_lane)[:, None] + tl.cumsum(hits, 1) - 1
                tl.store(candidates + to, _packed(score_key, column), mask=hit & (to < CAP))
                found += tl.max(ends, 0)

        # Too many candidates: find the exact k-th key of the row, then take all columns above the
        # key and the first columns at the key.
        if found > CAP:
            max_ = tl.full([GROUPS], _LOWEST, tl.float32)
            sum_, moment = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
            lane_max = tl.full([LANES], _LOWEST, tl.float32)
            lane_sum, lane_moment = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
            high, above = _KEY_OF_NAN, 0
            # The list of candidates is written again from its start.
            tl.debug_barrier()
            # A tie at the bound is the likely cause, so it is tested first.
            middle = low + 1
            while low < high:
                count = _count(logits, num_valid, inverse, middle, GROUPS, WIDTH)
                above = tl.where(count >= k, above, count)
                low = tl.where(count >= k, middle, low)
                high = tl.where(count >= k, high, middle - 1)
                middle = _middle(low, high)
            # The numbers of columns above the key and at the key so far.
            more, equal = 0, 0
            for start in range(0, num_valid, LANES * WIDTH):
                column = start + lane[:, None] * WIDTH + within
                inside = column < num_valid
                raw = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
                score_key = _order_key(raw * inverse)
                over = inside & (score_key > low)
                # two counts in one scan
                hits = over.to(tl.int32) + ((inside & (score_key == low)).to(tl.int32) << 16)
                of_lane = tl.sum(hits, 1)
                before = (tl.cumsum(of_lane, 0) - of_lane)[:, None] + tl.cumsum(hits, 1)
                tie = equal + ((before >> 16) & 0xFFFF) - 1
                chosen = over | (inside & (score_key == low) & (above + tie < k))
                to = tl.where(over, more + (before & 0xFFFF) - 1, above + tie)
                tl.store(candidates + to, _packed(score_key, column), mask=chosen)
                lane_max, lane_sum, lane_moment = _fold(
                    tl.where(chosen, float("-inf"), raw), inverse, lane_max, lane_sum, lane_moment
                )
                hits_here = tl.sum(of_lane, 0)
                more += hits_here & 0xFFFF
                equal += (hits_here >> 16) & 0xFFFF
            found = k
        # the last tile of the count below needs no mask
        tl.store(candidates + found + rank_of, _NOTHING)
        tl.debug_barrier()

        # Rank by counting: the first k go out, the others join the rest.
        left_max = tl.full([PLACES], _LOWEST, tl.float32)
        left_sum, left_moment = tl.zeros([PLACES], tl.float32), tl.zeros([PLACES], tl.float32)
        for start in range(0, found, PLACES):
            place = start + places
            mine = tl.load(candidates + place, mask=place < found, other=_NOTHING)
            ahead = tl.zeros([RANKED, PLACES], tl.int32)
            for first in range(0, found, RANKED):
                theirs = tl.load(candidates + first + rank_of)
                ahead += (theirs[:, None] > mine[None, :]).to(tl.int32)
            rank = tl.sum(ahead, 0)
            score = _score_of((mine >> 32).to(tl.int32))
            out = row * k + rank
            chosen = (place < found) & (rank < k)
            tl.store(values_ptr + out, score, mask=chosen)
            tl.store(ids_ptr + out, 0x7FFFFFFF - (mine & 0x7FFFFFFF).to(tl.int32), mask=chosen)
            left = tl.where((place < found) & (rank >= k), score, float("-inf"))
            left_max, left_sum, left_moment = _fold(left[:, None], 1.0, left_max, left_sum, left_moment)

        rest = _merge(_collapse(max_, sum_, moment), _collapse(lane_max, lane_sum, lane_moment))
        rest = _merge(rest, _collapse(left_max, left_sum, left_moment))
        _store_rest(rest_ptr, row, num_rows, rest)
        # The barrier is needed because the next row writes where this row was read.
        tl.debug_barrier()


# gather and gradient_ -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_ids"])
def _gather_kernel(
    logits_ptr,
    ids_ptr,
    values_ptr,
    rest_ptr,
    marks_ptr,
    num_rows,
    num_valid,
    num_ids,
    row_stride,
    num_words,
    inverse,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    MARKED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    marks = marks_ptr + program * num_words
    lane = tl.arange(0, LANES)
    for turn in range(0, (num_rows - tl.program_id(0) + programs - 1) // programs):
        row = program + turn * programs
        logits = logits_ptr + row * row_stride
        if MARKED:
            for start in range(0, num_ids, LANES):
                at = row * num_ids + start + lane
                inside = start + lane < num_ids
                chosen = tl.load(ids_ptr + at, mask=inside, other=-1)
                raw = tl.load(logits + chosen, mask=chosen >= 0, other=0.0).to(tl.float32)
                tl.store(values_ptr + at, raw * inverse, mask=inside)
                tl.atomic_or(
                    marks + chosen // 32, 1 << (chosen % 32), mask=chosen >= 0, sem="relaxed", scope="cta"
                )
            tl.debug_barrier()
        max_, sum_, moment = _scan_row(logits, marks, num_valid, inverse, GROUPS, WIDTH, MARKED)
        _store_rest(rest_ptr, row, num_rows, _collapse(max_, sum_, moment))
        if MARKED:
            # After the barrier every lane has read the marks.
            tl.debug_barrier()
            for start in range(0, num_ids, LANES):
                chosen = tl.load(
                    ids_ptr + row * num_ids + start + lane, mask=start + lane < num_ids, other=-1
                )
                tl.store(marks + chosen // 32, 0, mask=chosen >= 0)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["num_ids"])
def _gradient_kernel(
    logits_ptr,
    out_ptr,
    ids_ptr,
    chosen_ptr,
    scale_ptr,
    ref_ptr,
    num_columns,
    num_valid,
    num_ids,
    row_stride,
    out_stride,
    inverse,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    blocks = (num_columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    column = first + tl.arange(0, BLOCK)
    raw = tl.load(logits_ptr + row * row_stride + column, mask=column < num_valid, other=float("-inf")).to(
        tl.float32
    )
    shift = tl.minimum(raw * inverse - tl.load(ref_ptr + row), 0.0, propagate_nan=_NAN)
    value = tl.load(scale_ptr + row) * _exp(shift)
    out = out_ptr + row * out_stride
    tl.store(
        out + column,
        tl.where(column < num_valid, value, 0.0).to(out_ptr.dtype.element_ty),
        mask=column < num_columns,
    )
    # After the barrier, chosen columns get their own gradient instead.
    tl.debug_barrier()
    for start in range(0, num_ids, LANES):
        at = start + tl.arange(0, LANES)
        place = tl.load(ids_ptr + row * num_ids + at, mask=at < num_ids, other=-1)
        mine = (place >= first) & (place < first + BLOCK)
        chosen = tl.load(chosen_ptr + row * num_ids + at, mask=mine, other=0.0)
        tl.store(out + place, chosen.to(out_ptr.dtype.element_ty), mask=mine)


# The exact divergence -----------------------------------------------------------------------------


@triton.jit
def _logp(logits, column, inside, inverse, max_, logsum):
    return (
        tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse - max_
    ) - logsum


@triton.jit
def _full_sums_kernel(
    student_ptr,
    teacher_ptr,
    student_max_ptr,
    student_logsum_ptr,
    teacher_max_ptr,
    teacher_logsum_ptr,
    sums_ptr,
    num_valid,
    student_stride,
    teacher_stride,
    student_inverse,
    teacher_inverse,
    beta,
    clip,
    END: tl.constexpr,
    CLIPPED: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student, teacher = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    student_max, student_logsum = tl.load(student_max_ptr + row), tl.load(student_logsum_ptr + row)
    teacher_max, teacher_logsum = tl.load(teacher_max_ptr + row), tl.load(teacher_logsum_ptr + row)
    divergence, total, plogp = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    for start in range(0, num_valid, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Outside the true columns both scores are -inf, which adds nothing.
        inside = column < num_valid
        a = _logp(student, column, inside, student_inverse, student_max, student_logsum)
        b = _logp(teacher, column, inside, teacher_inverse, teacher_max, teacher_logsum)
        phi, w, p, logp = _terms(a, b, beta, clip, END, CLIPPED, DEEP)
        divergence += phi
        total += w
        plogp += p * logp
    tl.store(sums_ptr + 3 * row, tl.sum(divergence, 0))
    tl.store(sums_ptr + 3 * row + 1, tl.sum(total, 0))
    tl.store(sums_ptr + 3 * row + 2, tl.sum(plogp, 0))


@triton.jit
def _full_gradient_kernel(
    student_ptr,
    teacher_ptr,
    student_max_ptr,
    student_logsum_ptr,
    teacher_max_ptr,
    teacher_logsum_ptr,
    upstream_ptr,
    coefficient_ptr,
    out_ptr,
    num_columns,
    num_valid,
    student_stride,
    teacher_stride,
    out_stride,
    student_inverse,
    teacher_inverse,
    beta,
    clip,
    END: tl.constexpr,
    CLIPPED: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (num_columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    student, teacher = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    inside = column < num_valid
    a = _logp(
        student,
        column,
        inside,
        student_inverse,
        tl.load(student_max_ptr + row),
        tl.load(student_logsum_ptr + row),
    )
    b = _logp(
        teacher,
        column,
        inside,
        teacher_inverse,
        tl.load(teacher_max_ptr + row),
        tl.load(teacher_logsum_ptr + row),
    )
    _, w, p, _ = _terms(a, b, beta, clip, END, CLIPPED, DEEP)
    value = tl.load(upstream_ptr + row) * w + tl.load(coefficient_ptr + row) * p
    value = tl.where(inside, value, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, value, mask=column < num_columns)


# Sizes --------------------------------------------------------------------------------------------


def select_sizes(k: int) -> dict[str, int]:
    """Compile-time sizes of the select kernel, and num_warps.

    GROUPS: a tenth of them is read twice at k = 100; 4 in each thread keep registers at 80 for
    float32, so that 3 programs share a multiprocessor. WIDTH: 16 bytes of float32 to a load; wider
    runs would need more registers. CAP: the candidates of a row whose large logits stand in runs of
    WIDTH still fit.
    """
    groups = min(max(1024, triton.next_power_of_2(4 * k)), 4096)
    cap = min(max(512, triton.next_power_of_2(4 * k)), 4096)
    return {"GROUPS": groups, "WIDTH": 4, "LANES": groups // 4, "CAP": cap, "num_warps": groups // 128}


def gather_sizes() -> dict[str, int]:
    """Compile-time sizes of the gather kernel: a tile of 16 kB in float32.

    64 bytes per thread are under way, and as many again prefetched, at 80 registers.
    """
    return {"GROUPS": 1024, "WIDTH": 4, "LANES": 256, "num_warps": 8}


def gradient_sizes(itemsize: int) -> dict[str, int]:
    """Compile-time sizes of the gradient kernel: a block of 16 kB per program.

    A program has no loop, so the many programs of a multiprocessor hide the latency.
    """
    return {"BLOCK": 16384 // itemsize, "LANES": 256, "num_warps": 8}


def full_sizes() -> dict[str, int]:
    """8 columns per thread, so that two rows and the divergence's temporaries fit its registers."""
    return {"BLOCK": 2048, "num_warps": 8}


def full_modes(beta: float, clip: float | None) -> dict[str, int | bool]:
    """Compile-time shape of the divergence. DEEP: log1p may get arguments below -0.5."""
    return {"END": int(beta) if beta in (0.0, 1.0) else -1, "CLIPPED": clip is not None, "DEEP": beta != 0.5}


def _num_programs(logits_TV: Tensor, per_multiprocessor: int) -> int:
    """The number of programs that walk over the rows: so few that their scratch stays in L2."""
    # Triton's interpreter
    if not logits_TV.is_cuda:
        return min(logits_TV.shape[0], 3)
    return min(
        logits_TV.shape[0],
        torch.cuda.get_device_properties(logits_TV.device).multi_processor_count * per_multiprocessor,
    )


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"the Triton kernels read bfloat16, float16 and float32; {name} is {tensor.dtype}"
            )
        if tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            raise ValueError(
                f"{name} must be [T, V] with contiguous columns, got shape {tuple(tensor.shape)}, strides"
                f" {tensor.stride()}"
            )


def _inverse(temperature: float) -> float:
    """1 / temperature, rounded once."""
    return float(np.float32(1.0 / temperature))


def _words(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype).contiguous()


# The functions ------------------------------------------------------------------------------------


def select(logits_TV: Tensor, k: int, *, num_valid: int, temperature: float) -> tuple[Tensor, Tensor, Rest]:
    """Select the k first true columns of each token, by score descending, then id ascending.

    Returns (values_TK, ids_TK, rest). values are scores (float32), ids int32 local columns, rest
    the statistics of the true columns that were not selected. ValueError unless 1 <= k <=
    num_valid. The result is exact for any k; the kernel is made for k <= 1024.
    """
    if not 1 <= k <= num_valid:
        raise ValueError(f"k must lie in [1, {num_valid}], got {k}")
    _check(logits=logits_TV)
    num_rows, device = logits_TV.shape[0], logits_TV.device
    values_TK = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    ids_TK = torch.empty(num_rows, k, dtype=torch.int32, device=device)
    rest_3T = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    if num_rows:
        sizes = select_sizes(k)
        # Several waves of programs run: the registers that the compiler took decide how many
        # programs are resident. The 16 more places of `room` are the padding of the last tile of
        # the count.
        programs, room = _num_programs(logits_TV, 12), max(k, sizes["CAP"]) + 16
        candidates = torch.empty(programs, room, dtype=torch.int64, device=device)
        lists = torch.empty(programs, sizes["CAP"], dtype=torch.int32, device=device)
        with torch.cuda.device_of(logits_TV):
            _select_kernel[(programs,)](
                logits_TV,
                values_TK,
                ids_TK,
                rest_3T,
                candidates,
                lists,
                num_rows,
                num_valid,
                k,
                logits_TV.stride(0),
                room,
                _inverse(temperature),
                **sizes,
            )
    return values_TK, ids_TK, Rest(*rest_3T)


def gather(logits_TV: Tensor, ids_TA: Tensor, *, num_valid: int, temperature: float) -> tuple[Tensor, Rest]:
    """Read the scores of the chosen columns, and statistics of the other true columns.

    Returns (values_TA, rest). ids_TA: int32 local columns, or -1 for an id that is not on this
    rank, which gets the value 0. The ids of a token are distinct apart from -1; A may be 0.
    """
    _check(logits=logits_TV)
    (num_rows, num_ids), device = ids_TA.shape, logits_TV.device
    ids_TA = _words(ids_TA, torch.int32)
    values_TA = torch.empty(num_rows, num_ids, dtype=torch.float32, device=device)
    rest_3T = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    if num_rows:
        sizes = gather_sizes()
        programs, num_words = _num_programs(logits_TV, 3), triton.cdiv(max(num_valid, 1), 32)
        # marks holds a bit per column. Each row clears the bits that it has set.
        marks = torch.zeros(programs, num_words, dtype=torch.int32, device=device)
        with torch.cuda.device_of(logits_TV):
            _gather_kernel[(programs,)](
                logits_TV,
                ids_TA,
                values_TA,
                rest_3T,
                marks,
                num_rows,
                num_valid,
                num_ids,
                logits_TV.stride(0),
                num_words,
                _inverse(temperature),
                MARKED=num_ids > 0,
                **sizes,
            )
    return values_TA, Rest(*rest_3T)


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
    in padded columns. It goes in place into the logits, or into `out` ([T, V] in bfloat16, float16
    or float32). ref_T is finite and not below any unchosen score.
    """
    out = logits_TV if out is None else out
    _check(logits=logits_TV, out=out)
    num_rows, num_columns = logits_TV.shape
    if num_rows and num_columns:
        sizes = gradient_sizes(logits_TV.element_size())
        with torch.cuda.device_of(logits_TV):
            _gradient_kernel[(num_rows * triton.cdiv(num_columns, sizes["BLOCK"]),)](
                logits_TV,
                out,
                _words(ids_TA, torch.int32),
                _words(chosen_TA),
                _words(scale_T),
                _words(ref_T),
                num_columns,
                num_valid,
                ids_TA.shape[1],
                logits_TV.stride(0),
                out.stride(0),
                _inverse(temperature),
                **sizes,
            )


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
    _check(student=student_TV, teacher=teacher_TV)
    sums_T3 = torch.empty(student_TV.shape[0], 3, dtype=torch.float32, device=student_TV.device)
    if len(sums_T3):
        with torch.cuda.device_of(student_TV):
            _full_sums_kernel[(len(sums_T3),)](
                student_TV,
                teacher_TV,
                *map(_words, (*student_norm, *teacher_norm)),
                sums_T3,
                num_valid,
                student_TV.stride(0),
                teacher_TV.stride(0),
                _inverse(temperature),
                _inverse(teacher_temperature),
                float(beta),
                float("inf") if clip is None else float(clip),
                **full_modes(beta, clip),
                **full_sizes(),
            )
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
    _check(student=student_TV, teacher=teacher_TV, out=out)
    num_rows, num_columns = student_TV.shape
    if num_rows and num_columns:
        sizes = full_sizes()
        with torch.cuda.device_of(student_TV):
            _full_gradient_kernel[(num_rows * triton.cdiv(num_columns, sizes["BLOCK"]),)](
                student_TV,
                teacher_TV,
                *map(_words, (*student_norm, *teacher_norm, upstream_T, coefficient_T)),
                out,
                num_columns,
                num_valid,
                student_TV.stride(0),
                teacher_TV.stride(0),
                out.stride(0),
                _inverse(temperature),
                _inverse(teacher_temperature),
                float(beta),
                float("inf") if clip is None else float(clip),
                **full_modes(beta, clip),
                **sizes,
            )
