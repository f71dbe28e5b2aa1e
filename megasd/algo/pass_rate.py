"""Question weights from pass rates (SC-SDPO 2605.27765): how much a question teaches, judged by how often it was solved in this step.

Raw weights: loss/reduce.py divides them by their mean over the informative questions of the whole batch, so a constant factor does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

QuestionWeight = Callable[[float | None], float]


def none(pass_rate: float | None) -> float:
    """1 for every question (plain SDPO)."""
    return 1.0


def sqrt_pq(pass_rate: float | None) -> float:
    """sqrt(p (1 - p)): the residual question-level scale of group-normalised GRPO (SC-SDPO, alpha = 1/2)."""
    return math.sqrt(pq(pass_rate))


def pq(pass_rate: float | None) -> float:
    """p (1 - p) (SC-SDPO, alpha = 1). 0 for a question that no verifier could score."""
    if pass_rate is None:
        return 0.0
    if not 0.0 <= pass_rate <= 1.0:
        raise ValueError(f"a pass rate lies in [0, 1], got {pass_rate}; map shaped rewards to success or failure first")
    return pass_rate * (1.0 - pass_rate)


QUESTION_WEIGHTS: dict[str, QuestionWeight] = {"none": none, "sqrt_pq": sqrt_pq, "pq": pq}


def question_weight(name: str) -> QuestionWeight:
    """Raw (not normalised) weight of a question as a function of its pass rate (None: unscored); ValueError for an unknown name."""
    if name not in QUESTION_WEIGHTS:
        raise ValueError(f"question_weight must be one of {', '.join(QUESTION_WEIGHTS)}, got {name!r}")
    return QUESTION_WEIGHTS[name]
