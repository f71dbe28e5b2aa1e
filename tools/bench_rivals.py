"""Losses of other projects, written again from their published formulas.

They hold tensors of the same sizes as the originals. T tokens, V columns of the whole vocabulary or
of a rank's slice, K top-k, h hidden. beta is the weight of the teacher. Metrics that a project
computes next to its loss are left out, and logits are moved in the precision they have: both favour
the rival.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class GatherColumns(torch.autograd.Function):
    """Gather [T, V / n] of each of n ranks to [T, V] on every rank.

    Every rank then computes the same loss, so the backward is this rank's slice.

    The gather is Megatron-core's (tensor_parallel/mappings.py, _gather_along_last_dim): an
    all_gather along the rows, then a concatenation; the backward without communication is that of
    miles-sdpo (loss_hub/losses.py). Collectives: one all_gather, forward.
    """

    @staticmethod
    def forward(ctx: Any, local_TV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.columns, ctx.rank = local_TV.shape[1], 0 if group is None else dist.get_rank(group)
        if group is None:
            return local_TV.view_as(local_TV)
        size = dist.get_world_size(group)
        gathered = local_TV.new_empty(size * local_TV.shape[0], local_TV.shape[1])
        dist.all_gather_into_tensor(gathered, local_TV.contiguous(), group=group)
        return torch.cat(gathered.chunk(size), dim=1)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor, None]:
        return grad_TV[:, ctx.rank * ctx.columns : (ctx.rank + 1) * ctx.columns].contiguous(), None


class CopyToRanks(torch.autograd.Function):
    """Identity whose backward adds up the hidden gradients of all ranks.

    A column-parallel output layer does the same. Collectives: one all_reduce, backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden_Th: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden_Th.view_as(hidden_Th)

    @staticmethod
    def backward(ctx: Any, grad_Th: Tensor) -> tuple[Tensor, None]:
        if ctx.group is not None:
            grad_Th = grad_Th.contiguous()
            dist.all_reduce(grad_Th, group=ctx.group)
        return grad_Th, None


def _with_tail(logp_TK: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: [T, K] -> [T, K + 1].

    It is log(1 - exp(logsumexp)), with the sum clamped below 1.
    """
    chosen_T1 = logp_TK.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logp_TK, (-chosen_T1.expm1()).log()], dim=1)


def _jsd_terms(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """Elementwise beta KL(T || M) + (1 - beta) KL(S || M), by autograd.

    M = beta T + (1 - beta) S, 0 < beta < 1: GKD 2306.13649, eq. 1.
    """
    mixture = torch.stack([student_logp + math.log(1 - beta), teacher_logp + math.log(beta)]).logsumexp(0)
    of_teacher = F.kl_div(mixture, teacher_logp, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student_logp, reduction="none", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def topk_self_distillation(student_TV: Tensor, teacher_TV: Tensor, k: int, beta: float) -> Tensor:
    """loss_T over the student's top k and a tail bucket, from whole rows of logits, in float32.

    SDPO 2601.20802 (verl/trainer/ppo/core_algos.py, compute_self_distillation_loss; top-k in
    workers/actor/dp_actor.py) and, the same formula, TRL (trl/experimental/sdft/loss_utils.py,
    compute_topk_self_distillation_loss).
    """
    student_TV, teacher_TV = student_TV.float(), teacher_TV.float()
    values_TK, ids_TK = student_TV.topk(k, dim=-1)
    student_logp_TK = values_TK - student_TV.logsumexp(-1, keepdim=True)
    teacher_logp_TK = teacher_TV.gather(1, ids_TK) - teacher_TV.logsumexp(-1, keepdim=True)
    return _jsd_terms(_with_tail(student_logp_TK), _with_tail(teacher_logp_TK), beta).sum(-1)


def generalized_jsd(student_TV: Tensor, teacher_TV: Tensor, beta: float) -> Tensor:
    """loss_T over the whole vocabulary: GKD 2306.13649.

    TRL has it in trl/trainer/gkd_trainer.py, generalized_jsd_loss.
    """
    return _jsd_terms(student_TV.float().log_softmax(-1), teacher_TV.float().log_softmax(-1), beta).sum(-1)


class TruncatedForwardKL(torch.autograd.Function):
    """loss_T = sum over the teacher's top k of q (log q - log p), on a rank's slice of the logits.

    There is neither a tail nor renormalisation.

    verl (verl/trainer/distillation/megatron/losses.py, _VocabParallelKLDivergence; NeMo RL's
    zero_outside_topk is kin to it): the float32 softmax of the slice is kept for the backward,
    whose value is p * sum(q) - q at the ids. Collectives, forward: all_reduce of the maximum, of
    the sum of exp and of the loss, 4 bytes a token each; backward: none. verl's overlap metrics are
    left out.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_TK: Tensor, logq_TK: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        def reduce(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
            if group is not None:
                dist.all_reduce(x, op=op, group=group)
            return x

        start = 0 if group is None else dist.get_rank(group) * logits_TV.shape[1]
        local_TK = ids_TK.long() - start
        here_TK = (local_TK >= 0) & (local_TK < logits_TV.shape[1])
        local_TK = local_TK.masked_fill(~here_TK, 0)
        q_TK = logq_TK.exp()
        p_TV = logits_TV.float() - reduce(logits_TV.amax(-1).float(), dist.ReduceOp.MAX)[:, None]
        chosen_TK = p_TV.gather(1, local_TK)
        sum_T = reduce(p_TV.exp_().sum(-1))
        p_TV.div_(sum_T[:, None])
        terms_TK = q_TK * (logq_TK - (chosen_TK - sum_T.log()[:, None]))
        loss_T = reduce(terms_TK.masked_fill(~here_TK, 0.0).sum(-1))
        ctx.save_for_backward(p_TV, q_TK.masked_fill(~here_TK, 0.0), local_TK, q_TK.sum(-1))
        ctx.dtype = logits_TV.dtype
        return loss_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        p_TV, q_TK, local_TK, mass_T = ctx.saved_tensors
        gradient_TV = p_TV * mass_T[:, None]
        gradient_TV.scatter_add_(1, local_TK, -q_TK)
        return gradient_TV.mul_(grad_T[:, None]).to(ctx.dtype), None, None, None


def liger_jsd(
    hidden_Th: Tensor,
    weight_Vh: Tensor,
    teacher_hidden_Th: Tensor,
    teacher_weight_Vh: Tensor,
    beta: float,
    chunk: int,
) -> Tensor:
    """Mean loss of Liger's chunked JSD, run from PyPI's liger-kernel; ImportError without it.

    It takes the whole vocabulary and has no tensor parallelism.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # torch.compile is its default; on a CPU it needs a C++ compiler and is left off.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        chunk_size=chunk,
        compiled=hidden_Th.device.type == "cuda",
    )
    labels_T = torch.zeros(hidden_Th.shape[0], dtype=torch.int64, device=hidden_Th.device)
    return loss(hidden_Th, weight_Vh, teacher_hidden_Th, teacher_weight_Vh, labels_T)
