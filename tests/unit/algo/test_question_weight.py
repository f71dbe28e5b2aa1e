"""algo/question_weight.py: raw question weights by their definitions. Does not prove what they are
divided by (test_normaliser.py).
"""

from __future__ import annotations

import pytest
import torch

from megasd.algo.question_weight import QUESTION_WEIGHTS, question_weight
from megasd.config.schema import QuestionWeightConfig
from megasd.loss.normalise import global_normalisers

EIGHTHS = [k / 8 for k in range(9)]


def weights(kind: str, **options) -> list[float]:
    weight_of = question_weight(QuestionWeightConfig(kind=kind, **options))
    return [weight_of(p) for p in EIGHTHS]


def test_raw_weights():
    assert [round(w, 4) for w in weights("sqrt_pq")] == [
        0,
        0.3307,
        0.4330,
        0.4841,
        0.5,
        0.4841,
        0.4330,
        0.3307,
        0,
    ]
    assert weights("pq") == [p * (1 - p) for p in EIGHTHS]
    assert weights("four_pq") == [4 * p * (1 - p) for p in EIGHTHS] and max(weights("four_pq")) == 1.0
    # SSOPD's lambda
    assert weights("four_pq", scale=0.5) == [2 * p * (1 - p) for p in EIGHTHS]
    assert weights("power", a=2.0, b=1.0) == pytest.approx([p * p * (1 - p) for p in EIGHTHS])
    assert weights("band", low=0.25, high=0.5) == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert weights("none") == [1.0] * 9


@pytest.mark.parametrize(
    "kind, golden", [("sqrt_pq", [0, 0.854249, 1.291503, 0.854249, 0]), ("pq", [0, 0.7, 1.6, 0.7, 0])]
)
def test_golden_weights_of_sc_sdpo(kind, golden):
    """k = 0, 1, 4, 7, 8 of 8, over the mean of those above 0 (2605.27765, equation 16)."""
    raw = [weights(kind)[k] for k in (0, 1, 4, 7, 8)]
    informative = [w for w in raw if w > 0]
    assert [w / (sum(informative) / len(informative)) for w in raw] == pytest.approx(golden, abs=6e-7)


@pytest.mark.parametrize("kind", QUESTION_WEIGHTS)
def test_a_question_that_nobody_could_score_weighs_nothing_unless_all_weigh_the_same(kind):
    assert question_weight(QuestionWeightConfig(kind=kind))(None) == float(kind == "none")


def test_paced_without_exponents_is_unweighted():
    """PACED 2603.11178 with a = b = 0, at rates 0 and 1 and without a rate too."""
    weight_of = question_weight(QuestionWeightConfig(kind="power", a=0.0, b=0.0))
    assert [weight_of(p) for p in (None, *EIGHTHS)] == [1.0] * 10
    assert weights("power", a=1.0, b=1.0) == weights("pq")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "sqrt_pq"},
        {"kind": "pq"},
        {"kind": "power", "a": 9.0, "b": 1.0},
        {"kind": "pq", "scale": 1e-3},
    ],
)
def test_a_rate_that_comes_ever_closer_to_0_ends_at_0(options):
    """Averaged over visits, rate 0.5: 1/8, then wrong answers alone. loss/normalise.py takes 0 and
    what is at least 2^-30.
    """
    weight_of, rates = (
        question_weight(QuestionWeightConfig(**options)),
        [0.125 * 0.5**visit for visit in range(1100)],
    )
    weights = [weight_of(p) for p in rates]
    assert all(w == 0 or w >= 2.0**-30 for w in weights) and weights == sorted(weights, reverse=True)
    assert weights[0] > 0 and weights[-1] == 0
    lens = torch.ones(1, dtype=torch.int64)
    for weight in weights[:70]:
        global_normalisers(
            {"distill": torch.tensor([weight], dtype=torch.float64)}, lens, {"distill": lens.bool()}, lens
        )


def test_bad_rates_and_kinds_are_named():
    with pytest.raises(ValueError, match="pass rate lies in"):
        # a reward of -1 for wrong answers must be mapped first
        question_weight(QuestionWeightConfig(kind="sqrt_pq"))(-1.0)
    with pytest.raises(ValueError, match="question_weight.kind must be one of none, sqrt_pq, pq"):
        question_weight(QuestionWeightConfig(kind="paced"))
