"""How a teacher's log-probabilities of the sampled tokens change each token's advantage.

R response tokens of all samples of this rank, T of some of them, C contexts that the teacher is
contrasted with. All arguments are constants (detached), all results too. A: the advantage; u (also
d): log T(y) - log S(y), teacher minus student, nats.

    rlsd       A (1 + lam (clip(exp(sign(A) d)) - 1))     RLSD 2604.03128
    cepo       the same with d = log T+ - log T-          CEPO 2605.19436
    antisd     A - lam phi(u)                             AntiSD 2605.11609
    egrsd      A clip(exp(sign(A) u)) om                  EGRSD 2605.13255; om: sequence_stats
    rlcsd      A + lam tanh(e / tau), its sign kept       RLCSD 2606.11709; e: `contrast`
    log_ratio  A + u                                      Thinking Machines 2025
    return     A + whitened sums of u to the end          MiniLLM 2306.08543; sequence_stats
    margin     A + u, shifted by response                 Uni-OPD 2605.03677; sequence_stats

`CREDITS` names them. Each has two parts: `prepare` runs once a minibatch, before the student's
pass, on whole responses; `apply` runs on the tokens of a microbatch, elementwise, when the
student's log-probs are known. What other files ask of a credit: config/variants.py, CREDIT_TRAITS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.config.schema import CreditConfig
from megasd.loss import sequence_stats

_LOG_RATIO = 20.0

# ---- formulas ----


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
    """As RLSD with lam 1, times om (sequence_stats.entropy_discount): less where the teacher is unsure."""
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


# ---- what a credit is given, and gives ----


@dataclass(frozen=True)
class CreditBatch:
    """A minibatch of this rank before the student's pass: what `prepare` may read."""

    config: CreditConfig
    # [R] each, on the actor's device: "advantage", "distilled"; on stages with logits "teacher_logp",
    # "teacher_entropy", "contrast_logp" [C, R], "contrast_present" [C, R] and, for a credit that
    # needs it, "old_logp"
    streams: Mapping[str, Tensor]
    # bool [R], on the CPU: tokens of the policy gradient that have a teacher
    distilled_R: Tensor
    # int64 [N]: tokens of each response
    lens_N: Tensor
    # bool [N] each: judged right; judged at all
    right_N: Tensor
    scored_N: Tensor
    # Takes the batch's median teacher entropy, None on a pipeline stage that sees no logits. Gives
    # whether the entropy gate is open, and that median. Every rank must call it.
    observe: Callable[[float | None], tuple[bool, float]]
    # data parallel without context parallel; every rank must call what reduces over it
    dp_group: dist.ProcessGroup | None

    @property
    def has_logits(self) -> bool:
        """Whether this pipeline stage sees logits, so that the teacher's streams are there."""
        return "teacher_logp" in self.streams


@dataclass(frozen=True)
class PreparedCredit:
    """What `prepare` makes: streams that are added or replaced, and metrics."""

    # [R] each, on the actor's device
    streams: dict[str, Tensor] = field(default_factory=dict)
    # bool [R] on the CPU: tokens that leave the first policy gradient for the second one; their
    # advantages are the stream "second_advantage". None: the credit has no second path.
    second_path_R: Tensor | None = None
    # the same on all ranks
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CreditTokens:
    """Some tokens with the student's log-probs: what `apply` may read."""

    # before the credit
    advantages_T: Tensor
    # log T(y) - log S(y), nats; 0 for tokens without a teacher
    log_ratio_T: Tensor
    # bool: tokens that have a teacher
    distilled_T: Tensor
    # the batch's, the teacher's and those of `prepare`
    streams_T: Mapping[str, Tensor]


# advantages [T], and values [T] for metrics by name
Applied = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Credit:
    """A row of `CREDITS`."""

    apply: Callable[[CreditTokens, CreditConfig], Applied]
    prepare: Callable[[CreditBatch], PreparedCredit] = lambda batch: PreparedCredit()


# ---- before the student's pass ----


def _prepare_rlcsd(batch: CreditBatch) -> PreparedCredit:
    credit, streams = batch.config, batch.streams
    if not batch.has_logits:
        return PreparedCredit(second_path_R=torch.zeros_like(batch.distilled_R))
    e_R = contrast(streams["teacher_logp"], streams["contrast_logp"], streams["contrast_present"])
    e_R = torch.where(streams["distilled"], e_R, 0.0)
    second_R, mask_R = rlcsd(
        streams["advantage"].to(e_R), e_R, lam=credit.lam, tau=credit.tau, threshold=credit.threshold
    )
    return PreparedCredit({"second_advantage": second_R}, second_path_R=mask_R.cpu())


def _prepare_cepo(batch: CreditBatch) -> PreparedCredit:
    streams = batch.streams
    if not batch.has_logits:
        return PreparedCredit()
    gap_R = contrast(streams["teacher_logp"], streams["contrast_logp"], streams["contrast_present"])
    return PreparedCredit(
        {
            "contrasted": streams["contrast_present"].any(0),
            # log-prob under the mean of the contrasting teachers, of which CEPO has one
            "contrast_logp": streams["teacher_logp"] - gap_R,
        }
    )


def _prepare_antisd(batch: CreditBatch) -> PreparedCredit:
    """Collectives: those of `median` and of `observe`."""
    median = None
    if batch.has_logits:
        entropy_R = batch.streams["teacher_entropy"].cpu()
        median = sequence_stats.median(entropy_R, batch.distilled_R, group=batch.dp_group)
    is_open, seen = batch.observe(median)
    return PreparedCredit(
        {"gate": torch.full_like(batch.streams["advantage"], float(is_open))},
        metrics={"gate": float(is_open), "median_teacher_entropy": seen},
    )


def _prepare_egrsd(batch: CreditBatch) -> PreparedCredit:
    if not batch.has_logits:
        return PreparedCredit()
    discount_R = sequence_stats.entropy_discount(
        batch.streams["teacher_entropy"].cpu(),
        batch.distilled_R,
        batch.lens_N,
        scale=batch.config.entropy_scale,
        window=batch.config.window,
        group=batch.dp_group,
    )
    return PreparedCredit({"discount": discount_R})


def _log_ratio(batch: CreditBatch) -> Tensor:
    """[R] on the CPU: log T(y) - log S(y) with the student of before the step; 0 without a teacher."""
    streams = batch.streams
    ratio_R = torch.where(streams["distilled"], streams["teacher_logp"] - streams["old_logp"], 0.0)
    return ratio_R.cpu()


def _with_added(batch: CreditBatch, added_R: Tensor) -> PreparedCredit:
    advantage_R = batch.streams["advantage"]
    return PreparedCredit({"advantage": advantage_R + added_R.to(advantage_R)})


def _prepare_return(batch: CreditBatch) -> PreparedCredit:
    if not batch.has_logits:
        return PreparedCredit()
    added_R = sequence_stats.returns(
        _log_ratio(batch),
        batch.distilled_R,
        batch.lens_N,
        clip=batch.config.clip_return,
        group=batch.dp_group,
    )
    return _with_added(batch, added_R)


def _prepare_margin(batch: CreditBatch) -> PreparedCredit:
    if not batch.has_logits:
        return PreparedCredit()
    added_R = sequence_stats.margin_shift(
        _log_ratio(batch),
        batch.distilled_R,
        batch.lens_N,
        right_N=batch.right_N,
        scored_N=batch.scored_N,
        margin=batch.config.margin,
        group=batch.dp_group,
    )
    return _with_added(batch, added_R)


# ---- with the student's log-probs ----


def _unchanged(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    """For a credit that `prepare` has already put into the advantages."""
    return tokens.advantages_T, {}


def _clipped(tokens: CreditTokens, log_ratio_T: Tensor, clip: float) -> Tensor:
    """bool [T]: tokens whose factor leaves [1 - clip, 1 + clip]."""
    factor_T = (tokens.advantages_T.sign() * log_ratio_T).exp()
    return ((factor_T - 1).abs() > clip) & tokens.distilled_T & (tokens.advantages_T != 0)


def _apply_rlsd(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    advantages_T = rlsd(tokens.advantages_T, tokens.log_ratio_T, lam=credit.lam, clip=credit.clip)
    return advantages_T, {"credit_clipped": _clipped(tokens, tokens.log_ratio_T, credit.clip)}


def _apply_cepo(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    """RLSD on the gap of two teachers, and on the plain log-ratio where only the first has a context."""
    gap_T = tokens.streams_T["teacher_logp"] - tokens.streams_T["contrast_logp"]
    has_both_T = tokens.streams_T["contrasted"] & tokens.distilled_T
    d_T = torch.where(has_both_T, gap_T.to(tokens.log_ratio_T.dtype), tokens.log_ratio_T)
    advantages_T = rlsd(tokens.advantages_T, d_T, lam=credit.lam, clip=credit.clip)
    return advantages_T, {"credit_clipped": _clipped(tokens, d_T, credit.clip)}


def _apply_antisd(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    lam_T = torch.where(tokens.distilled_T, tokens.streams_T["gate"] * credit.lam, 0.0)
    phi_T = torch.where(tokens.distilled_T, phi(tokens.log_ratio_T), 0.0)
    return antisd(tokens.advantages_T, tokens.log_ratio_T, lam=lam_T), {"phi": phi_T}


def _apply_egrsd(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    discount_T = tokens.streams_T["discount"]
    advantages_T = egrsd(tokens.advantages_T, tokens.log_ratio_T, discount_T, clip=credit.clip)
    return advantages_T, {"credit_clipped": _clipped(tokens, tokens.log_ratio_T, credit.clip)}


def _apply_log_ratio(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    return tokens.advantages_T + tokens.log_ratio_T, {}


CREDITS: dict[str, Credit] = {
    "rlsd": Credit(_apply_rlsd),
    "cepo": Credit(_apply_cepo, _prepare_cepo),
    "rlcsd": Credit(_unchanged, _prepare_rlcsd),
    "antisd": Credit(_apply_antisd, _prepare_antisd),
    "egrsd": Credit(_apply_egrsd, _prepare_egrsd),
    "log_ratio": Credit(_apply_log_ratio),
    "return": Credit(_unchanged, _prepare_return),
    "margin": Credit(_unchanged, _prepare_margin),
}
