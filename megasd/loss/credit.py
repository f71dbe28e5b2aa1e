"""How a teacher's log-probabilities of the sampled tokens change each token's advantage.

T response tokens, C contexts that the teacher is contrasted with. All arguments are constants
(detached), all results too. Elementwise, no collective. A: the advantage; u (also d): log T(y) -
log S(y), teacher minus student, nats.

    rlsd     A (1 + lam (clip(exp(sign(A) d)) - 1))       RLSD 2604.03128; d = log T+ - log T-: CEPO
             2605.19436
    antisd   A - lam phi(u)                               AntiSD 2605.11609
    egrsd    A clip(exp(sign(A) u)) om                    EGRSD 2605.13255; om: loss/sequence_stats.py
    rlcsd    A + lam tanh(e / tau), its sign kept         RLCSD 2606.11709; e: `contrast`
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG_RATIO = 20.0


def _factor(advantages_T: Tensor, log_ratio_T: Tensor, clip: float) -> Tensor:
    """exp(sign(A) log-ratio) within [1 - clip, 1 + clip]; 1 where either is 0."""
    signed_T = advantages_T.sign() * log_ratio_T.clamp(-_LOG_RATIO, _LOG_RATIO)
    return signed_T.exp().clamp(1 - clip, 1 + clip)


@torch.no_grad()
def rlsd(advantages_T: Tensor, d_T: Tensor, *, lam: Tensor | float, clip: float) -> Tensor:
    """Credit by direction: of a good response the tokens that the teacher likes gain, of a bad one
    those that it dislikes lose more.

    Written with lam times (factor - 1), so that lam 0, or a teacher equal to the student, leaves
    the advantages as they are, bit for bit. clip in [0, 1]: no advantage changes its sign.
    """
    return advantages_T * (1 + lam * (_factor(advantages_T, d_T, clip) - 1))


@torch.no_grad()
def phi(u_T: Tensor) -> Tensor:
    """(softplus(u) - log 2) / 2, the advantage that descends a Jensen-Shannon divergence: at least
    -0.3466, 0 (exactly) at u = 0.
    """
    return 0.5 * (u_T.clamp(min=0) + torch.log1p(0.5 * torch.expm1(-u_T.abs())))


@torch.no_grad()
def antisd(advantages_T: Tensor, u_T: Tensor, *, lam: Tensor | float) -> Tensor:
    """Ascent instead of descent: a token that the teacher's hint makes likely is credited less.
    lam: 0 where the gate is shut.
    """
    return advantages_T - lam * phi(u_T)


@torch.no_grad()
def egrsd(advantages_T: Tensor, u_T: Tensor, om_T: Tensor, *, clip: float) -> Tensor:
    """As RLSD with lam 1, times om: less where the teacher is unsure (streams.entropy_discount)."""
    return advantages_T * _factor(advantages_T, u_T, clip) * om_T


@torch.no_grad()
def contrast(teacher_logp_T: Tensor, contrast_logp_CT: Tensor, present_CT: Tensor) -> Tensor:
    """e_T = log T+ - log(mean over the contexts present of T-), nats. present_CT: bool; 0 where no
    context is present (or C is 0).
    """
    count_T = present_CT.sum(0)
    if not len(present_CT):
        return torch.zeros_like(teacher_logp_T)
    mean_T = (
        contrast_logp_CT.masked_fill(~present_CT, -torch.inf).logsumexp(0)
        - count_T.clamp(min=1).to(teacher_logp_T.dtype).log()
    )
    return torch.where(count_T > 0, teacher_logp_T - mean_T, 0.0)


@torch.no_grad()
def rlcsd(
    advantages_T: Tensor, e_T: Tensor, *, lam: float, tau: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """(second_T, second_mask_T): advantages with the residual r = lam tanh(e / tau), and the tokens
    of the second path, |r| > threshold.

    The sign is kept: what would cross 0 becomes 0, and an advantage of 0 stays 0. Off the second
    path second_T is the advantage itself.
    """
    residual_T = lam * torch.tanh(e_T / tau)
    second_mask_T = residual_T.abs() > threshold
    moved_T = advantages_T + residual_T
    kept_T = torch.where(moved_T.sign() == advantages_T.sign(), moved_T, 0.0)
    return torch.where(second_mask_T, kept_T, advantages_T), second_mask_T
