"""Compute the weight of a question from its pass rate.

The weights are raw: loss/normalise.py divides them by the mean that question_weight.normaliser
names. So a constant factor has an effect only with normaliser=none. A question that no verifier
could score has no pass rate (None). Its weight is 0, except if all questions have the same weight.

`QUESTION_WEIGHTS` lists the rules by name. QUESTION_WEIGHT_TRAITS in config/variants.py holds
the properties of a rule that other files read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megasd.config.schema import QuestionWeightConfig
from megasd.config.variants import QUESTION_WEIGHT_TRAITS

QuestionWeight = Callable[[float | None], float]
# (a known pass rate in [0, 1], the constants) -> the weight without config.scale.
WeightRule = Callable[[float, QuestionWeightConfig], float]
# A smaller weight counts as 0: an averaged rate comes ever closer to 0 or 1, and loss/normalise.py
# adds weights up on a grid.
LEAST = 2.0**-30


def none(pass_rate: float, config: QuestionWeightConfig) -> float:
    """1: all questions have the same weight."""
    return 1.0


def sqrt_pq(pass_rate: float, config: QuestionWeightConfig) -> float:
    """sqrt(p (1 - p)) (SC-SDPO 2605.27765, alpha = 1/2).

    This is the residual question-level scale of group-normalised GRPO.
    """
    return math.sqrt(pass_rate * (1.0 - pass_rate))


def pq(pass_rate: float, config: QuestionWeightConfig) -> float:
    """p (1 - p) (SC-SDPO, alpha = 1)."""
    return pass_rate * (1.0 - pass_rate)


def four_pq(pass_rate: float, config: QuestionWeightConfig) -> float:
    """4 p (1 - p): 1 where right and wrong are even (SSOPD 2605.17497)."""
    return 4.0 * pass_rate * (1.0 - pass_rate)


def power(pass_rate: float, config: QuestionWeightConfig) -> float:
    """p^a (1 - p)^b (PACED 2603.11178)."""
    return pass_rate**config.a * (1.0 - pass_rate) ** config.b


def band(pass_rate: float, config: QuestionWeightConfig) -> float:
    """1 from low to high, both included, else 0 (the hard filter that SC-SDPO compares with)."""
    return float(config.low <= pass_rate <= config.high)


QUESTION_WEIGHTS: dict[str, WeightRule] = {
    "none": none,
    "sqrt_pq": sqrt_pq,
    "pq": pq,
    "four_pq": four_pq,
    "power": power,
    "band": band,
}


def question_weight(config: QuestionWeightConfig) -> QuestionWeight:
    """The raw weight of a question as a function of its pass rate (None: not known).

    The weight includes config.scale; a weight below 2^-30 becomes 0. ValueError for an unknown
    kind. The returned function raises ValueError for a rate outside [0, 1].
    """
    if config.kind not in QUESTION_WEIGHTS:
        raise ValueError(
            f"question_weight.kind must be one of {', '.join(QUESTION_WEIGHTS)}, got {config.kind!r}"
        )
    if QUESTION_WEIGHT_TRAITS[config.kind].is_constant(config):
        return lambda pass_rate: config.scale
    rule = QUESTION_WEIGHTS[config.kind]

    def weight(pass_rate: float | None) -> float:
        if pass_rate is None:
            return 0.0
        if not 0.0 <= pass_rate <= 1.0:
            raise ValueError(
                f"a pass rate lies in [0, 1], got {pass_rate}; map shaped rewards to success or failure first"
            )
        raw = config.scale * rule(pass_rate, config)
        return raw if raw >= LEAST else 0.0

    return weight
