"""Metrics of scored groups, for held-out evaluation. Plain Python: kept samples need no model.

A question has n scored samples, and c of them are right. A sample whose check failed (ERROR,
TIMEOUT) does not count in n. A question without scored samples is left out of the metric. Every
metric is a mean over questions, with a 95 % interval by bootstrap over questions.

    mean@k          c / n: also avg@k, acc@k
    pass@k          1 - C(n-c, k) / C(n, k): unbiased; needs n >= k, other questions are left out, and said
    maj@k           one exact vote over all n: the most frequent answer, ties to the one seen first;
                    its first sample's verdict.
                    A response without a readable answer does not vote; when none votes, the question is wrong
    best@k/mean     as verl prints it: 1000 draws of k with replacement, the best of each; below
                    pass@k by construction
    best@k/expected its exact value, 1 - (1 - c/n)^k
    maj@k/mean      as verl prints it: 1000 draws of k with replacement, the vote of each; here
                    those without an answer vote, together

The draws come from Python's generator with seed 42, one set of draws for each (n, k), not verl's
numpy bits: they agree to about a point.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from math import ceil, comb
from typing import Any

from megasd.types import Group, Sample

# for the metrics that draw samples
NUM_DRAWS = 1000
DRAW_SEED = 42
# number of resamples of the questions, for an interval
NUM_RESAMPLES = 2000
COVERAGE = 0.95

# a response's text -> its vote
AnswerOf = Callable[[str], str | None]


def mean_at_k(groups: list[Group]) -> float:
    """Mean over the questions that could be scored; 0.0 when none could."""
    return _mean([g.pass_rate for g in groups if g.pass_rate is not None])


def maj_at_k(groups: list[Group], answer_of: AnswerOf) -> float:
    """Share of questions whose majority answer is right. Samples without a verdict or without an
    answer do not vote.
    """
    hits = [
        majority([answer_of(s.text) for s in scored], [s.reward for s in scored])
        for g in groups
        if (scored := scored_of(g))
    ]
    return _mean(hits)


def summarise(groups: list[Group], answer_of: AnswerOf) -> dict[str, float]:
    """Return {"mean_at_k", "maj_at_k", "pass_at_k", "questions", "unscored_samples"}.

    pass_at_k is the share of questions with at least one right sample.
    """
    unscored = sum(s.verdict is None or not s.verdict.counts for g in groups for s in g.samples)
    return {
        "mean_at_k": mean_at_k(groups),
        "maj_at_k": maj_at_k(groups, answer_of),
        "pass_at_k": _mean([float(g.pass_rate > 0) for g in groups if g.pass_rate is not None]),
        "questions": float(len(groups)),
        "unscored_samples": float(unscored),
    }


def scored_of(group: Group) -> list[Sample]:
    """The samples that were found right or wrong."""
    return [s for s in group.samples if s.verdict is not None and s.verdict.counts]


# ---- one question ----


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones.
    ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} scored samples, there are {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None], rewards: Sequence[float]) -> float:
    """Reward of the most frequent answer's first sample; among equals the answer seen first wins.
    None does not vote; 0.0 without votes.
    """
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return 0.0
    # max takes the first of equals, a dict keeps its order
    return rewards[answers.index(max(votes, key=votes.__getitem__))]


def expected_best_at_k(rewards: Sequence[float], k: int) -> float:
    """Exact mean of the best of k draws with replacement: sum over sorted r_i of r_i ((i/n)^k -
    ((i-1)/n)^k).
    """
    n = len(rewards)
    return sum(r * ((i / n) ** k - ((i - 1) / n) ** k) for i, r in enumerate(sorted(rewards), start=1))


def drawn_best_at_k(rewards: Sequence[float], k: int) -> float:
    """Mean over NUM_DRAWS draws of k with replacement of the best reward drawn."""
    return sum(max(rewards[i] for i in draw) for draw in draws(len(rewards), k)) / NUM_DRAWS


def drawn_maj_at_k(answers: Sequence[str | None], rewards: Sequence[float], k: int) -> float:
    """Mean over NUM_DRAWS draws of k with replacement of the vote among those drawn. None is a
    candidate like any other, as in verl.
    """
    total = 0.0
    for draw in draws(len(rewards), k):
        votes: dict[str | None, list[int]] = {}
        for i in draw:
            votes.setdefault(answers[i], []).append(i)
        total += rewards[max(votes.values(), key=len)[0]]
    return total / NUM_DRAWS


@functools.lru_cache(maxsize=64)
def draws(n: int, k: int) -> tuple[tuple[int, ...], ...]:
    """NUM_DRAWS draws of k of range(n) with replacement; equal for all questions of n samples."""
    generator = random.Random(f"{DRAW_SEED}/{n}/{k}")
    return tuple(tuple(generator.choices(range(n), k=k)) for _ in range(NUM_DRAWS))


# ---- all questions ----


def per_question(
    groups: list[Group], answer_of: AnswerOf | None, ks: Sequence[int], num_samples: int
) -> dict[str, dict[str, float]]:
    """Return metric -> prompt id -> value; a question that a metric leaves out is not in it.

    ks: the k of pass@k and of the drawn metrics. answer_of None: no vote makes sense (programs).
    """
    found: dict[str, dict[str, float]] = {f"mean@{num_samples}": {}}
    found |= {f"pass@{k}": {} for k in ks} | ({f"maj@{num_samples}": {}} if answer_of else {})
    for k in ks:
        if k > 1:
            found |= {f"best@{k}/mean": {}, f"best@{k}/expected": {}} | (
                {f"maj@{k}/mean": {}} if answer_of else {}
            )
    for group in groups:
        rewards = [s.reward for s in scored_of(group)]
        if not rewards:
            continue
        n, c, name = len(rewards), round(sum(rewards)), group.prompt.id
        found[f"mean@{num_samples}"][name] = c / n
        answers = [answer_of(s.text) for s in scored_of(group)] if answer_of else []
        if answer_of:
            found[f"maj@{num_samples}"][name] = majority(answers, rewards)
        for k in ks:
            if k <= n:
                found[f"pass@{k}"][name] = pass_at_k(n, c, k)
            if k > 1:
                found[f"best@{k}/mean"][name] = drawn_best_at_k(rewards, k)
                found[f"best@{k}/expected"][name] = expected_best_at_k(rewards, k)
                if answer_of:
                    found[f"maj@{k}/mean"][name] = drawn_maj_at_k(answers, rewards, k)
    return found


def metrics_with_intervals(
    groups: list[Group], answer_of: AnswerOf | None, *, ks: Sequence[int], num_samples: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return metric -> {"value", "low", "high", "questions", "left_out"}.

    That is the mean over questions, its 95 % interval, the number of questions, and the ids of the
    questions that are left out. A metric without a question has None as value and interval. seed:
    that of the resampling.
    """
    found = {}
    for name, values in per_question(groups, answer_of, ks, num_samples).items():
        low, high = interval(list(values.values()), seed)
        left_out = [g.prompt.id for g in groups if g.prompt.id not in values]
        value = _mean(list(values.values())) if values else None
        found[name] = {
            "value": value,
            "low": low,
            "high": high,
            "questions": len(values),
            "left_out": left_out,
        }
    return found


def interval(values: list[float], seed: int) -> tuple[float | None, float | None]:
    """Percentile interval (COVERAGE) of the mean when questions are drawn with replacement,
    NUM_RESAMPLES times; nearest ranks.
    """
    if not values:
        return None, None
    means = sorted(sum(map(values.__getitem__, draw)) / len(values) for draw in _resamples(len(values), seed))
    tail = (1 - COVERAGE) / 2
    return means[int(tail * NUM_RESAMPLES)], means[ceil((1 - tail) * NUM_RESAMPLES) - 1]


@functools.lru_cache(maxsize=8)
def _resamples(n: int, seed: int) -> list[list[int]]:
    generator = random.Random(f"{seed}/{n}")
    return [generator.choices(range(n), k=n) for _ in range(NUM_RESAMPLES)]


def default_ks(num_samples: int) -> list[int]:
    """1, 2, 4, ... and num_samples itself."""
    return sorted({1 << i for i in range(num_samples.bit_length())} | {num_samples})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
