"""What the rest of megasd asks of a variant of the algorithm: one row of traits for each name.

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
    """Of `distill.divergence`. The functions: loss/divergence.py."""

    # ops/ computes it over the whole vocabulary, so that distill.support=full can have it
    has_full_kernel: bool = False
    # it is defined only for buckets that sum to one, which those of distill.tail=raw do not
    needs_normalised_buckets: bool = True
    # it is a sum of summands, which distill.pointwise_clip bounds one by one
    takes_pointwise_clip: bool = False


DIVERGENCE_TRAITS: dict[str, DivergenceTraits] = {
    "mixture": DivergenceTraits(
        has_full_kernel=True, needs_normalised_buckets=False, takes_pointwise_clip=True
    ),
    "adaptive": DivergenceTraits(),
}


@dataclass(frozen=True)
class CreditTraits:
    """Of `policy_gradient.credit.kind`. The functions: loss/credit.py."""

    # it adds to the advantage, so that a token of advantage 0 may learn; else it multiplies it
    adds_to_advantage: bool = False
    # it reads teacher.contrast, the contexts that the first one is compared with
    reads_contrast: bool = False
    # it reads the student's own log-probs from before the step
    needs_old_logp: bool = False
    # it has a gate on the teacher's entropy, which is built before the first step
    has_gate: bool = False
    # with lam=0 it leaves the advantage alone, and the teacher need not run
    vanishes_at_lam_0: bool = False
    # it moves tokens into a second policy gradient with advantages and a weight of their own
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
    """Of `policy_gradient.surrogate`. The functions: loss/policy_gradient.py."""

    # policy_gradient.dual_clip bounds its loss at negative advantages
    takes_dual_clip: bool = False
    # its ratio is that of the whole response
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
    """Of `distill.token_weight`. The functions: loss/token_weights.py."""

    # it reads the teacher's entropy of every token, under the first context
    reads_teacher_entropy: bool = False
    # it reads the divergence of every token from before the step: one more forward of the student
    reads_divergence: bool = False


TOKEN_WEIGHT_TRAITS: dict[str, TokenWeightTraits] = {
    "none": TokenWeightTraits(),
    "confidence": TokenWeightTraits(reads_teacher_entropy=True),
    "scan": TokenWeightTraits(reads_divergence=True),
}


@dataclass(frozen=True)
class ContextTraits:
    """Of `teacher.context`. The functions: algo/teacher_context.py."""

    # it shows right samples of the group
    shows_siblings: bool = False
    # it shows the row's solution or a part of it, so that every row must have one
    shows_solution: bool = False
    # it shows nothing: the teacher reads the student's question
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
    """Of `question_weight.kind`. The functions: algo/question_weight.py."""

    # with these constants, a question of pass rate 0 or 1 has the weight 0
    is_zero_at_0_and_1: Callable[[QuestionWeightConfig], bool] = lambda config: False
    # with these constants, all questions have the same weight, those without a pass rate too
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
    """Those of the algorithm's credit; all False without a credit."""
    term = algorithm.policy_gradient
    return CreditTraits() if term is None or term.credit is None else CREDIT_TRAITS[term.credit.kind]


def token_weight_traits(algorithm: AlgorithmConfig) -> TokenWeightTraits:
    """Those of the distillation's token weight; all False without distillation."""
    term = algorithm.distill
    return TokenWeightTraits() if term is None else TOKEN_WEIGHT_TRAITS[term.token_weight]


def surrogate_traits(algorithm: AlgorithmConfig) -> SurrogateTraits:
    """Those of the policy gradient's surrogate; all False without a policy gradient."""
    term = algorithm.policy_gradient
    return SurrogateTraits() if term is None else SURROGATE_TRAITS[term.surrogate]


def reads_teacher_logprobs(algorithm: AlgorithmConfig) -> bool:
    """Whether a credit, or a token weight, reads what the teacher says about the sampled tokens."""
    term = algorithm.policy_gradient
    has_credit = term is not None and term.credit is not None
    return has_credit or token_weight_traits(algorithm).reads_teacher_entropy


def contrasting_credits() -> list[str]:
    """The credits that read teacher.contrast."""
    return [name for name, traits in CREDIT_TRAITS.items() if traits.reads_contrast]
