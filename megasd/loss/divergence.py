"""Divergence of a student from a teacher over a few buckets.

T tokens, B buckets: the chosen tokens and, with a tail bucket, all other tokens together
(ops/vocab_parallel.py makes the buckets). Every tensor-parallel rank does the same work on the same
values: no process group.

`DIVERGENCES` has a row for each divergence. "mixture" is, with S the student, T the teacher
(constant) and M = beta T + (1 - beta) S, where beta is the weight of the teacher (alpha in SDPO
2601.20802, beta in GKD 2306.13649):

    beta = 0      KL(T || S)                              forward, mode covering
    0 < beta < 1  beta KL(T || M) + (1 - beta) KL(S || M)
                  M is not detached; beta = 1/2 is the ordinary Jensen-Shannon divergence
    beta = 1      KL(S || T)                              reverse, mode seeking

The KLs at beta 0 and 1 are not the limits of the formula for 0 < beta < 1, which tends to 0: a
small beta gives a small loss, not almost a KL. "adaptive" is a mixture of the KLs at beta 0 and 1
(AKL 2404.02657).

DIVERGENCE_TRAITS in config/variants.py says what the other files need to know about a divergence.
DIVERGENCES in tests/reference.py computes the same divergences in float64 for the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.config.schema import DistillTerm
from megasd.ops.divergence_terms import divergence_terms

# The head holds this fraction of the teacher's mass (AKL).
_HEAD_MASS = 0.5


class _Divergence(torch.autograd.Function):
    """The sum of phi over the buckets, with the gradient w of ops/divergence_terms.py.

    The gradient is written by hand, because autograd through exp and log would give NaN at log 0.
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
    """Compute the divergence "mixture" of each token: [T] in nats, of the dtype of the inputs.

    The formula stands at the head of the file. normalised: True says that the buckets of student
    and teacher each sum to one (tail "bucket" or "renormalise"). The loss is then >= 0 at any
    precision, and the gradient in the log-probabilities is right up to a multiple of p, which does
    not change the gradient of a normalised student. False (tail "raw") gives the plain truncated
    sums, which may be negative at beta 0 and 1. The loss is never NaN: buckets of probability zero
    (-inf) are legal, an infinite KL is +inf. clip (nats): upper bound of each bucket's plain
    summand, without gradient where the bound acts (OPSD 2601.18734). The teacher gets no gradient.
    ValueError for inputs of different shapes. No collective.
    """
    if student_logq_TB.shape != teacher_logq_TB.shape:
        raise ValueError(
            f"student buckets {tuple(student_logq_TB.shape)} and teacher buckets"
            f" {tuple(teacher_logq_TB.shape)} differ in shape"
        )
    return _Divergence.apply(student_logq_TB, teacher_logq_TB.detach(), beta, normalised, clip)


def adaptive(student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, tail: str = "bucket") -> Tensor:
    """Compute the adaptive KL of each token, [T] in nats (AKL 2404.02657).

    It is g_head / (g_head + g_tail) KL(T || S) + g_tail / (g_head + g_tail) KL(S || T). The head is
    the fewest buckets that hold half of the teacher's mass, the most likely first. g_head is the
    sum of |T - S| over the head, g_tail the sum over all other buckets. tail: distill.tail. With
    "bucket" the last bucket stands for all tokens off the support, so this bucket joins the head
    last, and its |T - S| is a lower bound of the sum of |T - S| over these tokens. Where student
    and teacher agree, both factors are one half, of KLs that are 0. UNSURE: the paper does not say
    whether g gets a gradient; here it is detached, so the loss is a mixture of two divergences at
    each step. An infinite KL is +inf, as in `divergence`.
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
    """Compute (g_head_T, g_tail_T) of `adaptive`, without gradient."""
    p_TB, q_TB = student_logq_TB.exp(), teacher_logq_TB.exp()
    rank_TB = q_TB.clone()
    if tail == "bucket":
        rank_TB[:, -1] = -1.0
    order_TB = rank_TB.argsort(dim=-1, descending=True, stable=True)
    mass_TB = q_TB.gather(1, order_TB)
    gap_TB = (q_TB - p_TB).abs().gather(1, order_TB)
    # A bucket is in the head while the buckets before it hold less than half of the mass.
    head_TB = torch.nn.functional.pad(mass_TB.cumsum(-1)[:, :-1], (1, 0)) < _HEAD_MASS
    return torch.where(head_TB, gap_TB, 0.0).sum(-1), torch.where(head_TB, 0.0, gap_TB).sum(-1)


# (student_logq_TB, teacher_logq_TB, the term's config) -> [T] nats, differentiable in the student.
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
