"""Proves: the schema, the tables of traits and the tables of functions hold the same names, and the
traits agree with the functions where both know.
"""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from megasd.algo.advantage import ADVANTAGES
from megasd.algo.question_weight import QUESTION_WEIGHTS, question_weight
from megasd.algo.teacher_context import CONTEXTS, CONTRASTS
from megasd.config import schema, variants
from megasd.loss.credit import CREDITS
from megasd.loss.divergence import DIVERGENCES
from megasd.loss.policy_gradient import SURROGATES
from megasd.loss.token_weights import TOKEN_FACTORS

# (section of the schema, its field, tables)
TABLES = [
    (schema.DistillTerm, "divergence", variants.DIVERGENCE_TRAITS, DIVERGENCES),
    (schema.DistillTerm, "token_weight", variants.TOKEN_WEIGHT_TRAITS, TOKEN_FACTORS),
    (schema.CreditConfig, "kind", variants.CREDIT_TRAITS, CREDITS),
    (schema.PolicyGradientTerm, "surrogate", variants.SURROGATE_TRAITS, SURROGATES),
    (schema.PolicyGradientTerm, "advantage", ADVANTAGES, ADVANTAGES),
    (schema.TeacherConfig, "context", variants.CONTEXT_TRAITS, CONTEXTS),
    (schema.TeacherConfig, "contrast", CONTRASTS, CONTRASTS),
    (schema.QuestionWeightConfig, "kind", variants.QUESTION_WEIGHT_TRAITS, QUESTION_WEIGHTS),
]


@pytest.mark.parametrize("section,name,traits,functions", TABLES)
def test_the_tables_hold_the_names_of_the_schema(section, name, traits, functions):
    names = get_args(get_type_hints(section)[name])
    assert set(names) == set(traits) == set(functions), f"{section.__name__}.{name}"


@pytest.mark.parametrize("kind", QUESTION_WEIGHTS)
def test_traits_of_a_question_weight(kind):
    config = schema.QuestionWeightConfig(kind=kind)
    traits, weight = variants.QUESTION_WEIGHT_TRAITS[kind], question_weight(config)
    assert traits.is_zero_at_0_and_1(config) == (weight(0.0) == weight(1.0) == 0.0)
    assert traits.is_constant(config) == (weight(None) == weight(0.3) == weight(1.0) == config.scale)
