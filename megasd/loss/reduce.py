"""From per-token losses to one number over microbatches and ranks: the only file that knows Megatron's scaling.

What megatron-core 0.16.1 does with TransformerConfig.calculate_per_token_loss = True, which the model must set (lines of that release):

    pipeline_parallel/schedules.py:257-263   a loss function that returns (loss, num_tokens, log) is divided neither by num_tokens nor by
                                             the number of microbatches; a 2-tuple would be multiplied by CP and divided by microbatches
    distributed/distributed_data_parallel.py:254-259   gradient_scaling_factor = 1 for dense and expert parameters, and
                                             average_in_collective must be off: gradients are summed over DP x CP
    distributed/param_and_grad_buffer.py:391-397       so the buffers are not scaled and the collective is SUM
    pipeline_parallel/schedules.py:649,672 (no pipeline), 1210, 2175, 2219     num_tokens of the microbatches are added up, and
                                  :682,1921,2313       handed to config.finalize_model_grads_func
    distributed/finalize_model_grads.py:484-497        which all-reduces them and divides every gradient by them if they are > 0,
                                             but skips all that, collectives included, when they are None

So: gradient of a step = plain sum over microbatches, DP and CP of the gradient of the returned loss. We return sum_t weight_t loss_t
whose weights hold the global normaliser already, count zero tokens, and wrap finalize_model_grads with `without_division` so that it gets
None. Nothing depends on the number of microbatches, on DP, CP, PP or on how samples are dealt. Over TP the loss is replicated, not summed.

Two things in Megatron expect the division that is skipped: auxiliary losses of mixture-of-experts routers (transformer/moe/router.py,
456-467 and 488-495: multiplied by local tokens) and of multi-token prediction (models/gpt/gpt_model.py:654). A model that trains with
either must scale its coefficient by 1 / (tokens that enter the layers in a step, over DP x CP and microbatches); with coefficient 0 nothing
is to be done.

N samples of this rank, R response tokens of all N samples one after the other, T response tokens of one microbatch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

AGGREGATIONS = ("sequence_mean", "token_mean")


@dataclass(frozen=True)
class Normaliser:
    """Global figures of one step: mean_weight over informative questions (weight > 0), their number, all samples, tokens in the mask."""

    mean_weight: float  # 0.0 when no question is informative
    num_questions: float
    num_samples: float
    num_tokens: float


def _check(question_weight_N: Tensor, mask_N: Tensor, response_lens_N: Tensor) -> None:
    if not question_weight_N.shape == mask_N.shape == response_lens_N.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (question_weight_N, mask_N, response_lens_N))
        raise ValueError(f"question weights, mask and response lengths must have one entry per sample, got shapes {shapes}")


def global_normaliser(
    question_weight_N: Tensor,
    question_size_N: Tensor,
    mask_N: Tensor,
    response_lens_N: Tensor,
    *,
    dp_group: dist.ProcessGroup | None = None,
) -> Normaliser:
    """Figures over the data-parallel group. Each sample of a question of n samples brings w / n and 1[w > 0] / n, so the sums are over
    unique questions although a question's samples may lie on several ranks (SC-SDPO 2605.27765, eq. 16: the mean is over questions).

    question_weight_N: raw weights of the samples' questions (>= 0). question_size_N: number of the question's samples in the WHOLE batch.
    mask_N: samples that take part in the loss term (taught ones for distillation). dp_group: data parallel WITHOUT context parallel, since
    context-parallel ranks hold the same samples; every rank must call, one without samples too. One all_reduce of 4 float64; None: none.
    """
    _check(question_weight_N, mask_N, response_lens_N)
    weight_N, size_N = question_weight_N.double(), question_size_N.double()
    sums = torch.stack(
        [
            (weight_N / size_N).sum(),
            ((weight_N > 0) / size_N).sum(),
            weight_N.new_tensor(float(len(weight_N))),
            (response_lens_N * mask_N).sum().double(),
        ]
    )
    if dp_group is not None and dist.get_world_size(dp_group) > 1:
        dist.all_reduce(sums, group=dp_group)
    weight, num_questions, num_samples, num_tokens = sums.tolist()
    return Normaliser(weight / num_questions if num_questions > 0 else 0.0, num_questions, num_samples, num_tokens)


def token_weights(
    question_weight_N: Tensor, mask_N: Tensor, response_lens_N: Tensor, *, normaliser: Normaliser, aggregation: str
) -> Tensor:
    """weight_R float32: the factor of each response token's loss, such that the plain sum over all ranks is the loss of the step.

    With w the question's weight over normaliser.mean_weight, and 0 for samples outside mask_N:
    "sequence_mean": w / (B |y_i|), B all samples of the batch, those outside the mask included (released SDPO 2601.20802; SC-SDPO
    keeps that denominator); "token_mean": w / (number of response tokens inside the mask, over the whole batch).
    No informative question: all weights 0. No collective.
    """
    _check(question_weight_N, mask_N, response_lens_N)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    weight_N = question_weight_N.double() * mask_N
    if normaliser.mean_weight > 0:
        weight_N = weight_N / normaliser.mean_weight
    if aggregation == "sequence_mean":
        weight_N = weight_N / (normaliser.num_samples * response_lens_N.clamp(min=1))
    else:
        weight_N = weight_N / max(normaliser.num_tokens, 1.0)
    return weight_N.float().repeat_interleave(response_lens_N)


def weighted_sum(loss_T: Tensor, weight_T: Tensor) -> Tensor:
    """Scalar float32 sum of weight * loss; a token of weight 0 adds exactly 0, whatever its loss."""
    return torch.where(weight_T != 0, loss_T * weight_T, 0.0).float().sum()


def megatron_loss(loss_T: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The 3-tuple that Megatron's schedules take from a loss function: (sum of weighted losses, zero tokens, log).

    loss_T per-token losses with gradient, weight_T their `token_weights`; T may be 0 only if loss_T still hangs on the model's graph.
    log["loss"] is this microbatch's share (detached): its sum over microbatches, DP and CP is the loss of the step. No collective.
    """
    loss = weighted_sum(loss_T, weight_T)
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {"loss": loss.detach()}


def without_division(finalize_model_grads: Callable[..., None]) -> Callable[..., None]:
    """Megatron's finalize_model_grads as config.finalize_model_grads_func must be here: the gradients stay the plain sums (see above)."""

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
        finalize_model_grads(model, None, **kwargs)

    return finalize


def reduce_metrics(
    sums: dict[str, Tensor | float],
    weights: dict[str, Tensor | float],
    *,
    group: dist.ProcessGroup | None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Global metrics from local sums: sum / weight where `weights` has the name (0.0 when the global weight is 0), the plain sum elsewhere.

    group: DP x CP (each token is on one of its ranks). All ranks must bring the same names, also those with nothing to add (0.0).
    One all_reduce of float64 words; none when group is None. ValueError for a weight without a sum.
    """
    unknown = sorted(set(weights) - set(sums))
    if unknown:
        raise ValueError(f"metric weights without a sum: {', '.join(unknown)}")
    names, weighted = sorted(sums), sorted(weights)
    words = torch.tensor([float(sums[n]) for n in names] + [float(weights[n]) for n in weighted], dtype=torch.float64, device=device)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(words, group=group)
    totals = dict(zip(names, words[: len(names)].tolist(), strict=True))
    for name, weight in zip(weighted, words[len(names) :].tolist(), strict=True):
        totals[name] = totals[name] / weight if weight else 0.0
    return totals
