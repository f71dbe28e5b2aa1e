"""The traits of the algorithm's variants: one row of traits for each name.

The schema names the variants of a field (`CreditConfig.kind`); a table of functions computes them
(`loss/credit.py: CREDITS`). The tables here say what a variant reads, adds or needs, so that no
other file has to know its name:

    CREDIT_TRAITS[credit.kind].needs_old_logp

Plain values, no torch: validation, the stages of an algorithm and the planner read them too.
tests/unit/config/test_variants.py proves that the schema and all tables hold the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megasd.config.schema import AlgorithmConfig, QuestionWeightConfig


@dataclass(frozen=True)
class DivergenceTraits:
    """The traits of a `distill.divergence`. loss/divergence.py holds the functions."""

    # ops/ computes the divergence over the whole vocabulary, so distill.support=full can use it.
    has_full_kernel: bool = False
    # It is defined only for buckets that sum to one. The buckets of distill.tail=raw do not.
    needs_normalised_buckets: bool = True
    # It is a sum whose summands distill.pointwise_clip bounds one by one.
    takes_pointwise_clip: bool = False


DIVERGENCE_TRAITS: dict[str, DivergenceTraits] = {
    "mixture": DivergenceTraits(
        has_full_kernel=True, needs_normalised_buckets=False, takes_pointwise_clip=True
    ),
    "adaptive": DivergenceTraits(),
}


@dataclass(frozen=True)
class CreditTraits:
    """The traits of a `policy_gradient.credit.kind`. loss/credit.py holds the functions."""

    # The credit adds to the advantage, so that a token of advantage 0 may learn. If False, it
    # multiplies the advantage.
    adds_to_advantage: bool = False
    # The credit reads the contrasting contexts of teacher.contrast.
    reads_contrast: bool = False
    # The credit reads the student's log-probs from before the step.
    needs_old_logp: bool = False
    # The credit has a gate on the teacher's entropy. The gate is built before the first step.
    has_gate: bool = False
    # With lam=0 the credit leaves the advantage alone, and the teacher need not run.
    vanishes_at_lam_0: bool = False
    # The credit moves some tokens into a second policy gradient, which has its own advantages and
    # weight.
    adds_second_path: bool = False


CREDIT_TRAITS: dict[str, CreditTraits] = {
    "rlsd": CreditTraits(vanishes_at_lam_0=True),
    "rlcsd": CreditTraits(reads_contrast=True, adds_second_path=True),
    "cepo": CreditTraits(reads_contrast=True, vanishes_at_lam_0=True),
    "antisd": CreditTraits(adds_to_advantage=True, has_gate=True),
    "egrsd": CreditTraits(),
    "log_ratio": CreditTraits(adds_to_advantage=True),
    "return": CreditTraits(adds_to_advantage=True, needs_old_logp=True),
    "margin": CreditTraits(adds_to_advantage=True, needs_old_logp=True),
}


@dataclass(frozen=True)
class SurrogateTraits:
    """The traits of a `policy_gradient.surrogate`. loss/policy_gradient.py holds the functions."""

    # policy_gradient.dual_clip bounds the surrogate's loss at negative advantages.
    takes_dual_clip: bool = False
    # The surrogate's ratio is the ratio of the whole response.
    reads_sequence_ratio: bool = False


SURROGATE_TRAITS: dict[str, SurrogateTraits] = {
    "ppo": SurrogateTraits(takes_dual_clip=True),
    "gspo": SurrogateTraits(takes_dual_clip=True, reads_sequence_ratio=True),
    "cispo": SurrogateTraits(),
    "importance": SurrogateTraits(),
    "reinforce": SurrogateTraits(),
}


@dataclass(frozen=True)
class TokenWeightTraits:
    """The traits of a `distill.token_weight`. loss/token_weights.py holds the functions."""

    # The token weight reads the teacher's entropy at every token, under the first context.
    reads_teacher_entropy: bool = False
    # The token weight reads the divergence at every token from before the step, which takes one
    # more forward of the student.
    reads_divergence: bool = False


TOKEN_WEIGHT_TRAITS: dict[str, TokenWeightTraits] = {
    "none": TokenWeightTraits(),
    "confidence": TokenWeightTraits(reads_teacher_entropy=True),
    "scan": TokenWeightTraits(reads_divergence=True),
}


@dataclass(frozen=True)
class ContextTraits:
    """The traits of a `teacher.context`. algo/teacher_context.py holds the functions."""

    # The context shows right samples of the group.
    shows_siblings: bool = False
    # The context shows the row's solution or a part of it, so every row must have a solution.
    shows_solution: bool = False
    # The context shows no privileged text: the teacher reads the student's question.
    shows_nothing: bool = False


CONTEXT_TRAITS: dict[str, ContextTraits] = {
    "first_success": ContextTraits(shows_siblings=True),
    "random_success": ContextTraits(shows_siblings=True),
    "shortest_success": ContextTraits(shows_siblings=True),
    "solution": ContextTraits(shows_solution=True),
    "answer": ContextTraits(),
    "prefix": ContextTraits(shows_solution=True),
    "prompt": ContextTraits(shows_nothing=True),
}


@dataclass(frozen=True)
class QuestionWeightTraits:
    """The traits of a `question_weight.kind`. algo/question_weight.py holds the functions."""

    # (constants) -> whether a question of pass rate 0 or 1 has the weight 0.
    is_zero_at_0_and_1: Callable[[QuestionWeightConfig], bool] = lambda config: False
    # (constants) -> whether all questions, even without a pass rate, have the same weight.
    is_constant: Callable[[QuestionWeightConfig], bool] = lambda config: False


QUESTION_WEIGHT_TRAITS: dict[str, QuestionWeightTraits] = {
    "none": QuestionWeightTraits(is_constant=lambda config: True),
    "sqrt_pq": QuestionWeightTraits(is_zero_at_0_and_1=lambda config: True),
    "pq": QuestionWeightTraits(is_zero_at_0_and_1=lambda config: True),
    "four_pq": QuestionWeightTraits(is_zero_at_0_and_1=lambda config: True),
    "power": QuestionWeightTraits(
        is_zero_at_0_and_1=lambda config: config.a > 0 and config.b > 0,
        is_constant=lambda config: config.a == config.b == 0,
    ),
    "band": QuestionWeightTraits(is_zero_at_0_and_1=lambda config: config.low > 0 and config.high < 1),
}


def credit_traits(algorithm: AlgorithmConfig) -> CreditTraits:
    """The traits of the algorithm's credit; all False without a credit."""
    term = algorithm.policy_gradient
    return CreditTraits() if term is None or term.credit is None else CREDIT_TRAITS[term.credit.kind]


def token_weight_traits(algorithm: AlgorithmConfig) -> TokenWeightTraits:
    """The traits of the distillation's token weight; all False without distillation."""
    term = algorithm.distill
    return TokenWeightTraits() if term is None else TOKEN_WEIGHT_TRAITS[term.token_weight]


def surrogate_traits(algorithm: AlgorithmConfig) -> SurrogateTraits:
    """The traits of the policy gradient's surrogate; all False without a policy gradient."""
    term = algorithm.policy_gradient
    return SurrogateTraits() if term is None else SURROGATE_TRAITS[term.surrogate]


def reads_teacher_logprobs(algorithm: AlgorithmConfig) -> bool:
    """Whether a credit or a token weight reads the teacher's log-probs of the sampled tokens."""
    term = algorithm.policy_gradient
    has_credit = term is not None and term.credit is not None
    return has_credit or token_weight_traits(algorithm).reads_teacher_entropy


def contrasting_credits() -> list[str]:
    """The credits that read teacher.contrast."""
    return [name for name, traits in CREDIT_TRAITS.items() if traits.reads_contrast]
