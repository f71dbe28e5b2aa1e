"""The loss of a microbatch: the algorithm's terms on response tokens, each times its per-token weight.

T response tokens, V local vocabulary shard. Weights already hold the global normaliser (loss/reduce.py), so the loss of
a step is the plain sum over tokens, microbatches, context- and data-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasd.config import AlgorithmConfig
from megasd.loss.divergence import divergence
from megasd.loss.policy import is_ratio, policy_gradient, tis
from megasd.ops.topk import vocab_parallel_topk
from megasd.ops.vocab_parallel import bucket_logprobs, entropy, full_divergence, sampled_logp


def objective(
    logits_TV: Tensor,
    teacher_logits_TV: Tensor | None,
    targets_T: Tensor,
    streams_T: dict[str, Tensor],
    weights_T: dict[str, Tensor],
    valid_T: Tensor,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_T, sums): weighted losses, the same on all tensor-parallel ranks, and sums over valid tokens for metrics.

    `streams_T` holds "rollout_logp" (engine log-prob mu of the sampled token, nats) and "advantage"; `weights_T` one weight per
    term in use ("distill", "policy_gradient", "nll"), 0 where a token does not take part. On-policy, one optimizer step a batch:
    pi_old is the detached student, so the clip ratio is 1 and only truncated importance sampling against the engine remains
    (SDPO 2601.20802, 2.1 steps 6 and 7). Collectives: those of ops/, over `tp_group`.
    """
    shard = {"vocab_size": vocab_size, "tp_group": tp_group}
    logp_T = sampled_logp(logits_TV, targets_T, temperature=temperature, **shard)
    detached_T = logp_T.detach()
    tis_T = tis(detached_T, streams_T["rollout_logp"], algorithm.tis_clip)
    loss_T = torch.zeros_like(logp_T)
    sums = {"tokens": valid_T.sum()}
    if algorithm.distill is not None:
        term, weight_T = algorithm.distill, weights_T["distill"]
        if term.support == "full":
            div_T = full_divergence(logits_TV, teacher_logits_TV, beta=term.beta, temperature=temperature, **shard)
        else:
            ids_TK, _ = vocab_parallel_topk(logits_TV.detach(), term.top_k, **shard)
            student_TB = bucket_logprobs(logits_TV, ids_TK, temperature=temperature, tail=term.tail, **shard)
            with torch.no_grad():
                teacher_TB = bucket_logprobs(teacher_logits_TV, ids_TK, temperature=temperature, tail=term.tail, **shard)
            div_T = divergence(student_TB, teacher_TB, beta=term.beta, normalised=term.tail != "raw")
        ratio_T = is_ratio(detached_T, detached_T, term.is_clip)
        loss_T = loss_T + term.coefficient * _weigh(ratio_T * tis_T * div_T, weight_T)
        taught_T = weight_T > 0
        sums |= {"taught_tokens": taught_T.sum(), "divergence": div_T.detach()[taught_T].sum()}
    if algorithm.policy_gradient is not None:
        term = algorithm.policy_gradient
        pg_T = policy_gradient(logp_T, detached_T, streams_T["advantage"], clip_low=term.clip_low, clip_high=term.clip_high)
        loss_T = loss_T + term.coefficient * _weigh(tis_T * pg_T, weights_T["policy_gradient"])
    if algorithm.nll is not None:
        loss_T = loss_T - algorithm.nll.coefficient * _weigh(logp_T, weights_T["nll"])
    with torch.no_grad():
        gap_T = (detached_T - streams_T["rollout_logp"])[valid_T]
        sums |= {
            "entropy": entropy(logits_TV.detach(), temperature=temperature, **shard)[valid_T].sum(),
            "logp": detached_T[valid_T].sum(),
            "rollout_gap": gap_T.abs().sum(),
            "tis": tis_T[valid_T].sum(),
        }
    return loss_T, sums


def _weigh(values_T: Tensor, weight_T: Tensor) -> Tensor:
    """weight * value, exactly 0 where the weight is 0, whatever the value."""
    return torch.where(weight_T != 0, values_T * weight_T, 0.0)
