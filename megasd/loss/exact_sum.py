"""Sums in exact fixed point, which are the same to the last bit for every order of the values.

A floating-point sum depends on the order of the values. Metrics, the loss that is logged and the
normaliser are sums of int64 words instead. So they are the same for every layout whose per-token
values are the same.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

# The units of the high and the low word are 2^-24 and 2^-60.
HIGH_BITS, LOW_BITS = 24, 60
LIMIT, COARSE = 2.0**38, 2.0**8
MAX_VALUES = 2**28


def exact_words(values: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum all values in fixed point: int64 words [3], which add up with plain `+` in any order.

    values are float, int or bool, and are detached. A value x becomes high + low, high = round(x
    2^24) in units of 2^-24, low = round of the remainder in units of 2^-60. So x is taken to the
    nearest multiple of 2^-60 (8.7e-19; ties to even), and all later steps are integer additions.
    Bounds, for n < 2^28 (2.7e8) values over all parts: |low| <= 2^35 each, so the low word's sum
    stays below 2^63 and never needs a carry, which would make the words depend on the grouping
    (`exact_value` joins the two); the high word's sum is below 2^63 while the sum of |x| is below
    2^39. The third word adds floor(|x| / 2^8), and 2^30 for a value that is not finite or has |x|
    >= 2^38. If the third word is 2^30 or more (some value of that kind, or a sum of |x| of about
    2^38 = 2.7e11), `exact_value` is NaN; if it is less, no word can have wrapped. dim: sum over
    that dimension alone, with the words in a new last dimension: [M, T] -> [M, 3] with dim=-1, for
    fewer kernels than M calls. ValueError for 2^28 values or more. No collective.
    """
    values = values.detach().double()
    if dim is None:
        values, dim = values.flatten(), 0
    if values.numel() >= MAX_VALUES:
        raise ValueError(f"exact_words takes fewer than 2^28 values, got {values.numel()}")
    size = values.abs()
    # `fits` is False for NaN.
    fits = size < LIMIT
    scaled = torch.where(fits, values, 0.0) * 2.0**HIGH_BITS
    high = scaled.round()
    # The difference scaled - high is exact.
    low = ((scaled - high) * 2.0 ** (LOW_BITS - HIGH_BITS)).round()
    guard = torch.where(fits, size, LIMIT) / COARSE
    return torch.stack([part.long().sum(dim) for part in (high, low, guard)], dim=-1)


def exact_value(words: Tensor) -> float:
    """Convert words [3] to the nearest float64 of the sum that they hold.

    NaN when a value was not finite or the sum left the range that `exact_words` describes.
    """
    high, low, guard = words.tolist()
    return ((high << (LOW_BITS - HIGH_BITS)) + low) / 2**LOW_BITS if guard < LIMIT / COARSE else math.nan


def reduce_metrics(
    sums: dict[str, Tensor],
    weights: dict[str, str],
    *,
    group: dist.ProcessGroup | None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute the global metrics from the `exact_words` of each rank.

    `weights` maps a metric to the name of a second metric: the result is the sum of the first over
    the sum of the second (0.0 when the second sum is 0). A metric that is not in `weights` is the
    plain sum. reduce_metrics({"loss": words, "tokens": words, "entropy": words}, {"entropy":
    "tokens"}, ...) gives the entropy per token. group: DP x CP (each token is on one rank of the
    group). All ranks must bring the same names; a rank with nothing to add brings zero words. One
    all_reduce of 3 int64 per metric on `device`; none when group is None or has one rank. The
    result is the same to the last bit for every order of values and ranks. NaN for a metric with a
    value that is not finite. ValueError for a name in weights without a sum.
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
