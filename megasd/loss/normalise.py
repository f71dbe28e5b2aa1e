"""Token weights that make the plain sum over microbatches and ranks the loss of a step.

N samples of this rank, R response tokens of all N samples one after another, T response tokens of
one microbatch. Sums over ranks are exact (loss/exact_sum.py), so the weights do not depend on the
layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.loss.exact_sum import exact_value, exact_words

AGGREGATIONS = (
    "sequence_mean",
    "sequence_mean_taking_part",
    "token_mean",
    "sequence_sum",
    "token_mean_of_terms",
)
NORMALISERS = ("informative", "batch", "dataset", "none")
MIN_WEIGHT = 2.0**-30
WEIGHT_BITS = 44


@dataclass(frozen=True)
class Normaliser:
    """Global counts of one step for one loss term, and the mean weight of its questions."""

    # Question weights are divided by this number. It is 0.0 when no question is informative.
    mean_weight: float
    # The number of informative questions: questions of weight > 0.
    num_questions: int
    num_all_questions: int
    # The number of all samples of the batch.
    num_samples: int
    # The number of samples with a token in the term's mask.
    num_taking_part: int
    # The number of tokens in the term's mask.
    num_tokens: int
    # The number of tokens in the mask of at least one term.
    num_tokens_of_terms: int


def _of_samples(mask_R: Tensor, response_lens_N: Tensor) -> Tensor:
    """Int64 [N]: the number of tokens of each response that are in the mask."""
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
        # A smaller weight would vanish in the quantum of the sum. Only ratios of weights count, so
        # the user can scale the rule that makes the weights.
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
    """Compute the normaliser of each loss term over the data-parallel group.

    The result is bit for bit the same on every rank and for every assignment of samples to ranks.

    Each sample of a question of n samples brings w / n, 1[w > 0] / n and 1 / n, so the sums are
    over unique questions although a question's samples may lie on several ranks. normaliser: the
    divisor of the weights. "informative": the mean weight of the batch's questions with w > 0
    (SC-SDPO 2605.27765, eq. 16); "batch": the mean weight of all the batch's questions; "dataset":
    dataset_mean, the mean over the training rows (PACED 2603.11178 as SC-SDPO ran it); "none": 1.
    weights: term -> [N] raw weights of the samples' questions in that term, 0 or at least 2^-30.
    question_size_N: number of the question's samples in the WHOLE batch. masks: term -> bool [R],
    response tokens that take part in it; the same terms on every rank. dp_group: data parallel
    WITHOUT context parallel, since context-parallel ranks hold the same samples; every rank must
    call, also a rank without samples. One all_reduce of 5 + 8 len(masks) int64; none when dp_group
    is None or has one rank. ValueError for names, shapes or weights that are not as described here
    and, on all ranks alike, for question sizes that do not fit the samples.
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
    found = {}
    for name, part in zip(names, words[5:].view(-1, 8), strict=True):
        found[name] = _normaliser(name, all_questions, words[3:5], part, normaliser, dataset_mean)
    return found


def _normaliser(
    name: str,
    all_questions: int,
    of_batch: Tensor,
    of_term: Tensor,
    normaliser: str,
    dataset_mean: float | None,
) -> Normaliser:
    """Make the normaliser of one term from words that are summed over the ranks.

    of_batch [2]: samples, tokens of terms; of_term [8]: weight (3), questions with a weight (3),
    samples that take part, tokens.
    """
    questions = _count(of_term[3:6])
    num_samples, num_tokens_of_terms = of_batch.tolist()
    taking_part, num_tokens = of_term[6:].tolist()
    weight = exact_value(of_term[:3])
    if not math.isfinite(weight):
        raise ValueError(f"question weights of the term {name!r} are beyond 2^38")
    if normaliser == "dataset":
        assert dataset_mean is not None, "global_normalisers has checked it"
        mean = dataset_mean
    else:
        divisors = {"informative": questions, "batch": all_questions}
        mean = 1.0 if normaliser == "none" else weight / max(divisors[normaliser], 1)
    return Normaliser(
        mean_weight=mean if questions else 0.0,
        num_questions=questions,
        num_all_questions=all_questions,
        num_samples=num_samples,
        num_taking_part=taking_part,
        num_tokens=num_tokens,
        num_tokens_of_terms=num_tokens_of_terms,
    )


def _count(words: Tensor) -> int:
    """The number of questions, from words to which each of a question's n samples added 1 / n."""
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
    """Compute weight_R (float64), the factor of each response token's loss.

    With these weights the plain sum over all ranks is the loss of the step. With w the question's
    weight over normaliser.mean_weight, 0 for tokens outside mask_R (bool [R]), and n_i the tokens
    of a response that take part: "sequence_mean": w / (B n_i), B all samples of the batch, samples
    outside the mask included (released SDPO 2601.20802; SC-SDPO keeps this denominator);
    "sequence_mean_taking_part": w / (samples with a token in the mask * n_i); "token_mean": w /
    (tokens in the mask, over the whole batch; DAPO 2503.14476); "sequence_sum": w / (B room), room
    a constant such as the longest response's tokens (Dr. GRPO 2503.20783); "token_mean_of_terms": w
    / (tokens in the mask of at least one term; SRPO 2604.02288). Equal weights give w = 1 exactly:
    w is rounded to 44 bits, which absorbs the rounding error of the mean (relative 2.8e-14). If no
    question is informative, all weights are 0. The weights are the same float64 for every layout;
    callers cast them where they use them. ValueError for shapes that do not fit together and for an
    unknown aggregation. No collective.
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
    """weight * value; a weight of 0 gives exactly 0 with gradient 0, even if the value is NaN."""
    return torch.where(weight_T != 0, values_T * weight_T, 0.0)
