"""Divergence of a student from a teacher over a few buckets.

T tokens, B buckets: the chosen tokens and, with a tail, all the rest (ops/vocab_parallel.py makes
them). Every tensor-parallel rank does the same work on the same values: no process group.

`DIVERGENCES` names them. "mixture" is, with S the student, T the teacher (constant) and M = beta T
+ (1 - beta) S, where beta is the weight of the teacher (alpha in SDPO 2601.20802, beta in GKD
2306.13649):

    beta = 0      KL(T || S)                              forward, mode covering
    0 < beta < 1  beta KL(T || M) + (1 - beta) KL(S || M)
                  M is not detached; beta = 1/2 is the ordinary Jensen-Shannon divergence
    beta = 1      KL(S || T)                              reverse, mode seeking

The ends are not the limits of the middle, which tends to 0: a small beta is a small loss, not
almost a KL. "adaptive" is a mixture of the two ends (AKL 2404.02657).

What other files ask of a divergence: config/variants.py, DIVERGENCE_TRAITS. Its twin for the tests,
in float64: tests/reference.py, DIVERGENCES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.config.schema import DistillTerm
from megasd.ops.divergence_terms import divergence_terms

# share of the teacher's mass that is its head (AKL)
_HEAD_MASS = 0.5


class _Divergence(torch.autograd.Function):
    """The gradient in the student's log-probabilities is w of ops/divergence_terms.py; autograd
    through exp and log would give NaN at log 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logq_TB: Tensor,
        teacher_logq_TB: Tensor,
        beta: float,
        normalised: bool,
        clip: float | None,
    ) -> Tensor:
        phi_TB, w_TB = divergence_terms(
            student_logq_TB, teacher_logq_TB, beta=beta, normalised=normalised, clip=clip
        )
        ctx.save_for_backward(w_TB)
        return phi_TB.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        (w_TB,) = ctx.saved_tensors
        return grad_T[:, None] * w_TB, None, None, None, None


def divergence(
    student_logq_TB: Tensor,
    teacher_logq_TB: Tensor,
    *,
    beta: float,
    normalised: bool,
    clip: float | None = None,
) -> Tensor:
    """The "mixture" of the head of the file: [T] in nats, of the dtype of the inputs.

    normalised: True when the buckets of both sum to one (tail "bucket" or "renormalise"): the loss
    is then >= 0 at any precision, and the gradient in the log-probabilities is right up to a
    multiple of p, which no normalised student can feel. False (tail "raw"): the plain truncated
    sums, which may be negative at beta 0 and 1. Never NaN: buckets of probability zero (-inf) are
    legal, an infinite KL is +inf. clip (nats): upper bound of each bucket's plain summand, without
    gradient where it acts (OPSD 2601.18734). The teacher gets no gradient.
    """
    if student_logq_TB.shape != teacher_logq_TB.shape:
        raise ValueError(
            f"student buckets {tuple(student_logq_TB.shape)} and teacher buckets"
            f" {tuple(teacher_logq_TB.shape)} differ in shape"
        )
    return _Divergence.apply(student_logq_TB, teacher_logq_TB.detach(), beta, normalised, clip)


def adaptive(student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, tail: str = "bucket") -> Tensor:
    """Adaptive KL [T] in nats (AKL 2404.02657): g_head / (g_head + g_tail) KL(T || S) + g_tail /
    (g_head + g_tail) KL(S || T).

    Head: the fewest buckets that hold half of the teacher's mass, the most likely first; g: sum |T
    - S| over head and over the rest. tail: distill.tail; with "bucket" the last one stands for all
    tokens off the support, so it joins the head last, and its gap is a lower bound of theirs. Where
    student and teacher agree, both shares are a half of 0. UNSURE: the paper does not say whether g
    gets a gradient; here it is detached, so the loss is a mixture of two divergences at each step.
    Infinite KLs as `divergence`.
    """
    forward_T, reverse_T = (
        divergence(student_logq_TB, teacher_logq_TB, beta=beta, normalised=tail != "raw")
        for beta in (0.0, 1.0)
    )
    head_T, rest_T = head_gaps(student_logq_TB, teacher_logq_TB, tail=tail)
    total_T = head_T + rest_T
    share_T = torch.where(total_T > 0, head_T / torch.where(total_T > 0, total_T, 1.0), 0.5)
    return torch.where(share_T > 0, share_T * forward_T, 0.0) + torch.where(
        share_T < 1, (1 - share_T) * reverse_T, 0.0
    )


@torch.no_grad()
def head_gaps(
    student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, tail: str = "bucket"
) -> tuple[Tensor, Tensor]:
    """(g_head_T, g_tail_T) of `adaptive`, constants."""
    p_TB, q_TB = student_logq_TB.exp(), teacher_logq_TB.exp()
    rank_TB = q_TB.clone()
    if tail == "bucket":
        rank_TB[:, -1] = -1.0
    order_TB = rank_TB.argsort(dim=-1, descending=True, stable=True)
    mass_TB = q_TB.gather(1, order_TB)
    gap_TB = (q_TB - p_TB).abs().gather(1, order_TB)
    # a bucket is in the head while those before it hold less than half
    head_TB = torch.nn.functional.pad(mass_TB.cumsum(-1)[:, :-1], (1, 0)) < _HEAD_MASS
    return torch.where(head_TB, gap_TB, 0.0).sum(-1), torch.where(head_TB, 0.0, gap_TB).sum(-1)


# (student_logq_TB, teacher_logq_TB, the term's constants) -> [T] nats, differentiable in the student
BucketDivergence = Callable[[Tensor, Tensor, DistillTerm], Tensor]


def _mixture(student_logq_TB: Tensor, teacher_logq_TB: Tensor, term: DistillTerm) -> Tensor:
    return divergence(
        student_logq_TB,
        teacher_logq_TB,
        beta=term.beta,
        normalised=term.tail != "raw",
        clip=term.pointwise_clip,
    )


def _adaptive(student_logq_TB: Tensor, teacher_logq_TB: Tensor, term: DistillTerm) -> Tensor:
    return adaptive(student_logq_TB, teacher_logq_TB, tail=term.tail)


DIVERGENCES: dict[str, BucketDivergence] = {
    "mixture": _mixture,
    "adaptive": _adaptive,
}
