"""Divergence of a student from a teacher over a few buckets: forward KL, reverse KL, generalised Jensen-Shannon.

T tokens, B buckets: the chosen tokens and, with a tail, all the rest (ops/readout.py makes them). Replicated work, no process group.

With S student, T teacher (constant), M = beta T + (1 - beta) S; beta is the weight of the teacher (alpha in SDPO 2601.20802, beta in GKD
2306.13649):

    beta = 0      KL(T || S)                                      forward, mode covering
    0 < beta < 1  beta KL(T || M) + (1 - beta) KL(S || M)         M is not detached; beta = 1/2 is the ordinary JSD
    beta = 1      KL(S || T)                                      reverse, mode seeking

The ends are not the limits of the middle, which tends to 0: a small beta is a small loss, not almost a KL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.ops.pointwise import divergence_terms


class _Divergence(torch.autograd.Function):
    """The gradient in the student's log-probabilities is w of ops/pointwise.py; autograd through exp and log would give NaN at log 0."""

    @staticmethod
    def forward(ctx, student_logq_TB, teacher_logq_TB, beta, normalised, clip):
        phi_TB, w_TB = divergence_terms(student_logq_TB, teacher_logq_TB, beta=beta, normalised=normalised, clip=clip)
        ctx.save_for_backward(w_TB)
        return phi_TB.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        (w_TB,) = ctx.saved_tensors
        return grad_T[:, None] * w_TB, None, None, None, None


def divergence(student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, beta: float, normalised: bool, clip: float | None = None) -> Tensor:
    """Per-token divergence [T] in nats, of the dtype of the inputs; see the head of the file for beta.

    normalised: True when the buckets of both sum to one (tail "bucket" or "renormalise"): the loss is then >= 0 at any precision, and the
    gradient in the log-probabilities is right up to a multiple of p, which no normalised student can feel. False (tail "raw"): the plain
    truncated sums, which may be negative at beta 0 and 1. Never NaN: buckets of probability zero (-inf) are legal, an infinite KL is +inf.
    clip (nats): upper bound of each bucket's plain summand, without gradient where it acts (OPSD 2601.18734). The teacher gets no gradient.
    """
    if student_logq_TB.shape != teacher_logq_TB.shape:
        raise ValueError(
            f"student buckets {tuple(student_logq_TB.shape)} and teacher buckets {tuple(teacher_logq_TB.shape)} differ in shape"
        )
    return _Divergence.apply(student_logq_TB, teacher_logq_TB.detach(), beta, normalised, clip)
