"""The loss of some tokens: the algorithm's terms, each times its per-token weight, from what
ops/vocab_parallel.py says about the logits.

T response tokens. Weights already hold the global normaliser (loss/normalise.py), so the loss of a
step is the plain sum over tokens, microbatches, context- and data-parallel ranks. Replicated over
tensor-parallel ranks: no process group in sight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasd.config.schema import AlgorithmConfig, CreditConfig, PolicyGradientTerm
from megasd.loss.credit import antisd, egrsd, phi, rlsd
from megasd.loss.divergence import adaptive, divergence
from megasd.loss.exact_sum import exact_words
from megasd.loss.normalise import weighted
from megasd.loss.policy_gradient import is_ratio, policy_gradient, tis
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec

# What a metric is a mean over, where that is not "tokens" (response tokens of samples with a
# weight); "" is a plain sum.
METRIC_WEIGHTS = {
    "loss": "",
    "tokens": "",
    "taught_tokens": "",
    "teacher_mib": "",
    "sampled_tokens": "",
    "rollout_gap": "sampled_tokens",
    "divergence": "taught_tokens",
    "log_ratio": "taught_tokens",
    "credit_clipped": "taught_tokens",
    "phi": "taught_tokens",
}


def logprobs_spec(algorithm: AlgorithmConfig, *, temperature: float, vocab_size: int) -> LogProbsSpec:
    """What the algorithm's terms need to know about the logits. temperature: the sampling temperature."""
    term = algorithm.distill
    if term is None:
        return LogProbsSpec(
            vocab_size=vocab_size, support="none", temperature=temperature, teacher_temperature=temperature
        )
    return LogProbsSpec(
        vocab_size=vocab_size,
        support="record" if algorithm.teacher.transport == "record" else term.support,
        top_k=term.top_k,
        tail=term.tail,
        beta=term.beta,
        clip=term.pointwise_clip,
        temperature=temperature,
        teacher_temperature=term.teacher_temperature or temperature,
    )


def token_divergence(readout: LogProbs, algorithm: AlgorithmConfig) -> Tensor:
    """The distillation loss [T] (nats) before any weight, differentiable in the readout."""
    term = algorithm.distill
    if readout.divergence_T is not None:
        return readout.divergence_T
    buckets = readout.student_logq_TB, readout.teacher_logq_TB
    if term.divergence == "adaptive":
        return adaptive(*buckets, tail=term.tail)
    return divergence(*buckets, beta=term.beta, normalised=term.tail != "raw", clip=term.pointwise_clip)


def objective(
    readout: LogProbs,
    streams_T: dict[str, Tensor],
    weights_T: dict[str, Tensor],
    valid_T: Tensor,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_T, sums): weighted losses, and sums over valid tokens for metrics as words of
    loss/normalise.py, which add up exactly.

    `streams_T`: "rollout_logp" (engine log-prob mu of the sampled token, nats) and "advantage";
    where the algorithm has them "old_logp" (pi_old; without it the step is on policy and pi_old the
    detached student, so that ratios are 1 and only the correction against the engine remains, SDPO
    2601.20802, 2.1 steps 6 and 7), and what loss/token_weights.py made of the teacher. `weights_T`:
    one float64 weight per term in use ("distill", "policy_gradient", "second_path", "nll"), 0 where
    a token does not take part. No collective.
    """
    logp_T = readout.logp_T
    detached_T = logp_T.detach()
    old_T = streams_T.get("old_logp", detached_T).to(detached_T.dtype)
    tis_T = tis(
        old_T, streams_T["rollout_logp"], algorithm.tis_clip, low=algorithm.tis_low, mode=algorithm.tis_mode
    )
    terms_T = {}
    metrics_T = {
        "tokens": valid_T,
        "entropy": weighted(readout.entropy_T, valid_T),
        "logp": weighted(detached_T, valid_T),
    }
    # the others are rows' own solutions
    sampled_T = valid_T & ~streams_T["rollout_logp"].isnan()
    gap_T = (detached_T - streams_T["rollout_logp"]).abs()
    metrics_T |= {
        "sampled_tokens": sampled_T,
        "rollout_gap": weighted(gap_T, sampled_T),
        "tis": weighted(tis_T, valid_T),
    }
    if algorithm.distill is not None:
        term = algorithm.distill
        div_T = token_divergence(readout, algorithm)
        terms_T["distill"] = term.coefficient * is_ratio(detached_T, old_T, term.is_clip) * tis_T * div_T
        distilled_T = weights_T["distill"] > 0
        metrics_T |= {"taught_tokens": distilled_T, "divergence": weighted(div_T.detach(), distilled_T)}
    if algorithm.policy_gradient is not None:
        term = algorithm.policy_gradient
        advantages_T = streams_T["advantage"]
        if term.credit is not None:
            advantages_T, figures_T = credited(detached_T, streams_T, valid_T, term.credit)
            metrics_T |= {name: values_T for name, values_T in figures_T.items() if name not in metrics_T}
        terms_T["policy_gradient"] = tis_T * _surrogate(logp_T, old_T, advantages_T, streams_T, term)
        if "second_advantage" in streams_T:
            second_T = _surrogate(logp_T, old_T, streams_T["second_advantage"], streams_T, term)
            terms_T["second_path"] = term.credit.eta * tis_T * second_T
            metrics_T["second_path"] = weights_T["second_path"] > 0
    if algorithm.nll is not None:
        terms_T["nll"] = -algorithm.nll.coefficient * logp_T
    weighed_T = [weighted(values_T, weights_T[name].to(values_T.dtype)) for name, values_T in terms_T.items()]
    metrics_T["loss"] = sum(
        weighted(values_T.detach().double(), weights_T[name]) for name, values_T in terms_T.items()
    )
    words = exact_words(torch.stack([values_T.double() for values_T in metrics_T.values()]), dim=-1)
    return sum(weighed_T), dict(zip(metrics_T, words, strict=True))


def _surrogate(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantages_T: Tensor,
    streams_T: dict[str, Tensor],
    term: PolicyGradientTerm,
) -> Tensor:
    sequence_log_ratio_T = streams_T.get("sequence_log_ratio")
    # on policy the ratio of every sequence is 1
    if term.surrogate == "gspo" and sequence_log_ratio_T is None:
        sequence_log_ratio_T = torch.zeros_like(old_logp_T)
    return term.coefficient * policy_gradient(
        logp_T,
        old_logp_T,
        advantages_T.to(logp_T.dtype),
        surrogate=term.surrogate,
        clip_low=term.clip_low,
        clip_high=term.clip_high,
        dual_clip=term.dual_clip,
        sequence_log_ratio_T=None if sequence_log_ratio_T is None else sequence_log_ratio_T.to(logp_T.dtype),
    )


def credited(
    logp_T: Tensor, streams_T: dict[str, Tensor], valid_T: Tensor, credit: CreditConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(advantages_T, sums for metrics): the advantage of each token in the light of the teacher.
    Untaught tokens keep theirs.

    logp_T: the student's, detached. streams_T: "advantage", "teacher_logp" and "distilled" (bool);
    cepo: "contrast_logp" and "contrasted"; egrsd: "discount". rlcsd, return and margin were dealt
    with before, on whole sequences (loss/token_weights.py).
    """
    advantages_T, distilled_T = streams_T["advantage"], streams_T["distilled"] & valid_T
    log_ratio_T = torch.where(distilled_T, streams_T["teacher_logp"].to(logp_T.dtype) - logp_T, 0.0)
    figures_T = {"taught_tokens": distilled_T, "log_ratio": log_ratio_T}
    if credit.kind in ("rlsd", "cepo", "egrsd"):
        if credit.kind == "cepo":
            gap_T = streams_T["teacher_logp"] - streams_T["contrast_logp"]
            log_ratio_T = torch.where(
                streams_T["contrasted"] & distilled_T, gap_T.to(logp_T.dtype), log_ratio_T
            )
        factor_T = (advantages_T.sign() * log_ratio_T).exp()
        figures_T["credit_clipped"] = ((factor_T - 1).abs() > credit.clip) & distilled_T & (advantages_T != 0)
        if credit.kind == "egrsd":
            return egrsd(advantages_T, log_ratio_T, streams_T["discount"], clip=credit.clip), figures_T
        return rlsd(advantages_T, log_ratio_T, lam=credit.lam, clip=credit.clip), figures_T
    if credit.kind == "antisd":
        figures_T["phi"] = torch.where(distilled_T, phi(log_ratio_T), 0.0)
        lam_T = torch.where(distilled_T, streams_T["gate"] * credit.lam, 0.0)
        return antisd(advantages_T, log_ratio_T, lam=lam_T), figures_T
    if credit.kind == "log_ratio":
        return advantages_T + log_ratio_T, figures_T
    return advantages_T, figures_T
