"""Per-token importance ratios and the clipped policy gradient.

T response tokens. logp: student under gradient, old_logp: student at the start of the step (pi_old), rollout_logp: the engine (mu);
nats, all at the sampling temperature. Elementwise, no collective. Log-ratios are clamped to +-20 as verl does.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG_RATIO = 20.0


def _truncated_ratio(numerator_T: Tensor, denominator_T: Tensor, clip: float | None) -> Tensor:
    if clip is None:
        return torch.ones_like(numerator_T).detach()
    return (numerator_T - denominator_T).detach().clamp(-_LOG_RATIO, _LOG_RATIO).exp().clamp(max=clip)


def is_ratio(logp_T: Tensor, old_logp_T: Tensor, clip: float | None) -> Tensor:
    """Detached factor min(pi_theta / pi_old, clip) of a distillation loss (SDPO 2601.20802).

    Truncated from above only; exactly 1 on policy. clip None: ones.
    """
    return _truncated_ratio(logp_T, old_logp_T, clip)


def tis(old_logp_T: Tensor, rollout_logp_T: Tensor, clip: float | None) -> Tensor:
    """Detached correction min(pi_old / mu, clip) for an engine whose probabilities differ from the trainer's. clip None: ones."""
    return _truncated_ratio(old_logp_T, rollout_logp_T, clip)


def policy_gradient(logp_T: Tensor, old_logp_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """loss_T = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi_theta / pi_old.

    PPO 1707.06347; unequal clips: DAPO 2503.14476. On policy (old_logp = logp detached) the value is -A and the gradient -A grad logp.
    """
    ratio_T = (logp_T - old_logp_T.detach()).clamp(-_LOG_RATIO, _LOG_RATIO).exp()
    return -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
