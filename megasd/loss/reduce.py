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

Figures that are reported (the loss, metrics) and the normaliser itself are sums in exact fixed point, `exact_words`: floating-point sums
would depend on the order of the parts, these are the same to the last bit for every layout whose per-token values are the same.

Two things in Megatron expect the division that is skipped: auxiliary losses of mixture-of-experts routers (transformer/moe/router.py,
456-467 and 488-495: multiplied by local tokens) and of multi-token prediction (models/gpt/gpt_model.py:654). A model that trains with
either must scale its coefficient by 1 / (tokens that enter the layers in a step, over DP x CP and microbatches); with coefficient 0 nothing
is to be done.

N samples of this rank, R response tokens of all N samples one after the other, T response tokens of one microbatch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

AGGREGATIONS = ("sequence_mean", "token_mean")
HIGH_BITS, LOW_BITS = 24, 60  # units 2^-24 and 2^-60
LIMIT, COARSE = 2.0**38, 2.0**8
MAX_VALUES = 2**28
MIN_WEIGHT = 2.0**-30


def exact_words(values: Tensor, *, dim: int | None = None) -> Tensor:
    """int64 [3]: the sum of all values (detached; float, int or bool) in fixed point. Words add up with plain `+`, in any order.

    A value x becomes high + low, high = round(x 2^24) in units of 2^-24, low = round of what is left in units of 2^-60, so x is taken to
    the nearest multiple of 2^-60 (8.7e-19; ties to even) and everything after that is integer addition. Bounds, for n < 2^28 (2.7e8)
    values over all parts: |low| <= 2^35 each, so the low word's sum stays below 2^63 and never needs a carry, which would make the words
    depend on the grouping (`exact_value` joins the two); the high word's sum is below 2^63 while the sum of |x| is below 2^39. The third
    word adds floor(|x| / 2^8), and 2^30 for a value that is not finite or has |x| >= 2^38: from 2^30 on (some value of that kind, or a
    sum of |x| of about 2^38 = 2.7e11) `exact_value` is NaN; below it no word can have wrapped.
    dim: sum over that dimension alone, words in a new last one: [M, T] -> [M, 3] with dim=-1, for fewer kernels than M calls.
    ValueError for 2^28 values or more. No collective.
    """
    values = values.detach().double()
    if dim is None:
        values, dim = values.flatten(), 0
    if values.numel() >= MAX_VALUES:
        raise ValueError(f"exact_words takes fewer than 2^28 values, got {values.numel()}")
    size = values.abs()
    fits = size < LIMIT  # False for NaN
    scaled = torch.where(fits, values, 0.0) * 2.0**HIGH_BITS
    high = scaled.round()
    low = ((scaled - high) * 2.0 ** (LOW_BITS - HIGH_BITS)).round()  # the difference is exact
    guard = torch.where(fits, size, LIMIT) / COARSE
    return torch.stack([part.long().sum(dim) for part in (high, low, guard)], dim=-1)


def exact_value(words: Tensor) -> float:
    """The float64 nearest to the sum that words [3] hold; NaN when a value was not finite or the sum left its range (`exact_words`)."""
    high, low, guard = words.tolist()
    return ((high << (LOW_BITS - HIGH_BITS)) + low) / 2**LOW_BITS if guard < LIMIT / COARSE else math.nan


@dataclass(frozen=True)
class Normaliser:
    """Global figures of one step: mean_weight over informative questions (weight > 0), their number, all samples, tokens in the mask."""

    mean_weight: float  # 0.0 when no question is informative
    num_questions: int
    num_samples: int
    num_tokens: int


def _check(question_weight_N: Tensor, mask_N: Tensor, response_lens_N: Tensor) -> None:
    if not question_weight_N.shape == mask_N.shape == response_lens_N.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (question_weight_N, mask_N, response_lens_N))
        raise ValueError(f"question weights, mask and response lengths must have one entry per sample, got shapes {shapes}")


def global_normalisers(
    question_weight_N: Tensor,
    question_size_N: Tensor,
    masks: dict[str, Tensor],
    response_lens_N: Tensor,
    *,
    dp_group: dist.ProcessGroup | None = None,
) -> dict[str, Normaliser]:
    """Loss term -> its figures over the data-parallel group, the same on every rank and for every dealing of the samples, bit for bit.

    Each sample of a question of n samples brings w / n and 1[w > 0] / n, so the sums are over unique questions although a question's
    samples may lie on several ranks (SC-SDPO 2605.27765, eq. 16: the mean is over questions). The terms differ in num_tokens alone.
    question_weight_N: raw weights of the samples' questions, 0 or at least 2^-30. question_size_N: number of the question's samples in the
    WHOLE batch. masks: term -> [N], samples that take part in it (taught ones for distillation); the same terms on every rank.
    dp_group: data parallel WITHOUT context parallel, since context-parallel ranks hold the same samples; every rank must call, one without
    samples too. One all_reduce of 7 + len(masks) int64; none when dp_group is None or has one rank.
    ValueError: shapes or weights that are not as said, and, on all ranks alike, question sizes that do not fit the samples.
    """
    for mask_N in masks.values():
        _check(question_weight_N, mask_N, response_lens_N)
    weight_N, size_N = question_weight_N.double(), question_size_N.double()
    informative_N = weight_N > 0
    if not ((weight_N == 0) | (informative_N & (weight_N >= MIN_WEIGHT))).all():
        # Smaller ones would drown in the quantum of the sum; only ratios of weights count, so a rule can be scaled.
        raise ValueError(f"question weights must be 0 or at least 2^-30, got {weight_N.min().item()}; multiply the rule by a constant")
    names = sorted(masks)
    counts = [weight_N.new_tensor(len(weight_N), dtype=torch.int64), *((response_lens_N * masks[name]).sum() for name in names)]
    words = torch.cat([exact_words(weight_N / size_N), exact_words(informative_N / size_N), torch.stack(counts).long()])
    if dp_group is not None and dist.get_world_size(dp_group) > 1:
        dist.all_reduce(words, group=dp_group)
    weight, questions = exact_value(words[:3]), exact_value(words[3:6])
    if not math.isfinite(weight) or abs(questions - round(questions)) > 1e-6:
        raise ValueError(f"{questions} informative questions of total weight {weight}: question sizes do not fit, or weights beyond 2^38")
    num_questions = round(questions)
    mean_weight = weight / num_questions if num_questions else 0.0
    num_samples, *num_tokens = words[6:].tolist()
    return {name: Normaliser(mean_weight, num_questions, num_samples, n) for name, n in zip(names, num_tokens, strict=True)}


def token_weights(
    question_weight_N: Tensor, mask_N: Tensor, response_lens_N: Tensor, *, normaliser: Normaliser, aggregation: str
) -> Tensor:
    """weight_R float64: the factor of each response token's loss, such that the plain sum over all ranks is the loss of the step.

    With w the question's weight over normaliser.mean_weight, and 0 for samples outside mask_N:
    "sequence_mean": w / (B |y_i|), B all samples of the batch, those outside the mask included (released SDPO 2601.20802; SC-SDPO
    keeps that denominator); "token_mean": w / (number of response tokens inside the mask, over the whole batch).
    No informative question: all weights 0. Cast where it is used; the same float64 whatever the layout is. No collective.
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
        weight_N = weight_N / max(normaliser.num_tokens, 1)
    return weight_N.repeat_interleave(response_lens_N)


def weigh(values_T: Tensor, weight_T: Tensor) -> Tensor:
    """weight * value, exactly 0 (and with gradient 0) where the weight is 0, whatever stands there, NaN included."""
    return torch.where(weight_T != 0, values_T * weight_T, 0.0)


def megatron_loss(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The 3-tuple that Megatron's schedules take from a loss function: (loss, zero tokens, empty log).

    loss: scalar with gradient, the sum of weight * loss over this microbatch's tokens with their `token_weights`; it must hang on the
    model's graph even when no token has a weight. Returned as it is: neither Megatron nor this function scales it. No collective.
    """
    if loss.dim() != 0:
        raise ValueError(f"the loss of a microbatch must be a scalar, got shape {tuple(loss.shape)}")
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}


def without_division(finalize_model_grads: Callable[..., None]) -> Callable[..., None]:
    """Megatron's finalize_model_grads as config.finalize_model_grads_func must be here: the gradients stay the plain sums (see above)."""

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
        finalize_model_grads(model, None, **kwargs)

    return finalize


def reduce_metrics(
    sums: dict[str, Tensor],
    weights: dict[str, str],
    *,
    group: dist.ProcessGroup | None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Global metrics from local `exact_words`: the plain sum, or sum / sum of the metric that `weights` names (0.0 when that is 0).

    reduce_metrics({"loss": words, "tokens": words, "entropy": words}, {"entropy": "tokens"}, ...): entropy per token.
    group: DP x CP (each token is on one of its ranks). All ranks must bring the same names, also those with nothing to add (zero words).
    One all_reduce of 3 int64 per metric on `device`; none when group is None or has one rank. The result is the same to the last bit for
    every order of parts and ranks. NaN for a metric with a value that is not finite. ValueError for a name in weights without a sum.
    """
    unknown = sorted((set(weights) | set(weights.values())) - set(sums))
    if unknown:
        raise ValueError(f"metric weights without a sum: {', '.join(unknown)}")
    names = sorted(sums)
    if not names:
        return {}
    words = torch.stack([sums[name].to(device) for name in names])
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(words, group=group)
    totals = dict(zip(names, (exact_value(one) for one in words.cpu()), strict=True))
    means = {name: totals[name] / totals[by] if totals[by] else 0.0 for name, by in weights.items()}
    return totals | means
