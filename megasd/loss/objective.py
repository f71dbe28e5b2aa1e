"""The loss of some tokens: the algorithm's terms, each times its per-token weight, from what ops/readout.py says about the logits.

T response tokens. Weights already hold the global normaliser (loss/reduce.py), so the loss of a step is the plain sum over tokens,
microbatches, context- and data-parallel ranks. Replicated over tensor-parallel ranks: no process group in sight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasd.config import AlgorithmConfig
from megasd.loss.divergence import divergence
from megasd.loss.policy import is_ratio, policy_gradient, tis
from megasd.loss.reduce import exact_words, weigh
from megasd.ops.readout import Readout, ReadoutSpec


def readout_spec(algorithm: AlgorithmConfig, *, temperature: float, vocab_size: int) -> ReadoutSpec:
    """What the algorithm's terms need to know about the logits. temperature: the sampling temperature."""
    term = algorithm.distill
    if term is None:
        return ReadoutSpec(vocab_size=vocab_size, support="none", temperature=temperature)
    return ReadoutSpec(
        vocab_size=vocab_size,
        support="record" if algorithm.teacher.transport == "record" else term.support,
        top_k=term.top_k,
        tail=term.tail,
        beta=term.beta,
        clip=term.pointwise_clip,
        temperature=temperature,
        teacher_temperature=term.teacher_temperature or temperature,
    )


def objective(
    readout: Readout, streams_T: dict[str, Tensor], weights_T: dict[str, Tensor], valid_T: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_T, sums): weighted losses, and sums over valid tokens for metrics as words of loss/reduce.py, which add up exactly.

    `streams_T` holds "rollout_logp" (engine log-prob mu of the sampled token, nats) and "advantage"; `weights_T` one float64 weight per
    term in use ("distill", "policy_gradient", "nll"), 0 where a token does not take part. On-policy, one optimizer step a batch:
    pi_old is the detached student, so the clip ratio is 1 and only truncated importance sampling against the engine remains
    (SDPO 2601.20802, 2.1 steps 6 and 7). No collective.
    """
    logp_T = readout.logp_T
    detached_T = logp_T.detach()
    tis_T = tis(detached_T, streams_T["rollout_logp"], algorithm.tis_clip)
    terms_T = {}
    metrics_T = {"tokens": valid_T, "entropy": weigh(readout.entropy_T, valid_T), "logp": weigh(detached_T, valid_T)}
    metrics_T |= {"rollout_gap": weigh((detached_T - streams_T["rollout_logp"]).abs(), valid_T), "tis": weigh(tis_T, valid_T)}
    if algorithm.distill is not None:
        term = algorithm.distill
        div_T = readout.divergence_T
        if div_T is None:
            buckets = readout.student_logq_TB, readout.teacher_logq_TB
            div_T = divergence(*buckets, beta=term.beta, normalised=term.tail != "raw", clip=term.pointwise_clip)
        terms_T["distill"] = term.coefficient * is_ratio(detached_T, detached_T, term.is_clip) * tis_T * div_T
        taught_T = weights_T["distill"] > 0
        metrics_T |= {"taught_tokens": taught_T, "divergence": weigh(div_T.detach(), taught_T)}
    if algorithm.policy_gradient is not None:
        term = algorithm.policy_gradient
        pg_T = policy_gradient(logp_T, detached_T, streams_T["advantage"], clip_low=term.clip_low, clip_high=term.clip_high)
        terms_T["policy_gradient"] = term.coefficient * tis_T * pg_T
    if algorithm.nll is not None:
        terms_T["nll"] = -algorithm.nll.coefficient * logp_T
    weighed_T = [weigh(values_T, weights_T[name].to(values_T.dtype)) for name, values_T in terms_T.items()]
    metrics_T["loss"] = sum(weigh(values_T.detach().double(), weights_T[name]) for name, values_T in terms_T.items())
    words = exact_words(torch.stack([values_T.double() for values_T in metrics_T.values()]), dim=-1)
    return sum(weighed_T), dict(zip(metrics_T, words, strict=True))
