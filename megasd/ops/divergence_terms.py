"""Forward KL, reverse KL and generalised Jensen-Shannon, one bin at a time, without a subtraction
that cancels.

With a = log p (student), b = log q (teacher), m = beta q + (1 - beta) p, everything is written in
hi = max(p, q), d = |a - b| and e = exp(-d) - 1, which lies in (-1, 0], so nothing overflows. With g
the weight of the smaller of p and q in m (beta when p >= q):

    0 < beta < 1   beta q log(q/m) + (1 - beta) p log(p/m) = -hi (g (1 + e) d + (1 + g e) log1p(g e))
    beta = 0       q log(q/p) + p - q  =  hi (e + d)  if q > p,  -hi (e + (1 + e) d)  else
    beta = 1       p log(p/q) + q - p  =  the same with p and q exchanged

Each is >= 0 in every bin, and p - q sums to zero over bins that are normalised. So a sum over bins
is never negative, and nearly equal distributions keep the accuracy of d, where the published form
(1 - sum for the tail, products of logarithms) loses it.

The gradient goes with respect to a = log p: w = p dD/dp, that is (1 - beta) p log(p/m), p - q (beta
0) and p log(p/q) (beta 1). For normalised bins a multiple of p has been added to the last two,
which no normalised student can feel and which keeps them accurate near p = q.

Orientation (GKD 2306.13649, SDPO 2601.20802): beta is the weight of the teacher; the ends are not
the limits of the interior.
"""

from __future__ import annotations

import torch
from torch import Tensor

# stands for log 0: finite, so that 0 * log 0 is 0 and not NaN
_FLOOR = -1e30
# buffers that divergence_terms works in
SCRATCH = 7


def divergence_terms(
    student_logq: Tensor,
    teacher_logq: Tensor,
    *,
    beta: float,
    normalised: bool,
    clip: float | None = None,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(phi, w): each bin's share of the divergence and its derivative in the student's
    log-probability. Same shape and dtype as the inputs.

    normalised: both arguments sum to one over their bins (see the head of the file); otherwise the
    plain summands, which may be negative at beta 0 and 1. clip (nats): upper bound of each plain
    summand, whose gradient is 0 where it acts (OPSD 2601.18734); it implies plain summands, so the
    clipped sum may be negative at beta 0 and 1. Bins of probability zero (-inf) are legal: the
    interior stays finite, a KL that is infinite is +inf (or `clip`), never NaN; w of KL(q||p) stays
    finite. scratch: [SCRATCH, *shape] to work and return in, for callers in a loop; None:
    allocated. ValueError for a beta outside [0, 1]. No collective, no autograd.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is the teacher's weight in the mixture and lies in [0, 1], got {beta}")
    buffers = student_logq.new_empty(SCRATCH, *student_logq.shape) if scratch is None else scratch
    a, x, hi, d, e, low, free = buffers.unbind(0)
    torch.clamp(student_logq, min=_FLOOR, out=a)
    torch.clamp(teacher_logq, min=_FLOOR, out=x)
    torch.maximum(a, x, out=hi).exp_()
    torch.sub(a, x, out=x)
    torch.abs(x, out=d)
    torch.neg(d, out=e).expm1_()
    # the smaller of p and q
    torch.add(e, 1.0, out=low).mul_(hi)
    if 0.0 < beta < 1.0:
        phi, w = _mixed(a, x, hi, d, e, low, free, beta)
    else:
        phi, w = _one_sided(x, hi, d, e, low, beta, plain=clip is not None or not normalised)
        zero, mass = (student_logq, teacher_logq) if beta == 0.0 else (teacher_logq, student_logq)
        # a GPU is not asked, which would wait for it
        if zero.is_cuda or (zero == -torch.inf).any():
            phi = torch.where((zero == -torch.inf) & (mass > -torch.inf), torch.inf, phi)
    if clip is not None:
        clipped = phi > clip
        phi, w = phi.masked_fill_(clipped, clip), w.masked_fill_(clipped, 0.0)
    return phi, w


def _mixed(
    a: Tensor, x: Tensor, hi: Tensor, d: Tensor, e: Tensor, low: Tensor, log_mix: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """0 < beta < 1; overwrites its arguments."""
    g = beta if beta == 0.5 else torch.full_like(d, 1.0 - beta).masked_fill_(x >= 0, beta)
    torch.mul(e, g, out=log_mix)
    # m / hi
    torch.add(log_mix, 1.0, out=e)
    log_mix.log1p_()
    phi = hi.mul_(e).mul_(log_mix).add_(low.mul_(d).mul_(g)).neg_().clamp_(min=0.0)
    # log(p / m) = -log_mix, less d where q > p
    w = x.clamp_(max=0.0).neg_().add_(log_mix).mul_(a.exp_()).mul_(beta - 1.0)
    return phi, w


def _one_sided(
    x: Tensor, hi: Tensor, d: Tensor, e: Tensor, low: Tensor, beta: float, *, plain: bool
) -> tuple[Tensor, Tensor]:
    """The two KL divergences, beta 0 and 1."""
    student_is_hi = x >= 0
    p, q = torch.where(student_is_hi, hi, low), torch.where(student_is_hi, low, hi)
    if plain:
        return (-q * x, -q) if beta == 0.0 else (p * x, p * x + p)
    # KL(T||S): large terms where the teacher is the larger
    first = ~student_is_hi if beta == 0.0 else student_is_hi
    phi = torch.where(first, hi * (e + d), -(hi * e + low * d)).clamp_(min=0.0)
    return phi, torch.where(student_is_hi, -hi * e, hi * e) if beta == 0.0 else p * x
