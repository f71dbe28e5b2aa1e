"""Per-token importance ratios and the surrogates of the policy gradient.

T response tokens. logp: log-probabilities of the student, with gradient; old_logp: of the student
before the batch's first step (pi_old); rollout_logp: of the engine (mu). All are in nats and at the
sampling temperature. All functions are elementwise, without collectives. Log-ratios are clamped to
+-20 as verl does.

    ppo         -min(rho A, clip(rho) A), rho = pi_theta / pi_old
                PPO 1707.06347; unequal clips: DAPO 2503.14476
    gspo        the ppo loss on the response's ratio s = exp(mean log rho), as
                sg(s) pi_theta / sg(pi_theta); GSPO 2507.18071
    cispo       -sg(clip(rho)) A log pi_theta: clipped tokens keep a gradient; CISPO 2506.13585
    importance  -rho A; on-policy distillation of Thinking Machines
    reinforce   -A log pi_theta; EGRSD 2605.13255

`SURROGATES` has a row for each surrogate. SURROGATE_TRAITS in config/variants.py says what the
other files need to know about a surrogate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TIS_MODES = ("truncate", "mask")
_LOG_RATIO = 20.0


def _ratio(log_ratio_T: Tensor) -> Tensor:
    return log_ratio_T.clamp(-_LOG_RATIO, _LOG_RATIO).exp()


def is_ratio(logp_T: Tensor, old_logp_T: Tensor, clip: float | None) -> Tensor:
    """Detached factor min(pi_theta / pi_old, clip) of a distillation loss (SDPO 2601.20802).

    The ratio is truncated from above only, and exactly 1 on policy. clip None gives ones.
    """
    return tis(logp_T, old_logp_T, clip)


def tis(
    old_logp_T: Tensor,
    rollout_logp_T: Tensor,
    clip: float | None,
    *,
    low: float = 0.0,
    mode: str = "truncate",
) -> Tensor:
    """Detached correction pi_old / mu for an engine whose probabilities differ from the trainer's.

    Mode "truncate" brings the ratio into [low, clip] (TIS; with low 0 from above only). Mode "mask"
    gives 0 where the ratio lies outside [low, clip] (IcePop). clip None gives ones. ValueError for
    an unknown mode.
    """
    if mode not in TIS_MODES:
        raise ValueError(f"mode must be one of {', '.join(TIS_MODES)}, got {mode!r}")
    if clip is None:
        return torch.ones_like(old_logp_T).detach()
    ratio_T = _ratio((old_logp_T - rollout_logp_T).detach())
    if mode == "mask":
        return torch.where((ratio_T >= low) & (ratio_T <= clip), ratio_T, 0.0)
    return ratio_T.clamp(min=low, max=clip)


@dataclass(frozen=True)
class SurrogateTokens:
    """The input of a surrogate: log-probabilities, advantages and clips of T tokens."""

    # The student's log-probabilities, with gradient.
    logp_T: Tensor
    # The log-probabilities under pi_old and the advantages, without gradient.
    old_logp_T: Tensor
    advantages_T: Tensor
    # The ratio is clipped to [1 - clip_low, 1 + clip_high].
    clip_low: float
    clip_high: float
    # With a dual clip c, the loss is at most -c A where A < 0. None: no bound.
    dual_clip: float | None
    # The mean log-ratio of each token's response, which only gspo reads.
    sequence_log_ratio_T: Tensor | None

    def ratio(self) -> Tensor:
        """The ratio pi_theta / pi_old of each token, [T], with gradient."""
        return _ratio(self.logp_T - self.old_logp_T)


def _clipped_loss(tokens: SurrogateTokens, ratio_T: Tensor) -> Tensor:
    """The pessimistic minimum of PPO and GSPO, with the dual clip (1912.09729)."""
    advantages_T, dual_clip = tokens.advantages_T, tokens.dual_clip
    clipped_T = ratio_T.clamp(1 - tokens.clip_low, 1 + tokens.clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if dual_clip is None:
        return loss_T
    return torch.where(advantages_T < 0, torch.minimum(loss_T, -dual_clip * advantages_T), loss_T)


def _ppo(tokens: SurrogateTokens) -> Tensor:
    return _clipped_loss(tokens, tokens.ratio())


def _gspo(tokens: SurrogateTokens) -> Tensor:
    if tokens.sequence_log_ratio_T is None:
        raise ValueError(
            "surrogate 'gspo' needs sequence_log_ratio_T, the mean log-ratio of each token's response"
        )
    one_T = (tokens.logp_T - tokens.logp_T.detach()).exp()
    return _clipped_loss(tokens, _ratio(tokens.sequence_log_ratio_T) * one_T)


def _cispo(tokens: SurrogateTokens) -> Tensor:
    clipped_T = tokens.ratio().clamp(1 - tokens.clip_low, 1 + tokens.clip_high)
    return -clipped_T.detach() * tokens.advantages_T * tokens.logp_T


def _importance(tokens: SurrogateTokens) -> Tensor:
    return -tokens.ratio() * tokens.advantages_T


def _reinforce(tokens: SurrogateTokens) -> Tensor:
    return -tokens.advantages_T * tokens.logp_T


SURROGATES: dict[str, Callable[[SurrogateTokens], Tensor]] = {
    "ppo": _ppo,
    "gspo": _gspo,
    "cispo": _cispo,
    "importance": _importance,
    "reinforce": _reinforce,
}


def policy_gradient(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantages_T: Tensor,
    *,
    surrogate: str = "ppo",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    sequence_log_ratio_T: Tensor | None = None,
) -> Tensor:
    """Compute loss_T of a surrogate by its name in `SURROGATES`; only logp_T gets a gradient.

    On policy (old_logp = logp detached) ppo, gspo and importance have the value -A, and all five
    surrogates have the gradient -A grad logp. Ratios are clipped to [1 - clip_low, 1 + clip_high]
    (ppo, gspo, cispo). dual_clip c > 1: where A < 0 the loss is at most -c A (ppo, gspo; dual-clip
    PPO 1912.09729). sequence_log_ratio_T: mean log rho of each token's response; gspo reads it, and
    raises ValueError if it is missing. ValueError for an unknown surrogate.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")
    tokens = SurrogateTokens(
        logp_T=logp_T,
        old_logp_T=old_logp_T.detach(),
        advantages_T=advantages_T.detach(),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        sequence_log_ratio_T=None if sequence_log_ratio_T is None else sequence_log_ratio_T.detach(),
    )
    return SURROGATES[surrogate](tokens)
