"""Log-probabilities, entropy and the exact divergence of logits that are split over the vocabulary between tensor-parallel ranks.

T tokens, V local vocabulary slice, K top-k, B buckets = K + 1 (K without a tail). `vocab_size` is the true vocabulary: padded columns take
no part and get gradient zero. Logits may be bfloat16, float32 or float64 and are computed in at least float32; outputs are float32
(float64 for float64 logits). `tp_group` None or of size 1: no collective. The number of tokens must be the same on every rank of the group.

Convention: after the forward every rank of the group holds the same output, bitwise, and goes on to compute the same loss with scale 1. The
backward then needs no collective: each rank writes the gradient of its own columns from the upstream gradient that all of them share.
Never sum such a loss over tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.ops.pointwise import divergence_terms
from megasd.ops.shard import Shard, compute_dtype, finite, max_and_sum, shard_of

TAILS = ("bucket", "renormalise", "raw")


def _scores(logits_TV: Tensor, shard: Shard, temperature: float) -> Tensor:
    """A fresh copy of the true columns, in compute precision, over the temperature."""
    return logits_TV[:, : shard.num_valid].to(compute_dtype(logits_TV)) / temperature


def _check(logits_TV: Tensor, temperature: float) -> None:
    if logits_TV.dim() != 2:
        raise ValueError(f"logits must be [tokens, local vocabulary], got shape {tuple(logits_TV.shape)}; flatten the batch first")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _owned(ids_TK: Tensor, shard: Shard) -> Tensor:
    return (ids_TK >= shard.start) & (ids_TK < shard.start + shard.num_valid)


class _BucketLogprobs(torch.autograd.Function):
    """Let G = sum of the upstream gradient over the buckets. The gradient in a score z_v is

        v chosen:      g_v - p_v G
        v in the tail: (p_v / p_tail) (g_tail - p_tail G)      one scalar per token, and p_v / p_tail = exp(z_v - logsumexp of the tail)

    (g_tail = 0 for "raw"; for "renormalise" p is the renormalised one and the tail gets nothing). Saved: logits, ids, log-probs, 2 floats.
    """

    @staticmethod
    def forward(ctx, logits_TV, ids_TK, shard, tp_group, temperature, tail):
        num_tokens, k = ids_TK.shape
        scores_TV = _scores(logits_TV, shard, temperature)
        chosen_TK = scores_TV.new_zeros(num_tokens, k)
        rows, columns = _owned(ids_TK, shard).nonzero(as_tuple=True)
        local = ids_TK[rows, columns] - shard.start
        chosen_TK[rows, columns] = scores_TV[rows, local]
        scores_TV[rows, local] = -torch.inf  # what is left is this rank's part of the tail
        max_T, sum_T = max_and_sum(scores_TV)

        # Every word has one rank that contributes and zeros elsewhere, so the sum is exact and the same on all ranks.
        packed = scores_TV.new_zeros(num_tokens, k + 2 * shard.size)
        packed[:, :k] = chosen_TK
        packed[:, k + shard.rank], packed[:, k + shard.size + shard.rank] = max_T, sum_T
        if shard.size > 1:
            dist.all_reduce(packed, group=tp_group)
        chosen_TK, max_TR, sum_TR = packed.split([k, shard.size, shard.size], dim=1)

        tail_max_T = max_TR.amax(-1)
        tail_sum_T = (sum_TR * (max_TR - finite(tail_max_T)[:, None]).exp()).sum(-1)
        if tail == "renormalise":
            logq_TB = chosen_TK.log_softmax(-1)
        else:
            top_T = finite(torch.maximum(tail_max_T, chosen_TK.amax(-1)))
            log_tail_T = (tail_max_T - top_T) + tail_sum_T.log()
            buckets_TB = torch.cat([chosen_TK - top_T[:, None], log_tail_T[:, None]], dim=1)
            logq_TB = buckets_TB - buckets_TB.exp().sum(-1, keepdim=True).log()
        ctx.save_for_backward(logits_TV, ids_TK, logq_TB, tail_max_T, tail_sum_T)
        ctx.shard, ctx.temperature, ctx.tail = shard, temperature, tail
        return logq_TB[:, :k].clone() if tail == "raw" else logq_TB

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TB):
        logits_TV, ids_TK, logq_TB, tail_max_T, tail_sum_T = ctx.saved_tensors
        shard, k = ctx.shard, ids_TK.shape[1]
        total_T = grad_TB.sum(-1)
        chosen_TK = grad_TB[:, :k] - logq_TB[:, :k].exp() * total_T[:, None]

        grad_TV = torch.zeros_like(logits_TV)
        if ctx.tail != "renormalise":
            tail_T = -logq_TB[:, k].exp() * total_T
            if ctx.tail == "bucket":
                tail_T = tail_T + grad_TB[:, k]
            empty_T = tail_sum_T == 0
            scale_T = torch.where(empty_T, 0.0, tail_T / torch.where(empty_T, 1.0, tail_sum_T)) / ctx.temperature
            scores_TV = _scores(logits_TV, shard, ctx.temperature).sub_(finite(tail_max_T)[:, None])
            # A chosen column may lie above the tail's maximum: keep its exp finite, it is overwritten below.
            grad_TV[:, : shard.num_valid] = scores_TV.clamp_(max=0).exp_().mul_(scale_T[:, None])
        rows, columns = _owned(ids_TK, shard).nonzero(as_tuple=True)
        grad_TV[rows, ids_TK[rows, columns] - shard.start] = (chosen_TK[rows, columns] / ctx.temperature).to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None


def bucket_logprobs(
    logits_TV: Tensor,
    ids_TK: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    tail: str = "bucket",
) -> Tensor:
    """Log-probability (nats) of each chosen id, and of all the rest: [T, K + 1], or [T, K] for tail "renormalise" and "raw".

    ids_TK: distinct global ids below vocab_size (int64), the same on all ranks; they are constants, no gradient passes through the choice.
    tail "bucket": the rest of the vocabulary as one bucket, by log-sum-exp of the rest and never by 1 - sum (SDPO 2601.20802);
    "renormalise": log-softmax over the chosen ids alone; "raw": log-probabilities under the whole vocabulary, the rest dropped.
    Exact gradient with respect to logits_TV. Collectives: one all_reduce of K + 2 TP words per token forward, none backward.
    """
    _check(logits_TV, temperature)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if ids_TK.dim() != 2 or ids_TK.shape[0] != logits_TV.shape[0]:
        raise ValueError(f"ids must be [tokens, k] beside logits {tuple(logits_TV.shape)}, got {tuple(ids_TK.shape)}")
    shard = shard_of(logits_TV.shape[1], vocab_size, tp_group)
    return _BucketLogprobs.apply(logits_TV, ids_TK, shard, tp_group, temperature, tail)


def sampled_logp(
    logits_TV: Tensor, targets_T: Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup | None, temperature: float = 1.0
) -> Tensor:
    """Log-probability (nats) of targets_T (int64 global ids) under softmax(logits / temperature): [T], with its gradient.

    Collectives: one all_reduce of 1 + 2 TP words per token forward, none backward.
    """
    return bucket_logprobs(
        logits_TV, targets_T[:, None], vocab_size=vocab_size, tp_group=tp_group, temperature=temperature, tail="raw"
    ).squeeze(1)


def _gather_slots(values_TC: Tensor, shard: Shard, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[R, T, C]: the values of every rank, by one all_gather."""
    if shard.size == 1:
        return values_TC[None]
    gathered = values_TC.new_empty(shard.size * values_TC.shape[0], values_TC.shape[1])
    dist.all_gather_into_tensor(gathered, values_TC.contiguous(), group=tp_group)
    return gathered.view(shard.size, *values_TC.shape)


@torch.no_grad()
def entropy(logits_TV: Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup | None, temperature: float = 1.0) -> Tensor:
    """Entropy (nats) of softmax(logits / temperature): [T], no gradient. Collectives: one all_gather of 3 words per token."""
    _check(logits_TV, temperature)
    shard = shard_of(logits_TV.shape[1], vocab_size, tp_group)
    scores_TV = _scores(logits_TV, shard, temperature)
    max_T, sum_T = max_and_sum(scores_TV)
    shifted_TV = (scores_TV - finite(max_T)[:, None]).clamp_(min=torch.finfo(scores_TV.dtype).min)  # 0 * log 0 = 0
    first_T = (shifted_TV.exp() * shifted_TV).sum(-1)
    max_RT, sum_RT, first_RT = _gather_slots(torch.stack([max_T, sum_T, first_T], dim=1), shard, tp_group).unbind(-1)
    offset_RT = (max_RT - finite(max_RT.amax(0))).clamp(min=torch.finfo(scores_TV.dtype).min)
    scale_RT = offset_RT.exp()
    total_T = (scale_RT * sum_RT).sum(0)
    return total_T.log() - (scale_RT * (first_RT + offset_RT * sum_RT)).sum(0) / total_T


class _FullDivergence(torch.autograd.Function):
    """Gradient in a student score: w_v - p_v G, with w from pointwise.py and G = sum of w over the whole vocabulary. Recomputed from the
    two logits; saved beside them: the normalisers and G, 5 floats a token."""

    @staticmethod
    def forward(ctx, student_logits_TV, teacher_logits_TV, beta, shard, tp_group, temperature):
        student_TV, teacher_TV = _scores(student_logits_TV, shard, temperature), _scores(teacher_logits_TV, shard, temperature)
        local_TC = torch.stack([*max_and_sum(student_TV), *max_and_sum(teacher_TV)], dim=1)
        slots_RTC = _gather_slots(local_TC, shard, tp_group)
        stats = []  # max and log-sum of the student, then of the teacher
        for max_RT, sum_RT in ((slots_RTC[..., 0], slots_RTC[..., 1]), (slots_RTC[..., 2], slots_RTC[..., 3])):
            top_T = finite(max_RT.amax(0))
            stats += [top_T, (sum_RT * (max_RT - top_T).exp()).sum(0).log()]
        phi_TV, w_TV = _full_terms(student_TV, teacher_TV, stats, beta)[1:]
        sums_TC = torch.stack([phi_TV.sum(-1), w_TV.sum(-1)], dim=1)
        if shard.size > 1:
            dist.all_reduce(sums_TC, group=tp_group)
        ctx.save_for_backward(student_logits_TV, teacher_logits_TV, sums_TC[:, 1].clone(), *stats)
        ctx.beta, ctx.shard, ctx.temperature = beta, shard, temperature
        return sums_TC[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        student_logits_TV, teacher_logits_TV, total_T, *stats = ctx.saved_tensors
        student_TV, teacher_TV = (_scores(x, ctx.shard, ctx.temperature) for x in (student_logits_TV, teacher_logits_TV))
        logp_TV, _, w_TV = _full_terms(student_TV, teacher_TV, stats, ctx.beta)
        grad_TV = torch.zeros_like(student_logits_TV)
        local_TV = (w_TV - logp_TV.exp() * total_T[:, None]) * (grad_T / ctx.temperature)[:, None]
        grad_TV[:, : ctx.shard.num_valid] = local_TV.to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None


def _full_terms(student_TV: Tensor, teacher_TV: Tensor, stats: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student log-probabilities, phi and w of the local columns."""
    student_max_T, student_logsum_T, teacher_max_T, teacher_logsum_T = (s[:, None] for s in stats)
    student_logp_TV = (student_TV - student_max_T) - student_logsum_T
    teacher_logp_TV = (teacher_TV - teacher_max_T) - teacher_logsum_T
    return student_logp_TV, *divergence_terms(student_logp_TV, teacher_logp_TV, beta=beta, normalised=True)


def full_divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    beta: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
) -> Tensor:
    """Exact divergence over the whole vocabulary, beta as in loss/divergence.py: [T], with its gradient in the student's logits only.

    Collectives: one all_gather of 4 words and one all_reduce of 2 words per token forward, none backward. Never negative.
    """
    _check(student_logits_TV, temperature)
    if student_logits_TV.shape != teacher_logits_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_logits_TV.shape)} and teacher logits {tuple(teacher_logits_TV.shape)} differ in shape"
        )
    shard = shard_of(student_logits_TV.shape[1], vocab_size, tp_group)
    return _FullDivergence.apply(student_logits_TV, teacher_logits_TV.detach(), beta, shard, tp_group, temperature)
