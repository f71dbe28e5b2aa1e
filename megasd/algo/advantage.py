"""Rewards of the samples of one group, shaped, and their advantages.

A sample without a verdict (error, timeout) has the reward None: it gets the advantage 0 and enters
no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from megasd.config.schema import AlgorithmConfig, PolicyGradientTerm
from megasd.types import Group, Sample, Verdict

_EPSILON = 1e-6
# EGRSD (2605.13255): before this many steps the advantage is r - 0.5
_WHITENED_FROM = 10
# UNSURE, not in the paper: the smallest deviation divided by. Without it the first success after
# many failures would drown all else.
_LEAST_DEVIATION = 0.1


def overlong_penalty(length: int, *, room: int, buffer: int, penalty: float) -> float:
    """min(-(length - (room - buffer)) / buffer * penalty, 0), lengths in tokens (DAPO 2503.14476).
    buffer 0: none.

    overlong_penalty(18432, room=20480, buffer=4096, penalty=1.0) == -0.5
    """
    return min(-(length - (room - buffer)) / buffer * penalty, 0.0) if buffer else 0.0


def shaped_rewards(group: Group, algorithm: AlgorithmConfig, *, room: int) -> list[float | None]:
    """rewards_G: the verifier's score where it gives one (ROPD 2605.07396), else 1[right]; None
    without a verdict.

    A right one's is multiplied by 1 + length_bonus (1 - length / room) (EGRSD 2605.13255), then the
    overlong penalty comes off. room: rollout.max_response_tokens. ValueError for a sample that was
    never scored.
    """
    unscored = [s.index for s in group.samples if s.verdict is None]
    if unscored:
        raise ValueError(
            f"samples {unscored} of {group.prompt.id} have not been scored; score the group before its"
            " advantages"
        )
    return [_shaped(s, algorithm, room) if s.verdict.counts else None for s in group.samples]


def _shaped(sample: Sample, algorithm: AlgorithmConfig, room: int) -> float:
    length, reward = len(sample.response_ids), sample.reward if sample.score is None else sample.score
    if sample.verdict is Verdict.RIGHT:
        reward *= 1.0 + algorithm.length_bonus * (1.0 - length / room)
    return reward + overlong_penalty(
        length, room=room, buffer=algorithm.overlong_buffer, penalty=algorithm.overlong_penalty
    )


@dataclass
class Whitener:
    """Running mean and deviation of all rewards of earlier steps (Welford), for one response a
    question (EGRSD 2605.13255).

    Rewards of a step are held back until `step`, so that no order of its groups matters. UNSURE
    whether the paper's moments hold the current step's too.
    """

    count: int = 0
    mean: float = 0.0
    # sum of squared distances from the mean
    squares: float = 0.0
    steps: int = 0
    pending: list[float] = field(default_factory=list)

    def __call__(self, rewards_G: Sequence[float | None]) -> list[float]:
        """(r - mean) / deviation, r - 0.5 in the first 10 steps; 0 for None. Takes the rewards down
        for `step`.
        """
        self.pending += [r for r in rewards_G if r is not None]
        if self.steps < _WHITENED_FROM or self.count < 2:
            return [0.0 if r is None else r - 0.5 for r in rewards_G]
        deviation = max(math.sqrt(self.squares / (self.count - 1)), _LEAST_DEVIATION)
        return [0.0 if r is None else (r - self.mean) / deviation for r in rewards_G]

    def step(self) -> None:
        """The step is over: its rewards enter the moments."""
        for reward in self.pending:
            self.count += 1
            distance = reward - self.mean
            self.mean += distance / self.count
            self.squares += distance * (reward - self.mean)
        self.pending, self.steps = [], self.steps + 1

    def state_dict(self) -> dict[str, float | int | list[float]]:
        """Plain JSON-able values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float | int | list[float]]) -> None:
        """The inverse of state_dict."""
        for name, value in state.items():
            setattr(self, name, list(value) if name == "pending" else value)


def _centred(rewards_G: Sequence[float | None]) -> tuple[list[float], float]:
    """Rewards minus their mean (0.0 where there is no verdict) and their sample standard deviation.
    A lone reward: mean 0, deviation 1.
    """
    scored = [r for r in rewards_G if r is not None]
    if len(scored) < 2:
        return [0.0 if r is None else r for r in rewards_G], 1.0
    mean = sum(scored) / len(scored)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - 1))
    return [0.0 if r is None else r - mean for r in rewards_G], deviation


def group_mean(rewards_G: Sequence[float | None]) -> list[float]:
    """R - mean (Dr. GRPO 2503.20783; the GRPO baseline of SDPO). A lone scored sample keeps its
    reward, as in verl: it has no baseline.

    group_mean([1.0, 0.0, None]) == [0.5, -0.5, 0.0]
    """
    return _centred(rewards_G)[0]


def group_std(rewards_G: Sequence[float | None]) -> list[float]:
    """(R - mean) / (std + 1e-6) with the sample standard deviation, n - 1 (GRPO 2402.03300 as in verl).

    A lone scored sample: mean 0, std 1.
    """
    centred_G, deviation = _centred(rewards_G)
    return [c / (deviation + _EPSILON) for c in centred_G]


def none(rewards_G: Sequence[float | None]) -> list[float]:
    """0 for every sample: the credit alone says what is learned (on-policy distillation)."""
    return [0.0] * len(rewards_G)


ADVANTAGES = {"group_mean": group_mean, "group_std": group_std, "none": none}


def advantages(
    group: Group,
    term: PolicyGradientTerm,
    rewards_G: Sequence[float | None],
    whitener: Whitener | None = None,
) -> list[float]:
    """advantages_G of a group's rewards by term.advantage. "whitened" reads and feeds the whitener.

    ValueError for an unknown name, a whitener that is missing, and rewards that are not one per sample.
    """
    if len(rewards_G) != len(group.samples):
        raise ValueError(
            f"{len(rewards_G)} rewards for the {len(group.samples)} samples of {group.prompt.id}"
        )
    if term.advantage == "whitened":
        if whitener is None:
            raise ValueError("advantage whitened needs the whitener that remembers earlier steps; give one")
        return whitener(rewards_G)
    if term.advantage not in ADVANTAGES:
        raise ValueError(
            f"advantage must be one of {', '.join(ADVANTAGES)}, whitened, got {term.advantage!r}"
        )
    return ADVANTAGES[term.advantage](rewards_G)
