"""Forward KL, reverse KL and generalised Jensen-Shannon, one bin at a time, without a subtraction that cancels.

With a = log p (student), b = log q (teacher), x = a - b, m = beta q + (1 - beta) p and h(s) = s - log1p(s) >= 0, each bin contributes

    c1 q h(s1) + c2 p h(s2),   s1 = (1 - beta) expm1(x),  s2 = beta expm1(-x),   (c1, c2) = (beta, 1 - beta)

which is beta q log(q/m) + (1 - beta) p log(p/m) plus a term that is zero in every bin. (c1, c2) = (1, 0) at beta 0 and (0, 1) at
beta 1 give KL(q||p) and KL(p||q) plus p - q or q - p, which sum to zero when p and q are normalised. So no bin is ever negative, and
nearly equal distributions keep their relative accuracy, where the published form 1 - sum and log-ratio loses it.

The gradient goes with respect to a = log p: w = p dD/dp, that is (1 - beta) p log(p/m), p - q (beta 0) and p log(p/q) (beta 1). For
normalised bins a multiple of p has been added to the last two, which no normalised student can feel and which keeps them accurate near
p = q.

Orientation (GKD 2306.13649, SDPO 2601.20802): beta is the weight of the teacher; the ends are not the limits of the interior.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = -1e30  # stands for log 0: finite, so that 0 * log 0 is 0 and not NaN


def _log_mix(d: Tensor, weight: float, other: float) -> Tensor:
    """log(other + weight * exp(d)), weight + other = 1, without overflow and accurate near d = 0."""
    if weight == 1.0:
        return d
    near = torch.log1p(weight * torch.expm1(d))
    above = d + torch.log(weight + other * torch.exp(-d))
    below = torch.log(other + weight * torch.exp(d))
    return torch.where(d > 1, above, torch.where(d < -1, below, near))


def _mass_times_h(mass: Tensor, mass_times_s: Tensor, s: Tensor, log1p_s: Tensor) -> Tensor:
    """mass * (s - log1p(s)); log1p(s) = 2 atanh(r), r = s / (2 + s), so the leading terms cancel on paper when s is small."""
    r = s / (2 + s)
    square = r * r
    series = torch.zeros_like(r)
    for power in range(21 if s.dtype == torch.float64 else 9, 1, -2):
        series = series * square + 1.0 / power
    small = mass * (r * s - 2 * r * square * series)
    return torch.where(s.abs() < 0.25, small, mass_times_s - mass * log1p_s)


def divergence_terms(student_logq: Tensor, teacher_logq: Tensor, *, beta: float, normalised: bool) -> tuple[Tensor, Tensor]:
    """(phi, w): each bin's share of the divergence and its derivative in the student's log-probability. Same shape and dtype as the inputs.

    normalised: both arguments sum to one over their bins (see the head of the file); otherwise the plain summands, which may be negative
    at beta 0 and 1. Bins of probability zero (-inf) are legal: the interior stays finite, and a KL that is infinite is +inf, never NaN;
    w of KL(q||p) stays finite. ValueError for a beta outside [0, 1]. No collective, no autograd.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is the teacher's weight in the mixture and lies in [0, 1], got {beta}")
    a, b = student_logq.clamp(min=_FLOOR), teacher_logq.clamp(min=_FLOOR)
    p, q, x = a.exp(), b.exp(), a - b

    if beta == 0.0:
        if normalised:
            s = torch.expm1(x)
            phi, w = _mass_times_h(q, p - q, s, x), torch.where(x.abs() < 1, q * s, p - q)
        else:
            phi, w = -q * x, -q
        return torch.where((p == 0) & (student_logq == -torch.inf) & (q > 0), torch.inf, phi), w
    if beta == 1.0:
        phi = _mass_times_h(p, q - p, torch.expm1(-x), -x) if normalised else p * x
        w = p * x if normalised else p * x + p
        return torch.where((q == 0) & (teacher_logq == -torch.inf) & (p > 0), torch.inf, phi), w

    rest = 1.0 - beta
    log_m_over_q = _log_mix(x, rest, beta)
    log_m_over_p = _log_mix(-x, beta, rest)
    phi = beta * _mass_times_h(q, rest * (p - q), rest * torch.expm1(x), log_m_over_q)
    phi = phi + rest * _mass_times_h(p, beta * (q - p), beta * torch.expm1(-x), log_m_over_p)
    return phi, -rest * p * log_m_over_p
