"""algo/advantage.py: rewards as they are shaped, group advantages with golden vectors, running
whitening. Pure Python.

Proves the definitions, samples without a verdict, lone samples, the whitener's state. Does not
prove that a shaped reward trains well.
"""

from __future__ import annotations

import json
import statistics

import pytest

from megasd.algo.advantage import (
    Whitener,
    advantages,
    group_mean,
    group_std,
    overlong_penalty,
    shaped_rewards,
)
from megasd.config.schema import AlgorithmConfig, PolicyGradientTerm
from megasd.types import Group, Prompt, Sample, Verdict

R, W, E, T = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT


def group(
    *verdicts: Verdict | None, lens: list[int] | None = None, scores: list[float | None] | None = None
) -> Group:
    lens, scores = lens or [1] * len(verdicts), scores or [None] * len(verdicts)
    samples = [
        Sample("q", i, [1], [2] * lens[i], [-0.5] * lens[i], "", "stop", 0, verdict=v, score=scores[i])
        for i, v in enumerate(verdicts)
    ]
    return Group(Prompt("q", [{"role": "user", "content": "?"}], "1"), samples)


def term(advantage: str) -> PolicyGradientTerm:
    return PolicyGradientTerm(advantage=advantage)


# ---- rewards ----


def test_rewards_are_verdicts_or_scores():
    plain = AlgorithmConfig()
    assert shaped_rewards(group(R, T, W, E), plain, room=8) == [1.0, None, 0.0, None]
    # no verdict, no reward
    assert shaped_rewards(group(R, W, E, scores=[0.8, 0.3, 0.9]), plain, room=8) == [0.8, 0.3, None]
    with pytest.raises(ValueError, match=r"samples \[1\] of q have not been scored"):
        shaped_rewards(group(R, None), plain, room=8)


def test_golden_overlong_penalty():
    """DAPO 2503.14476: room 20480, buffer 4096, factor 1."""
    lengths = (16000, 16384, 18432, 20480)
    assert [overlong_penalty(n, room=20480, buffer=4096, penalty=1.0) for n in lengths] == [
        0.0,
        0.0,
        -0.5,
        -1.0,
    ]
    shaped = AlgorithmConfig(overlong_buffer=4096, overlong_penalty=1.0)
    assert shaped_rewards(group(W, W, W, W, lens=list(lengths)), shaped, room=20480) == [0.0, 0.0, -0.5, -1.0]
    assert shaped_rewards(group(R, T, lens=[18432, 20480]), shaped, room=20480) == [0.5, None]
    assert overlong_penalty(20480, room=20480, buffer=0, penalty=1.0) == 0.0
    assert overlong_penalty(18432, room=20480, buffer=4096, penalty=0.5) == -0.25


def test_short_right_answers_get_a_bonus():
    """EGRSD 2605.13255: 1[right] (1 + 0.5 (1 - length / room))."""
    found = shaped_rewards(group(R, R, W, lens=[8, 2, 2]), AlgorithmConfig(length_bonus=0.5), room=8)
    assert found == [1.0, 1.375, 0.0]


# ---- group advantages ----


def test_golden_grpo():
    """8 samples, 2 successes, sample standard deviation, epsilon 1e-6."""
    scored = group(R, R, W, W, W, W, W, W)
    rewards = shaped_rewards(scored, AlgorithmConfig(), room=8)
    expected = [1.620182] * 2 + [-0.540061] * 6
    assert advantages(scored, term("group_std"), rewards) == pytest.approx(expected, abs=6e-7)
    assert group_std([1, 1, 0, 0, 0, 0, 0, 0]) == pytest.approx(expected, abs=6e-7)


def test_group_mean():
    assert group_mean([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert sum(group_mean([0.3, 0.9, 0.1])) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("function", [group_mean, group_std])
def test_constant_groups_teach_nothing(function):
    assert function([1.0] * 5) == [0.0] * 5
    assert function([0.0] * 5) == [0.0] * 5


@pytest.mark.parametrize("function", [group_mean, group_std])
def test_samples_without_a_verdict_do_not_count(function):
    mixed, clean = function([1.0, None, 0.0, 0.0, None]), function([1.0, 0.0, 0.0])
    assert mixed == [clean[0], 0.0, clean[1], clean[2], 0.0]


def test_lone_sample_has_no_baseline():
    assert group_mean([1.0]) == [1.0] and group_mean([None, 1.0]) == [0.0, 1.0]
    assert group_std([1.0]) == pytest.approx([1.0], abs=2e-6)
    assert group_mean([None, None]) == [0.0, 0.0] and group_std([]) == []


def test_advantages_of_a_group():
    scored = group(R, T, W, E)
    rewards = shaped_rewards(scored, AlgorithmConfig(), room=8)
    assert advantages(scored, term("group_mean"), rewards) == [0.5, 0.0, -0.5, 0.0]
    assert advantages(scored, term("none"), rewards) == [0.0] * 4
    with pytest.raises(ValueError, match="advantage must be one of"):
        advantages(scored, term("gae"), rewards)
    with pytest.raises(ValueError, match="3 rewards for the 4 samples of q"):
        advantages(scored, term("none"), rewards[:3])
    with pytest.raises(ValueError, match="needs the whitener"):
        advantages(scored, term("whitened"), rewards)


# ---- running whitening ----


def feed(whitener: Whitener, steps: int, start: int = 0) -> list[float]:
    """Two groups a step; all rewards that were given."""
    seen = []
    for k in range(start, start + steps):
        for rewards in ([1.0, 0.0, None], [1.5 if k % 2 else 0.0, 0.25]):
            advantages(group(*[R] * len(rewards)), term("whitened"), rewards, whitener)
            seen += [r for r in rewards if r is not None]
        whitener.step()
    return seen


def test_the_first_ten_steps_centre_at_one_half():
    """EGRSD 2605.13255."""
    whitener = Whitener()
    feed(whitener, 9)
    assert whitener([1.5, None, 0.0]) == [1.0, 0.0, -0.5]
    whitener.step()
    assert whitener.steps == 10 and whitener([1.5, 0.0]) != [1.0, -0.5]


def test_later_steps_are_whitened_by_all_earlier_ones_in_any_order():
    whitener = Whitener()
    seen = feed(whitener, 25)
    mean, deviation = statistics.mean(seen), statistics.stdev(seen)
    expected = [(1.0 - mean) / deviation, 0.0, (0.2 - mean) / deviation]
    assert whitener([1.0, None, 0.2]) == pytest.approx(expected, rel=1e-12)
    # a step's own rewards wait for its end
    assert whitener([1.0, None, 0.2]) == pytest.approx(expected, rel=1e-12)


def test_the_whitener_comes_back_from_a_checkpoint():
    straight, resumed = Whitener(), Whitener()
    feed(straight, 13)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    feed(straight, 5, start=13)
    feed(resumed, 5, start=13)
    assert resumed == straight


def test_rare_successes_stay_bounded():
    whitener = Whitener()
    for _ in range(12):
        whitener([0.0] * 50)
        whitener.step()
    assert whitener([1.0, 0.0]) == [10.0, 0.0]
