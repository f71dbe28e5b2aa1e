"""The loss of a microbatch's tokens: the terms of the algorithm times the weights of the tokens.

T response tokens; the log-probs come from ops/vocab_parallel.py. Weights already hold the global
normaliser (loss/normalise.py), so the loss of a step is the plain sum over tokens, microbatches,
context- and data-parallel ranks. Every tensor-parallel rank computes the same loss, so no function
of this file takes a process group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.config.schema import AlgorithmConfig, CreditConfig, DistillTerm, PolicyGradientTerm
from megasd.config.variants import SURROGATE_TRAITS
from megasd.loss.credit import CREDITS, CreditTokens
from megasd.loss.divergence import DIVERGENCES
from megasd.loss.exact_sum import exact_words
from megasd.loss.normalise import weighted
from megasd.loss.policy_gradient import is_ratio, policy_gradient, tis
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec

# Each metric maps to the metric that its sum is divided by, or to "" if it is a plain sum. Metrics
# that are not in the table are divided by "tokens" (response tokens of samples with a weight).
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
    """The log-probs that the algorithm's terms read, as a LogProbsSpec.

    temperature: the sampling temperature.
    """
    term, teacher = algorithm.distill, algorithm.teacher
    if term is None:
        return LogProbsSpec(
            vocab_size=vocab_size, support="none", temperature=temperature, teacher_temperature=temperature
        )
    return LogProbsSpec(
        vocab_size=vocab_size,
        support="record" if teacher is not None and teacher.transport == "record" else term.support,
        top_k=term.top_k,
        tail=term.tail,
        beta=term.beta,
        clip=term.pointwise_clip,
        temperature=temperature,
        teacher_temperature=term.teacher_temperature or temperature,
    )


def token_divergence(logprobs: LogProbs, term: DistillTerm) -> Tensor:
    """The distillation loss [T] (nats) before any weight, differentiable in the log-probs.

    With support "full" the log-probs already contain this loss (ops/vocab_parallel.py).
    """
    if logprobs.divergence_T is not None:
        return logprobs.divergence_T
    assert logprobs.student_logq_TB is not None and logprobs.teacher_logq_TB is not None
    return DIVERGENCES[term.divergence](logprobs.student_logq_TB, logprobs.teacher_logq_TB, term)


@dataclass(frozen=True)
class _Terms:
    """One part of the objective: losses [T] by term, and values [T] for metrics by name."""

    losses_T: dict[str, Tensor]
    metrics_T: dict[str, Tensor]


def objective(
    logprobs: LogProbs,
    streams_T: Mapping[str, Tensor],
    weights_T: Mapping[str, Tensor],
    valid_T: Tensor,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted loss of each token, and the sums for the metrics.

    Returns (loss_T, sums): sums are over valid tokens, as words of loss/exact_sum.py, which add up
    exactly.

    `streams_T`: "rollout_logp" (engine log-prob mu of the sampled token, nats) and "advantage";
    where the algorithm has it, "old_logp" (pi_old); and the streams of loss/token_weights.py.
    Without "old_logp" the step is on policy: pi_old is the detached student, so that ratios are 1
    and only the correction against the engine remains (SDPO 2601.20802, 2.1 steps 6 and 7).
    `weights_T`: one float64
    weight per term in use ("distill", "policy_gradient", "second_path", "nll"), 0 where a token
    does not take part. No collective.
    """
    assert logprobs.logp_T is not None and logprobs.entropy_T is not None
    logp_T = logprobs.logp_T
    detached_T = logp_T.detach()
    old_T = streams_T.get("old_logp", detached_T).to(detached_T.dtype)
    tis_T = tis(
        old_T, streams_T["rollout_logp"], algorithm.tis_clip, low=algorithm.tis_low, mode=algorithm.tis_mode
    )
    # The engine has no log-prob (NaN) for a response that is the solution from the dataset.
    sampled_T = valid_T & ~streams_T["rollout_logp"].isnan()
    gap_T = (detached_T - streams_T["rollout_logp"]).abs()
    metrics_T = {
        "tokens": valid_T,
        "entropy": weighted(logprobs.entropy_T, valid_T),
        "logp": weighted(detached_T, valid_T),
        "sampled_tokens": sampled_T,
        "rollout_gap": weighted(gap_T, sampled_T),
        "tis": weighted(tis_T, valid_T),
    }
    losses_T: dict[str, Tensor] = {}
    parts = []
    if algorithm.distill is not None:
        parts.append(_distill(logprobs, old_T, tis_T, weights_T, algorithm.distill))
    if algorithm.policy_gradient is not None:
        parts.append(
            _policy_gradient(logp_T, old_T, tis_T, streams_T, weights_T, valid_T, algorithm.policy_gradient)
        )
    for part in parts:
        losses_T |= part.losses_T
        # If both parts have a metric, the first part gives it. So "taught_tokens" counts the tokens
        # of the distillation term.
        metrics_T = part.metrics_T | metrics_T
    if algorithm.nll is not None:
        losses_T["nll"] = -algorithm.nll.coefficient * logp_T
    loss_T = torch.zeros_like(detached_T)
    total_T = torch.zeros_like(detached_T, dtype=torch.float64)
    for name, values_T in losses_T.items():
        loss_T = loss_T + weighted(values_T, weights_T[name].to(values_T.dtype))
        total_T = total_T + weighted(values_T.detach().double(), weights_T[name])
    metrics_T["loss"] = total_T
    words = exact_words(torch.stack([values_T.double() for values_T in metrics_T.values()]), dim=-1)
    return loss_T, dict(zip(metrics_T, words, strict=True))


def _distill(
    logprobs: LogProbs, old_T: Tensor, tis_T: Tensor, weights_T: Mapping[str, Tensor], term: DistillTerm
) -> _Terms:
    """The divergence times two detached ratios: student to pi_old, and pi_old to the engine."""
    assert logprobs.logp_T is not None
    ratio_T = is_ratio(logprobs.logp_T.detach(), old_T, term.is_clip)
    divergence_T = token_divergence(logprobs, term)
    distilled_T = weights_T["distill"] > 0
    return _Terms(
        {"distill": term.coefficient * ratio_T * tis_T * divergence_T},
        {"taught_tokens": distilled_T, "divergence": weighted(divergence_T.detach(), distilled_T)},
    )


def _policy_gradient(
    logp_T: Tensor,
    old_T: Tensor,
    tis_T: Tensor,
    streams_T: Mapping[str, Tensor],
    weights_T: Mapping[str, Tensor],
    valid_T: Tensor,
    term: PolicyGradientTerm,
) -> _Terms:
    """The policy gradient on the credited advantages, and the credit's second path, if any."""
    advantages_T, credit = streams_T["advantage"], term.credit
    metrics_T: dict[str, Tensor] = {}
    if credit is not None:
        advantages_T, metrics_T = credited(logp_T.detach(), streams_T, valid_T, credit)
    losses_T = {"policy_gradient": tis_T * _surrogate(logp_T, old_T, advantages_T, streams_T, term)}
    if credit is not None and "second_advantage" in streams_T:
        second_T = _surrogate(logp_T, old_T, streams_T["second_advantage"], streams_T, term)
        losses_T["second_path"] = credit.eta * tis_T * second_T
        metrics_T = metrics_T | {"second_path": weights_T["second_path"] > 0}
    return _Terms(losses_T, metrics_T)


def _surrogate(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantages_T: Tensor,
    streams_T: Mapping[str, Tensor],
    term: PolicyGradientTerm,
) -> Tensor:
    sequence_log_ratio_T = None
    if SURROGATE_TRAITS[term.surrogate].reads_sequence_ratio:
        # A step that is on policy has no such stream: the ratio of every sequence is 1.
        sequence_log_ratio_T = streams_T.get("sequence_log_ratio", torch.zeros_like(old_logp_T))
        sequence_log_ratio_T = sequence_log_ratio_T.to(logp_T.dtype)
    return term.coefficient * policy_gradient(
        logp_T,
        old_logp_T,
        advantages_T.to(logp_T.dtype),
        surrogate=term.surrogate,
        clip_low=term.clip_low,
        clip_high=term.clip_high,
        dual_clip=term.dual_clip,
        sequence_log_ratio_T=sequence_log_ratio_T,
    )


def credited(
    logp_T: Tensor, streams_T: Mapping[str, Tensor], valid_T: Tensor, credit: CreditConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Change the advantage of each token by the teacher's log-probability, as the credit says.

    A token without a teacher keeps its advantage. Returns (advantages_T, values_T for metrics).
    logp_T: the student's log-probabilities, detached. streams_T: "advantage", "teacher_logp",
    "distilled" (bool), and the streams that the credit's `prepare` has made (loss/credit.py). No
    collective.
    """
    distilled_T = streams_T["distilled"] & valid_T
    log_ratio_T = torch.where(distilled_T, streams_T["teacher_logp"].to(logp_T.dtype) - logp_T, 0.0)
    tokens = CreditTokens(streams_T["advantage"], log_ratio_T, distilled_T, streams_T)
    advantages_T, metrics_T = CREDITS[credit.kind].apply(tokens, credit)
    return advantages_T, {"taught_tokens": distilled_T, "log_ratio": log_ratio_T} | metrics_T
