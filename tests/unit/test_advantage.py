"""Group advantages: golden vectors, samples without a verdict, lone samples. Pure Python."""

from __future__ import annotations

import pytest

from megasd.algo.advantage import advantages, group_mean, group_std
from megasd.types import Group, Prompt, Sample, Verdict


def test_golden_grpo():
    """8 samples, 2 successes, sample standard deviation, epsilon 1e-6."""
    values = group_std([1, 1, 0, 0, 0, 0, 0, 0])
    assert values == pytest.approx([1.620182] * 2 + [-0.540061] * 6, abs=6e-7)


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


def group(*verdicts):
    samples = [Sample("q", i, [1], [2], [-0.5], "", "stop", 0, verdict=v) for i, v in enumerate(verdicts)]
    return Group(Prompt("q", [{"role": "user", "content": "?"}], "1"), samples)


def test_advantages_of_a_group():
    scored = group(Verdict.RIGHT, Verdict.TIMEOUT, Verdict.WRONG, Verdict.ERROR)
    assert advantages(scored, "group_mean") == [0.5, 0.0, -0.5, 0.0]
    with pytest.raises(ValueError, match=r"samples \[1\] of q have not been scored"):
        advantages(group(Verdict.RIGHT, None), "group_mean")
    with pytest.raises(ValueError, match="advantage must be one of"):
        advantages(scored, "gae")
