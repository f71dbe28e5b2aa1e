"""Held-out evaluation: mean@k and maj@k over freshly sampled answers.

mean@k: per question the mean of its k verdicts, then the mean over questions. maj@k: one exact vote over the k samples (no
bootstrap): the most frequent extracted answer, ties to the first seen, scored by its first occurrence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megasd.types import Group


def mean_at_k(groups: list[Group]) -> float:
    """Mean over the questions that could be scored; 0.0 when none could."""
    rates = [g.pass_rate for g in groups if g.pass_rate is not None]
    return sum(rates) / len(rates) if rates else 0.0


def maj_at_k(groups: list[Group], answer_of: Callable[[str], str]) -> float:
    """Share of questions whose majority answer is right. Samples without a verdict do not vote."""
    hits = []
    for group in groups:
        voters = [s for s in group.samples if s.verdict is not None and s.verdict.counts]
        if not voters:
            continue
        answers = [answer_of(s.text) for s in voters]
        winner, _ = Counter(answers).most_common(1)[0]  # Counter keeps first-seen order among equals
        hits.append(voters[answers.index(winner)].reward)
    return sum(hits) / len(hits) if hits else 0.0


def summarise(groups: list[Group], answer_of: Callable[[str], str]) -> dict[str, float]:
    """{"mean_at_k", "maj_at_k", "questions", "unscored_samples"} of an evaluation."""
    unscored = sum(not s.verdict.counts for g in groups for s in g.samples)
    return {
        "mean_at_k": mean_at_k(groups),
        "maj_at_k": maj_at_k(groups, answer_of),
        "questions": float(len(groups)),
        "unscored_samples": float(unscored),
    }
