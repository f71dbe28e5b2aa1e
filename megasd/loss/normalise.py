"""From per-token losses to one number over microbatches and ranks: the only file that knows
Megatron's scaling.

What megatron-core 0.16.1 does with TransformerConfig.calculate_per_token_loss = True, which the
model must set (lines of that release):

    pipeline_parallel/schedules.py:257-263   a loss function that returns (loss, num_tokens, log) is
                                             divided neither by num_tokens nor by
                                             the number of microbatches; a 2-tuple would be multiplied by CP and divided by microbatches
    distributed/distributed_data_parallel.py:254-259   gradient_scaling_factor = 1 for dense and
                                                       expert parameters, and
                                             average_in_collective must be off: gradients are summed over DP x CP
    distributed/param_and_grad_buffer.py:391-397       so the buffers are not scaled and the collective is SUM
    pipeline_parallel/schedules.py:649,672 (no pipeline), 1210, 2175, 2219     num_tokens of the microbatches are added up, and
                                  :682,1921,2313       handed to config.finalize_model_grads_func
    distributed/finalize_model_grads.py:484-497        which all-reduces them and divides every
                                                       gradient by them if they are > 0,
                                             but skips all that, collectives included, when they are None

So: gradient of a step = plain sum over microbatches, DP and CP of the gradient of the returned
loss. We return sum_t weight_t loss_t whose weights hold the global normaliser already, count zero
tokens, and wrap finalize_model_grads with `without_division` so that it gets None. Nothing depends
on the number of microbatches, on DP, CP, PP or on how samples are dealt. Over TP the loss is
replicated, not summed.

Figures that are reported (the loss, metrics) and the normaliser itself are sums in exact fixed
point, `exact_words`: floating-point sums would depend on the order of the parts, these are the same
to the last bit for every layout whose per-token values are the same.

Two things in Megatron expect the division that is skipped: auxiliary losses of mixture-of-experts
routers (transformer/moe/router.py, 456-467 and 488-495: multiplied by local tokens) and of
multi-token prediction (models/gpt/gpt_model.py:654). A model that trains with either must scale its
coefficient by 1 / (tokens that enter the layers in a step, over DP x CP and microbatches); with
coefficient 0 nothing is to be done.

N samples of this rank, R response tokens of all N samples one after the other, T response tokens of
one microbatch on this rank.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

AGGREGATIONS = (
    "sequence_mean",
    "sequence_mean_taking_part",
    "token_mean",
    "sequence_sum",
    "token_mean_of_terms",
)
NORMALISERS = ("informative", "batch", "dataset", "none")
# units 2^-24 and 2^-60
HIGH_BITS, LOW_BITS = 24, 60
LIMIT, COARSE = 2.0**38, 2.0**8
MAX_VALUES = 2**28
MIN_WEIGHT = 2.0**-30
WEIGHT_BITS = 44


def exact_words(values: Tensor, *, dim: int | None = None) -> Tensor:
    """int64 [3]: the sum of all values (detached; float, int or bool) in fixed point. Words add up
    with plain `+`, in any order.

    A value x becomes high + low, high = round(x 2^24) in units of 2^-24, low = round of what is
    left in units of 2^-60, so x is taken to the nearest multiple of 2^-60 (8.7e-19; ties to even)
    and everything after that is integer addition. Bounds, for n < 2^28 (2.7e8) values over all
    parts: |low| <= 2^35 each, so the low word's sum stays below 2^63 and never needs a carry, which
    would make the words depend on the grouping (`exact_value` joins the two); the high word's sum
    is below 2^63 while the sum of |x| is below 2^39. The third word adds floor(|x| / 2^8), and 2^30
    for a value that is not finite or has |x| >= 2^38: from 2^30 on (some value of that kind, or a
    sum of |x| of about 2^38 = 2.7e11) `exact_value` is NaN; below it no word can have wrapped. dim:
    sum over that dimension alone, words in a new last one: [M, T] -> [M, 3] with dim=-1, for fewer
    kernels than M calls. ValueError for 2^28 values or more. No collective.
    """
    values = values.detach().double()
    if dim is None:
        values, dim = values.flatten(), 0
    if values.numel() >= MAX_VALUES:
        raise ValueError(f"exact_words takes fewer than 2^28 values, got {values.numel()}")
    size = values.abs()
    # False for NaN
    fits = size < LIMIT
    scaled = torch.where(fits, values, 0.0) * 2.0**HIGH_BITS
    high = scaled.round()
    # the difference is exact
    low = ((scaled - high) * 2.0 ** (LOW_BITS - HIGH_BITS)).round()
    guard = torch.where(fits, size, LIMIT) / COARSE
    return torch.stack([part.long().sum(dim) for part in (high, low, guard)], dim=-1)


def exact_value(words: Tensor) -> float:
    """The float64 nearest to the sum that words [3] hold; NaN when a value was not finite or the
    sum left its range (`exact_words`).
    """
    high, low, guard = words.tolist()
    return ((high << (LOW_BITS - HIGH_BITS)) + low) / 2**LOW_BITS if guard < LIMIT / COARSE else math.nan


@dataclass(frozen=True)
class Normaliser:
    """Global figures of one step for one loss term."""

    # what question weights are divided by; 0.0 when no question is informative (weight > 0)
    mean_weight: float
    # informative ones
    num_questions: int
    num_all_questions: int
    # all of the batch
    num_samples: int
    # samples with a token in the term's mask
    num_taking_part: int
    # in the term's mask
    num_tokens: int
    # in the mask of some term
    num_tokens_of_terms: int


def _of_samples(mask_R: Tensor, response_lens_N: Tensor) -> Tensor:
    """int64 [N]: tokens of each response that are in the mask."""
    owner_R = torch.arange(len(response_lens_N), device=mask_R.device).repeat_interleave(response_lens_N)
    return torch.zeros_like(response_lens_N).index_add_(0, owner_R, mask_R.to(response_lens_N.dtype))


def _check(question_weight_N: Tensor, mask_R: Tensor, response_lens_N: Tensor) -> None:
    if question_weight_N.shape != response_lens_N.shape:
        shapes = f"{tuple(question_weight_N.shape)} and {tuple(response_lens_N.shape)}"
        raise ValueError(
            f"question weights and response lengths must have one entry per sample, got shapes {shapes}"
        )
    if mask_R.shape != (int(response_lens_N.sum()),):
        raise ValueError(
            f"a mask must have one entry per response token, {int(response_lens_N.sum())}, got shape"
            f" {tuple(mask_R.shape)}"
        )


def _check_weights(weight_N: Tensor) -> None:
    if not ((weight_N == 0) | (weight_N >= MIN_WEIGHT)).all():
        # Smaller ones would drown in the quantum of the sum; only ratios of weights count, so a
        # rule can be scaled.
        raise ValueError(
            f"question weights must be 0 or at least 2^-30, got {weight_N.min().item()}; multiply the rule by"
            " a constant"
        )


def global_normalisers(
    weights: dict[str, Tensor],
    question_size_N: Tensor,
    masks: dict[str, Tensor],
    response_lens_N: Tensor,
    *,
    normaliser: str = "informative",
    dataset_mean: float | None = None,
    dp_group: dist.ProcessGroup | None = None,
) -> dict[str, Normaliser]:
    """Loss term -> its figures over the data-parallel group, the same on every rank and for every
    dealing of the samples, bit for bit.

    Each sample of a question of n samples brings w / n, 1[w > 0] / n and 1 / n, so the sums are
    over unique questions although a question's samples may lie on several ranks. normaliser: what
    weights are divided by. "informative": their mean over the questions with w > 0 of the batch
    (SC-SDPO 2605.27765, eq. 16); "batch": over all its questions; "dataset": dataset_mean, the mean
    over the training rows (PACED 2603.11178 as SC-SDPO ran it); "none": 1. weights: term -> [N] raw
    weights of the samples' questions in that term, 0 or at least 2^-30. question_size_N: number of
    the question's samples in the WHOLE batch. masks: term -> bool [R], response tokens that take
    part in it; the same terms on every rank. dp_group: data parallel WITHOUT context parallel,
    since context-parallel ranks hold the same samples; every rank must call, one without samples
    too. One all_reduce of 5 + 8 len(masks) int64; none when dp_group is None or has one rank.
    ValueError: names, shapes or weights that are not as said, and, on all ranks alike, question
    sizes that do not fit the samples.
    """
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {', '.join(NORMALISERS)}, got {normaliser!r}")
    if normaliser == "dataset" and not (dataset_mean is not None and dataset_mean > 0):
        raise ValueError(
            "normaliser 'dataset' needs the mean weight of the training rows, greater than 0, got"
            f" {dataset_mean}"
        )
    names, size_N = sorted(masks), question_size_N.double()
    any_R = torch.zeros(int(response_lens_N.sum()), dtype=torch.bool, device=response_lens_N.device)
    parts = []
    for name in names:
        weight_N, mask_R = weights[name].double(), masks[name]
        _check(weight_N, mask_R, response_lens_N)
        _check_weights(weight_N)
        any_R = any_R | mask_R
        counts = torch.stack([(_of_samples(mask_R, response_lens_N) > 0).sum(), mask_R.sum()])
        parts += [exact_words(weight_N / size_N), exact_words((weight_N > 0) / size_N), counts]
    num_samples = torch.tensor(len(response_lens_N), device=response_lens_N.device)
    words = torch.cat([exact_words(1 / size_N), torch.stack([num_samples, any_R.sum()]), *parts])
    if dp_group is not None and dist.get_world_size(dp_group) > 1:
        dist.all_reduce(words, group=dp_group)
    all_questions = _count(words[:3])
    num_samples, num_tokens_of_terms = words[3:5].tolist()
    found = {}
    for name, part in zip(names, words[5:].view(-1, 8), strict=True):
        weight, questions, (taking_part, num_tokens) = (
            exact_value(part[:3]),
            _count(part[3:6]),
            part[6:].tolist(),
        )
        if not math.isfinite(weight):
            raise ValueError(f"question weights of the term {name!r} are beyond 2^38")
        divisor = {"informative": questions, "batch": all_questions}.get(normaliser)
        mean = (
            {"none": 1.0, "dataset": dataset_mean}.get(normaliser)
            if divisor is None
            else weight / max(divisor, 1)
        )
        counts = questions, all_questions, num_samples, taking_part, num_tokens, num_tokens_of_terms
        found[name] = Normaliser(mean if questions else 0.0, *counts)
    return found


def _count(words: Tensor) -> int:
    """The number of questions whose samples brought 1 / n each."""
    value = exact_value(words)
    if not abs(value - round(value if math.isfinite(value) else 0.0)) <= 1e-6:
        raise ValueError(f"{value} questions in the batch: question sizes do not fit the samples")
    return round(value)


def term_weights(
    question_weight_N: Tensor,
    mask_R: Tensor,
    response_lens_N: Tensor,
    *,
    normaliser: Normaliser,
    aggregation: str,
    room: int = 1,
) -> Tensor:
    """weight_R float64: the factor of each response token's loss, such that the plain sum over all
    ranks is the loss of the step.

    With w the question's weight over normaliser.mean_weight, 0 for tokens outside mask_R (bool
    [R]), and n_i the tokens of a response that take part: "sequence_mean": w / (B n_i), B all
    samples of the batch, those outside the mask included (released SDPO 2601.20802; SC-SDPO keeps
    that denominator); "sequence_mean_taking_part": w / (samples with a token in the mask * n_i);
    "token_mean": w / (tokens in the mask, over the whole batch; DAPO 2503.14476); "sequence_sum": w
    / (B room), room a constant such as the longest response's tokens (Dr. GRPO 2503.20783);
    "token_mean_of_terms": w / (tokens in the mask of some term; SRPO 2604.02288). Equal weights
    give w = 1 exactly: w is rounded to 44 bits, which takes up what the mean's last bits miss
    (relative 2.8e-14). No informative question: all weights 0. Cast where it is used; the same
    float64 whatever the layout is. No collective.
    """
    _check(question_weight_N, mask_R, response_lens_N)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    weight_N = question_weight_N.double()
    if normaliser.mean_weight > 0:
        mantissa_N, exponent_N = torch.frexp(weight_N / normaliser.mean_weight)
        weight_N = torch.ldexp((mantissa_N * 2.0**WEIGHT_BITS).round() / 2.0**WEIGHT_BITS, exponent_N)
    of_samples_N = _of_samples(mask_R, response_lens_N).clamp(min=1)
    divisor_N = {
        "sequence_mean": normaliser.num_samples * of_samples_N,
        "sequence_mean_taking_part": normaliser.num_taking_part * of_samples_N,
        "token_mean": torch.full_like(of_samples_N, normaliser.num_tokens),
        "sequence_sum": torch.full_like(of_samples_N, normaliser.num_samples * room),
        "token_mean_of_terms": torch.full_like(of_samples_N, normaliser.num_tokens_of_terms),
    }[aggregation]
    weight_N = weight_N / divisor_N.clamp(min=1)
    return torch.where(mask_R, weight_N.repeat_interleave(response_lens_N), 0.0)


def weighted(values_T: Tensor, weight_T: Tensor) -> Tensor:
    """weight * value, exactly 0 (and with gradient 0) where the weight is 0, whatever stands there,
    NaN included.
    """
    return torch.where(weight_T != 0, values_T * weight_T, 0.0)


def megatron_loss(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The 3-tuple that Megatron's schedules take from a loss function: (loss, zero tokens, empty log).

    loss: scalar with gradient, the sum of weight * loss over this microbatch's tokens with their
    `term_weights`; it must hang on the model's graph even when no token has a weight. Returned as
    it is: neither Megatron nor this function scales it. No collective.
    """
    if loss.dim() != 0:
        raise ValueError(f"the loss of a microbatch must be a scalar, got shape {tuple(loss.shape)}")
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}


def without_division(finalize_model_grads: Callable[..., None]) -> Callable[..., None]:
    """Megatron's finalize_model_grads as config.finalize_model_grads_func must be here: the
    gradients stay the plain sums (see above).
    """

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
    """Global metrics from local `exact_words`: the plain sum, or sum / sum of the metric that
    `weights` names (0.0 when that is 0).

    reduce_metrics({"loss": words, "tokens": words, "entropy": words}, {"entropy": "tokens"}, ...):
    entropy per token. group: DP x CP (each token is on one of its ranks). All ranks must bring the
    same names, also those with nothing to add (zero words). One all_reduce of 3 int64 per metric on
    `device`; none when group is None or has one rank. The result is the same to the last bit for
    every order of parts and ranks. NaN for a metric with a value that is not finite. ValueError for
    a name in weights without a sum.
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
