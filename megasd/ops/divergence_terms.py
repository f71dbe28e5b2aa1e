"""Forward KL, reverse KL and generalised Jensen-Shannon divergence, one bin at a time.

No formula here subtracts nearly equal numbers, so nearly equal distributions keep their accuracy.
With a = log p (student), b = log q (teacher), m = beta q + (1 - beta) p, every formula is written
in hi = max(p, q), d = |a - b| and e = exp(-d) - 1, which lies in (-1, 0], so nothing overflows. With
g the weight of the smaller of p and q in m (beta when p >= q):

    0 < beta < 1   beta q log(q/m) + (1 - beta) p log(p/m) = -hi (g (1 + e) d + (1 + g e) log1p(g e))
    beta = 0       q log(q/p) + p - q  =  hi (e + d)  if q > p,  -hi (e + (1 + e) d)  else
    beta = 1       p log(p/q) + q - p  =  the same with p and q exchanged

Each formula is >= 0 in every bin, and p - q sums to zero over bins that are normalised. So a sum
over bins is never negative, and nearly equal distributions keep the accuracy of d. The published
form (1 - sum for the tail, products of logarithms) loses this accuracy.

The gradient is taken with respect to a = log p: w = p dD/dp, that is (1 - beta) p log(p/m)
(0 < beta < 1), p - q (beta 0) and p log(p/q) (beta 1). For normalised bins, w at beta 0 and at beta
1 has a multiple of p added to it. The added multiple keeps w accurate near p = q, and it does not
change the gradient of a student that is normalised.

Orientation (GKD 2306.13649, SDPO 2601.20802): beta is the weight of the teacher. The divergences at
beta 0 and 1 are not the limits of the divergences in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

# This value stands for log 0. It is finite, so that 0 * log 0 is 0 and not NaN.
_FLOOR = -1e30
# The number of buffers that divergence_terms works in.
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
    """Compute the divergence of each bin and its derivative in the student's log-probability.

    Returns (phi, w), of the shape and dtype of the inputs: phi is the summand of each bin, w its
    derivative.

    normalised: True says that both arguments sum to one over their bins (see the head of the file).
    With False, phi is the plain summands, which may be negative at beta 0 and 1. clip (nats): upper
    bound of each plain summand; w is 0 in bins where the bound acts (OPSD 2601.18734). A clip
    implies plain summands, so the clipped sum may be negative at beta 0 and 1. Bins of probability
    zero (-inf) are legal: phi stays finite for 0 < beta < 1; a KL that is infinite is +inf (or
    `clip`), never NaN; w of KL(q||p) stays finite. scratch: memory [SCRATCH, *shape] to work in,
    for callers in a loop; the results lie in it. None: the memory is allocated. ValueError for a
    beta outside [0, 1]. No collective, no autograd.
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
    # low becomes the smaller of p and q.
    torch.add(e, 1.0, out=low).mul_(hi)
    if 0.0 < beta < 1.0:
        phi, w = _mixed(a, x, hi, d, e, low, free, beta)
    else:
        phi, w = _one_sided(x, hi, d, e, low, beta, plain=clip is not None or not normalised)
        zero, mass = (student_logq, teacher_logq) if beta == 0.0 else (teacher_logq, student_logq)
        # On a GPU the test for zeros would make the host wait, so `where` always runs there.
        if zero.is_cuda or (zero == -torch.inf).any():
            phi = torch.where((zero == -torch.inf) & (mass > -torch.inf), torch.inf, phi)
    if clip is not None:
        clipped = phi > clip
        phi, w = phi.masked_fill_(clipped, clip), w.masked_fill_(clipped, 0.0)
    return phi, w


def _mixed(
    a: Tensor, x: Tensor, hi: Tensor, d: Tensor, e: Tensor, low: Tensor, log_mix: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Compute (phi, w) for 0 < beta < 1; the tensor arguments are overwritten."""
    g = beta if beta == 0.5 else torch.full_like(d, 1.0 - beta).masked_fill_(x >= 0, beta)
    torch.mul(e, g, out=log_mix)
    # e becomes m / hi.
    torch.add(log_mix, 1.0, out=e)
    log_mix.log1p_()
    phi = hi.mul_(e).mul_(log_mix).add_(low.mul_(d).mul_(g)).neg_().clamp_(min=0.0)
    # log(p / m) is -log_mix where p >= q, and -log_mix - d where q > p.
    w = x.clamp_(max=0.0).neg_().add_(log_mix).mul_(a.exp_()).mul_(beta - 1.0)
    return phi, w


def _one_sided(
    x: Tensor, hi: Tensor, d: Tensor, e: Tensor, low: Tensor, beta: float, *, plain: bool
) -> tuple[Tensor, Tensor]:
    """Compute (phi, w) of the two KL divergences, beta 0 and 1."""
    student_is_hi = x >= 0
    p, q = torch.where(student_is_hi, hi, low), torch.where(student_is_hi, low, hi)
    if plain:
        return (-q * x, -q) if beta == 0.0 else (p * x, p * x + p)
    # Bins of the first form: q > p for KL(T||S), p >= q for KL(S||T).
    first = ~student_is_hi if beta == 0.0 else student_is_hi
    phi = torch.where(first, hi * (e + d), -(hi * e + low * d)).clamp_(min=0.0)
    return phi, torch.where(student_is_hi, -hi * e, hi * e) if beta == 0.0 else p * x
