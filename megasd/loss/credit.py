"""How a teacher's log-probabilities of the sampled tokens change each token's advantage.

R response tokens of all samples of this rank, T tokens out of these R, C contexts that the teacher
is contrasted with. All arguments and all results are constants (detached). A: the advantage; u
(also d): log T(y) - log S(y), teacher minus student, nats.

    rlsd       A (1 + lam (clip(exp(sign(A) d)) - 1))     RLSD 2604.03128
    cepo       the same with d = log T+ - log T-          CEPO 2605.19436
    antisd     A - lam phi(u)                             AntiSD 2605.11609
    egrsd      A clip(exp(sign(A) u)) om                  EGRSD 2605.13255; om: sequence_stats
    rlcsd      A + lam tanh(e / tau), its sign kept       RLCSD 2606.11709; e: `contrast`
    log_ratio  A + u                                      Thinking Machines 2025
    return     A + whitened sums of u to the end          MiniLLM 2306.08543; sequence_stats
    margin     A + u, shifted by response                 Uni-OPD 2605.03677; sequence_stats

`CREDITS` has a row for each of these credits. A row has two functions. `prepare` runs once a
minibatch, on whole responses, before the student's forward. `apply` runs on the tokens of a
microbatch, elementwise, when the student's log-probs are known. CREDIT_TRAITS in config/variants.py
says what the other files need to know about a credit.
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
    """exp(sign(A) log-ratio), clipped to [1 - clip, 1 + clip]; 1 where A or the log-ratio is 0."""
    signed_T = advantages_T.sign() * log_ratio_T.clamp(-_LOG_RATIO, _LOG_RATIO)
    return signed_T.exp().clamp(1 - clip, 1 + clip)


@torch.no_grad()
def rlsd(advantages_T: Tensor, d_T: Tensor, *, lam: Tensor | float, clip: float) -> Tensor:
    """Credit by direction: scale each advantage by how much the teacher agrees with it.

    In a good response, tokens that the teacher likes gain. In a bad response, tokens that the
    teacher dislikes lose more. The formula has lam times (factor - 1), so that lam 0, or a teacher
    equal to the student, leaves the advantages as they are, bit for bit. With clip in [0, 1] no
    advantage changes its sign.
    """
    return advantages_T * (1 + lam * (_factor(advantages_T, d_T, clip) - 1))


@torch.no_grad()
def phi(u_T: Tensor) -> Tensor:
    """(softplus(u) - log 2) / 2, the advantage that descends a Jensen-Shannon divergence.

    It is at least -0.3466, and exactly 0 at u = 0.
    """
    return 0.5 * (u_T.clamp(min=0) + torch.log1p(0.5 * torch.expm1(-u_T.abs())))


@torch.no_grad()
def antisd(advantages_T: Tensor, u_T: Tensor, *, lam: Tensor | float) -> Tensor:
    """Give less credit to a token that the teacher's hint makes likely (ascent, not descent).

    lam is 0 where the entropy gate is shut.
    """
    return advantages_T - lam * phi(u_T)


@torch.no_grad()
def egrsd(advantages_T: Tensor, u_T: Tensor, om_T: Tensor, *, clip: float) -> Tensor:
    """RLSD with lam 1, times a discount om, which is lower where the teacher is unsure.

    sequence_stats.entropy_discount computes om.
    """
    return advantages_T * _factor(advantages_T, u_T, clip) * om_T


@torch.no_grad()
def contrast(teacher_logp_T: Tensor, contrast_logp_CT: Tensor, present_CT: Tensor) -> Tensor:
    """e_T = log T+ - log(mean of T- over the contexts that are present), in nats.

    T+ is the teacher's probability of a token, T- the probability in a contrasting context.
    present_CT: bool. e is 0 where no context is present (or C is 0).
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
    """Add the residual r = lam tanh(e / tau) to the advantages of tokens with |r| > threshold.

    Returns (second_T, second_mask_T). second_mask_T marks the tokens with |r| > threshold, which
    form the second path; second_T are the new advantages. Each keeps its sign: an advantage that
    would cross 0 becomes 0, and an advantage of 0 stays 0. Off the second path second_T is the
    advantage itself.
    """
    residual_T = lam * torch.tanh(e_T / tau)
    second_mask_T = residual_T.abs() > threshold
    moved_T = advantages_T + residual_T
    kept_T = torch.where(moved_T.sign() == advantages_T.sign(), moved_T, 0.0)
    return torch.where(second_mask_T, kept_T, advantages_T), second_mask_T


# ---- the arguments and results of a credit ----


@dataclass(frozen=True)
class CreditBatch:
    """The input of `prepare`: a minibatch of this rank, before the student's forward."""

    config: CreditConfig
    # Values by response token, [R] each, on the actor's device: "advantage" and "distilled".
    # Pipeline stages with logits also have "teacher_logp", "teacher_entropy",
    # "contrast_logp" [C, R], "contrast_present" [C, R] and, for a credit that needs it, "old_logp".
    streams: Mapping[str, Tensor]
    # Bool [R], on the CPU: the tokens of the policy gradient that have a teacher.
    distilled_R: Tensor
    # Int64 [N]: the number of tokens of each response.
    lens_N: Tensor
    # Bool [N] each: whether a response was judged right, and whether it was judged at all.
    right_N: Tensor
    scored_N: Tensor
    # This function takes the batch's median teacher entropy, or None on a pipeline stage that sees
    # no logits. It returns whether the entropy gate is open, and the median. Every rank must call
    # it.
    observe: Callable[[float | None], tuple[bool, float]]
    # The data-parallel group without context parallel. Every rank takes part in its collectives.
    dp_group: dist.ProcessGroup | None

    @property
    def has_logits(self) -> bool:
        """Whether this pipeline stage sees logits, so that the teacher's streams are there."""
        return "teacher_logp" in self.streams


@dataclass(frozen=True)
class PreparedCredit:
    """The result of `prepare`: streams that are added or replaced, and metrics."""

    # Values by response token, [R] each, on the actor's device.
    streams: dict[str, Tensor] = field(default_factory=dict)
    # Bool [R] on the CPU: the tokens that leave the first policy gradient for the second one. The
    # stream "second_advantage" has their advantages. None: the credit has no second path.
    second_path_R: Tensor | None = None
    # Metrics by name, the same on all ranks.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CreditTokens:
    """The input of `apply`: the tokens of a microbatch, when the student's log-probs are known."""

    # The advantages before the credit.
    advantages_T: Tensor
    # log T(y) - log S(y), nats; 0 for tokens without a teacher.
    log_ratio_T: Tensor
    # Bool: the tokens that have a teacher.
    distilled_T: Tensor
    # The streams of the batch, of the teacher and of `prepare`.
    streams_T: Mapping[str, Tensor]


# The result of `apply`: advantages [T], and values [T] for metrics by name.
Applied = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Credit:
    """A row of `CREDITS`: the two functions that compute a credit."""

    apply: Callable[[CreditTokens, CreditConfig], Applied]
    prepare: Callable[[CreditBatch], PreparedCredit] = lambda batch: PreparedCredit()


# ---- before the student's forward ----


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
            # The log-prob under the mean of the contrasting contexts. CEPO has one such context.
            "contrast_logp": streams["teacher_logp"] - gap_R,
        }
    )


def _prepare_antisd(batch: CreditBatch) -> PreparedCredit:
    """Set the entropy gate of this step. Collectives: those of `median` and of `observe`."""
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
    """log T(y) - log S(y) of the student before the step, [R] on the CPU; 0 without a teacher."""
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
    """Return the advantages as they are: `prepare` has already put the credit into them."""
    return tokens.advantages_T, {}


def _clipped(tokens: CreditTokens, log_ratio_T: Tensor, clip: float) -> Tensor:
    """Bool [T]: the tokens whose factor lies outside [1 - clip, 1 + clip]."""
    factor_T = (tokens.advantages_T.sign() * log_ratio_T).exp()
    return ((factor_T - 1).abs() > clip) & tokens.distilled_T & (tokens.advantages_T != 0)


def _apply_rlsd(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    advantages_T = rlsd(tokens.advantages_T, tokens.log_ratio_T, lam=credit.lam, clip=credit.clip)
    return advantages_T, {"credit_clipped": _clipped(tokens, tokens.log_ratio_T, credit.clip)}


def _apply_cepo(tokens: CreditTokens, credit: CreditConfig) -> Applied:
    """RLSD on the gap log T+ - log T-, or on the log-ratio where T- has no context."""
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
