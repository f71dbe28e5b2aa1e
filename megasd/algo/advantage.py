"""Advantages of the samples of one group, from their rewards.

A sample without a verdict (error, timeout) gets 0 and enters no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megasd.types import Group

_EPSILON = 1e-6


def _centred(rewards_G: Sequence[float | None]) -> tuple[list[float], float]:
    """Rewards minus their mean (0.0 where there is no verdict) and their sample standard deviation. A lone reward: mean 0, deviation 1."""
    scored = [r for r in rewards_G if r is not None]
    if len(scored) < 2:
        return [0.0 if r is None else r for r in rewards_G], 1.0
    mean = sum(scored) / len(scored)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - 1))
    return [0.0 if r is None else r - mean for r in rewards_G], deviation


def group_mean(rewards_G: Sequence[float | None]) -> list[float]:
    """R - mean (Dr. GRPO 2503.20783; the GRPO baseline of SDPO). A lone scored sample keeps its reward, as in verl: it has no baseline.

    group_mean([1.0, 0.0, None]) == [0.5, -0.5, 0.0]
    """
    return _centred(rewards_G)[0]


def group_std(rewards_G: Sequence[float | None]) -> list[float]:
    """(R - mean) / (std + 1e-6) with the sample standard deviation, n - 1 (GRPO 2402.03300 as in verl).

    A lone scored sample: mean 0, std 1.
    """
    centred_G, deviation = _centred(rewards_G)
    return [c / (deviation + _EPSILON) for c in centred_G]


ADVANTAGES: dict[str, Callable[[Sequence[float | None]], list[float]]] = {"group_mean": group_mean, "group_std": group_std}


def advantages(group: Group, name: str) -> list[float]:
    """advantages_G of a scored group by the function of that name; ValueError for an unknown name or a sample that was never scored."""
    if name not in ADVANTAGES:
        raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}, got {name!r}")
    unscored = [s.index for s in group.samples if s.verdict is None]
    if unscored:
        raise ValueError(f"samples {unscored} of {group.prompt.id} have not been scored; score the group before its advantages")
    return ADVANTAGES[name]([s.reward if s.verdict.counts else None for s in group.samples])
