"""Shape the rewards of one group's samples and compute their advantages.

A sample without a verdict (error, timeout) has the reward None. It gets the advantage 0 and enters
no statistic. `ADVANTAGES` lists the rules by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megasd.config.schema import AlgorithmConfig, PolicyGradientTerm
from megasd.types import Group, Sample, Verdict

# The rewards of a group's samples; None for a sample without a verdict.
Rewards = Sequence[float | None]

_EPSILON = 1e-6
# EGRSD (2605.13255): before this many steps the advantage is r - 0.5.
_WHITENED_FROM = 10
# The smallest deviation that rewards are divided by. UNSURE, not in the paper: without it, the first
# success after many failures would outweigh all other rewards.
_LEAST_DEVIATION = 0.1


def overlong_penalty(length: int, *, room: int, buffer: int, penalty: float) -> float:
    """min(-(length - (room - buffer)) / buffer * penalty, 0), lengths in tokens (DAPO 2503.14476).

    If buffer is 0, there is no penalty.

    overlong_penalty(18432, room=20480, buffer=4096, penalty=1.0) == -0.5
    """
    return min(-(length - (room - buffer)) / buffer * penalty, 0.0) if buffer else 0.0


def shaped_rewards(group: Group, algorithm: AlgorithmConfig, *, room: int) -> list[float | None]:
    """rewards_G: the shaped reward of each sample; None for a sample without a verdict.

    The reward is the verifier's score if there is a score (ROPD 2605.07396), else 1[right]. The
    reward of a right sample is multiplied by 1 + length_bonus (1 - length / room) (EGRSD
    2605.13255); then the overlong penalty is added. room: rollout.max_response_tokens. ValueError
    for a sample that was never scored.
    """
    verdicts = [s.verdict for s in group.samples if s.verdict is not None]
    if len(verdicts) < len(group.samples):
        unscored = [s.index for s in group.samples if s.verdict is None]
        raise ValueError(
            f"samples {unscored} of {group.prompt.id} have not been scored; score the group before its"
            " advantages"
        )
    return [
        _shaped(sample, algorithm, room) if verdict.counts else None
        for sample, verdict in zip(group.samples, verdicts, strict=True)
    ]


def _shaped(sample: Sample, algorithm: AlgorithmConfig, room: int) -> float:
    length, reward = len(sample.response_ids), sample.reward if sample.score is None else sample.score
    if sample.verdict is Verdict.RIGHT:
        reward *= 1.0 + algorithm.length_bonus * (1.0 - length / room)
    return reward + overlong_penalty(
        length, room=room, buffer=algorithm.overlong_buffer, penalty=algorithm.overlong_penalty
    )


@dataclass
class Whitener:
    """The running mean and deviation of all rewards of earlier steps (Welford).

    It gives advantages with one response a question (EGRSD 2605.13255). Rewards of a step wait in
    `pending` until `step` is called, so that the order of groups does not matter. UNSURE whether
    the paper's moments also contain the rewards of the current step.
    """

    count: int = 0
    mean: float = 0.0
    # The sum of squared distances from the mean.
    squares: float = 0.0
    steps: int = 0
    pending: list[float] = field(default_factory=list)

    def __call__(self, rewards_G: Rewards) -> list[float]:
        """(r - mean) / deviation, r - 0.5 in the first 10 steps; 0 for None.

        The rewards are kept for `step`.
        """
        self.pending += [r for r in rewards_G if r is not None]
        if self.steps < _WHITENED_FROM or self.count < 2:
            return [0.0 if r is None else r - 0.5 for r in rewards_G]
        deviation = max(math.sqrt(self.squares / (self.count - 1)), _LEAST_DEVIATION)
        return [0.0 if r is None else (r - self.mean) / deviation for r in rewards_G]

    def step(self) -> None:
        """End a step: its rewards enter the moments."""
        for reward in self.pending:
            self.count += 1
            distance = reward - self.mean
            self.mean += distance / self.count
            self.squares += distance * (reward - self.mean)
        self.pending, self.steps = [], self.steps + 1

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON-able values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, list(value) if name == "pending" else value)


def _centred(rewards_G: Rewards) -> tuple[list[float], float]:
    """Rewards minus their mean, and their sample standard deviation.

    The entry of a sample without a verdict is 0.0. A lone reward: mean 0, deviation 1.
    """
    scored = [r for r in rewards_G if r is not None]
    if len(scored) < 2:
        return [0.0 if r is None else r for r in rewards_G], 1.0
    mean = sum(scored) / len(scored)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - 1))
    return [0.0 if r is None else r - mean for r in rewards_G], deviation


def group_mean(rewards_G: Rewards) -> list[float]:
    """R - mean (Dr. GRPO 2503.20783; the GRPO baseline of SDPO).

    A lone scored sample keeps its reward, as in verl: it has no baseline.

    group_mean([1.0, 0.0, None]) == [0.5, -0.5, 0.0]
    """
    return _centred(rewards_G)[0]


def group_std(rewards_G: Rewards) -> list[float]:
    """(R - mean) / (std + 1e-6) with the sample standard deviation, n - 1.

    GRPO 2402.03300 as in verl. A lone scored sample: mean 0, std 1.
    """
    centred_G, deviation = _centred(rewards_G)
    return [c / (deviation + _EPSILON) for c in centred_G]


def none(rewards_G: Rewards) -> list[float]:
    """0 for every sample: the credit alone says what is learned (on-policy distillation)."""
    return [0.0] * len(rewards_G)


@dataclass(frozen=True)
class AdvantageRule:
    """A row of `ADVANTAGES`."""

    # (rewards of a group, moments of earlier steps) -> advantages.
    of_group: Callable[[Rewards, Whitener], list[float]]
    # The rule reads and feeds the moments, which then belong to the state of the run.
    reads_moments: bool = False


ADVANTAGES: dict[str, AdvantageRule] = {
    "group_mean": AdvantageRule(lambda rewards_G, whitener: group_mean(rewards_G)),
    "group_std": AdvantageRule(lambda rewards_G, whitener: group_std(rewards_G)),
    "none": AdvantageRule(lambda rewards_G, whitener: none(rewards_G)),
    "whitened": AdvantageRule(lambda rewards_G, whitener: whitener(rewards_G), reads_moments=True),
}


def advantages(
    group: Group,
    term: PolicyGradientTerm,
    rewards_G: Rewards,
    whitener: Whitener | None = None,
) -> list[float]:
    """advantages_G: the advantages of a group by the rule that term.advantage names.

    "whitened" reads and feeds the whitener. ValueError for an unknown rule, for a missing whitener,
    and if there is not one reward per sample.
    """
    if len(rewards_G) != len(group.samples):
        raise ValueError(
            f"{len(rewards_G)} rewards for the {len(group.samples)} samples of {group.prompt.id}"
        )
    if term.advantage not in ADVANTAGES:
        raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}, got {term.advantage!r}")
    rule = ADVANTAGES[term.advantage]
    if rule.reads_moments and whitener is None:
        raise ValueError(
            f"advantage {term.advantage} needs the whitener that remembers earlier steps; give one"
        )
    return rule.of_group(rewards_G, whitener or Whitener())
