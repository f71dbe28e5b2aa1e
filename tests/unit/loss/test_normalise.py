"""What question weights are divided by, and the weight of every token in every aggregation, through
loss/normalise.py in one process.

Proves: the golden weights of SC-SDPO, the definitions of all normalisers and aggregations on
questions of unequal size under masks of tokens, equal weights giving 1 bit for bit, nothing
informative giving 0, the errors. Does not prove ranks (tests/distributed/test_reduce.py) or the
sums themselves (test_reduce.py here).
"""

from __future__ import annotations

import math

import pytest
import torch

from megasd.algo.question_weight import question_weight
from megasd.config.schema import QuestionWeightConfig
from megasd.loss.normalise import AGGREGATIONS, NORMALISERS, Normaliser, global_normalisers, term_weights

# of 8 samples each
SUCCESSES = [0, 1, 4, 7, 8]
GOLDEN = {
    "sqrt_pq": [0.0, 0.854249, 1.291503, 0.854249, 0.0],
    "pq": [0.0, 0.7, 1.6, 0.7, 0.0],
    "none": [1.0, 1.0, 1.0, 1.0, 1.0],
}


def raw_weight(kind: str, pass_rate: float) -> float:
    return question_weight(QuestionWeightConfig(kind=kind))(pass_rate)


def normalised(raw: list[float], size: int = 8, **options) -> list[float]:
    """Weight of each question over what they are divided by: what token_weights gives a one-token
    response, times all samples.
    """
    weight = torch.tensor(raw, dtype=torch.float64).repeat_interleave(size)
    ones = torch.ones(len(weight), dtype=torch.int64)
    normaliser = global_normalisers({"distill": weight}, ones * size, {"distill": ones > 0}, ones, **options)[
        "distill"
    ]
    found = [
        term_weights(weight, ones > 0, ones, normaliser=normaliser, aggregation=name) for name in AGGREGATIONS
    ]
    assert all(torch.equal(tokens, found[0]) for tokens in found)
    return (found[0] * len(weight))[::size].tolist()


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_weights(kind):
    assert normalised([raw_weight(kind, k / 8) for k in SUCCESSES]) == pytest.approx(GOLDEN[kind], abs=6e-7)


def test_normalisers_are_their_definitions():
    raw = [0.0, 0.25, 0.5, 0.0, 0.25]
    expected = {"informative": 1 / 3, "batch": 0.2, "dataset": 0.125, "none": 1.0}
    for name, mean in expected.items():
        assert normalised(raw, normaliser=name, dataset_mean=0.125) == pytest.approx(
            [w / mean for w in raw], rel=1e-13
        )
    assert set(expected) == set(NORMALISERS)


def test_informative_questions_average_to_one_without_epsilon():
    # the quantum is 1e-18
    assert normalised([1e-9, 3e-9, 0.0]) == pytest.approx([0.5, 1.5, 0.0], rel=1e-8)


@pytest.mark.parametrize("size", [1, 3, 5, 6, 7, 8, 11, 64])
def test_equal_weights_are_one_bit_for_bit(size):
    """Whatever the common weight, the number of questions and their size, so that SC-SDPO with
    equal pass rates is SDPO.
    """
    for questions in (1, 2, 3, 5, 7, 13, 32):
        for weight in (
            raw_weight("sqrt_pq", 1 / 8),
            raw_weight("sqrt_pq", 1 / 3),
            raw_weight("pq", 3 / 7),
            1.0,
            0.001,
            700.3,
        ):
            assert normalised([weight] * questions, size) == normalised([1.0] * questions, size)
            assert (
                normalised([weight] * questions + [0.0], size)[:-1]
                == normalised([1.0] * questions + [0.0], size)[:-1]
            )


def test_no_informative_question_is_all_zero():
    for name in NORMALISERS:
        assert normalised([0.0, 0.0], normaliser=name, dataset_mean=0.5) == [0.0, 0.0]


def batch(successes=(0, 1, 4, 8), sizes=(2, 3, 4, 1), kind="sqrt_pq"):
    """Questions of unequal size, so that a mean over samples would differ from the mean over
    questions; a mask of tokens, which leaves a part of some responses and nothing of others.
    """
    raw = [raw_weight(kind, k / 8) for k in successes]
    question = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    lens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    owner = torch.arange(10).repeat_interleave(lens)
    place = torch.arange(len(owner)) - (lens.cumsum(0) - lens)[owner]
    taught = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    mask = taught[owner] & (place >= 1) & (place < 6)
    weight = torch.tensor(raw, dtype=torch.float64)[question]
    return weight, torch.tensor(sizes)[question], mask, lens, owner, raw


@pytest.mark.parametrize("kind", ["sqrt_pq", "pq", "none"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights_are_the_definition(kind, aggregation):
    weight, size, mask, lens, owner, raw = batch(kind=kind)
    other = torch.arange(len(mask)) % 3 == 0
    found = global_normalisers(
        {"distill": weight, "nll": weight}, size, {"distill": mask, "nll": other}, lens
    )["distill"]
    informative = [w for w in raw if w > 0]
    mean = sum(informative) / len(informative)
    taking = [int(mask[owner == i].sum()) for i in range(10)]
    taking_part = sum(n > 0 for n in taking)
    # samples 1, 3 and 7 have no token
    assert found.mean_weight == pytest.approx(mean, rel=1e-14) and taking_part == 7
    expected = Normaliser(
        found.mean_weight, len(informative), 4, 10, taking_part, int(mask.sum()), int((mask | other).sum())
    )
    assert found == expected
    weights = term_weights(weight, mask, lens, normaliser=found, aggregation=aggregation, room=16)
    assert weights.dtype == torch.float64
    for t, value in enumerate(weights.tolist()):
        i = int(owner[t])
        share = {
            "sequence_mean": 10 * taking[i],
            "sequence_mean_taking_part": taking_part * taking[i],
            "token_mean": int(mask.sum()),
            "sequence_sum": 10 * 16,
            "token_mean_of_terms": int((mask | other).sum()),
        }[aggregation]
        assert value == (pytest.approx(float(weight[i]) / mean / share, rel=1e-13) if mask[t] else 0.0)


def test_terms_have_their_own_weights_and_masks():
    weight, size, mask, lens, _, _ = batch()
    ones, every = torch.ones_like(weight), torch.ones_like(mask)
    found = global_normalisers({"nll": ones, "distill": weight}, size, {"nll": every, "distill": mask}, lens)
    assert (
        found["nll"].num_tokens
        == found["distill"].num_tokens_of_terms
        == int(lens.sum())
        > found["distill"].num_tokens
    )
    assert (found["nll"].num_questions, found["distill"].num_questions) == (4, 2)
    assert found["nll"].mean_weight == 1.0 and found["nll"].num_samples == found["distill"].num_samples == 10
    assert global_normalisers({}, size, {}, lens) == {}


def test_plain_weights_make_plain_means():
    """Equal weights, every token: the weights of the step add up to 1 in every mean."""
    weight, size, mask, lens, _, _ = batch(kind="none")
    every = torch.ones_like(mask)
    normaliser = global_normalisers({"distill": weight}, size, {"distill": every}, lens)["distill"]
    for aggregation in AGGREGATIONS:
        weights = term_weights(weight, every, lens, normaliser=normaliser, aggregation=aggregation, room=16)
        total = int(lens.sum()) / 160 if aggregation == "sequence_sum" else 1.0
        assert math.fsum(weights.tolist()) == pytest.approx(total, rel=1e-14)


def test_nothing_informative_or_nothing_masked_is_all_zero():
    weight, size, mask, lens, _, _ = batch(successes=(0, 8, 8, 0))
    normaliser = global_normalisers({"distill": weight}, size, {"distill": mask}, lens)["distill"]
    assert (normaliser.mean_weight, normaliser.num_questions, normaliser.num_all_questions) == (0.0, 0, 4)
    none = Normaliser(1.0, 1, 1, 10, 0, 0, 0)
    for aggregation in AGGREGATIONS:
        assert (term_weights(weight, mask, lens, normaliser=normaliser, aggregation=aggregation) == 0).all()
        assert (
            term_weights(weight + 1, mask & False, lens, normaliser=none, aggregation=aggregation) == 0
        ).all()


def test_bad_inputs_are_named():
    weight, size, mask, lens, _, _ = batch()
    with pytest.raises(ValueError, match="aggregation must be one of"):
        term_weights(weight, mask, lens, normaliser=Normaliser(1.0, 1, 1, 1, 1, 1, 1), aggregation="mean")
    with pytest.raises(ValueError, match="one entry per response token, 39"):
        global_normalisers({"distill": weight}, size, {"distill": mask[:10]}, lens)
    with pytest.raises(ValueError, match="one entry per sample"):
        global_normalisers({"distill": weight[:3]}, size, {"distill": mask}, lens)
    with pytest.raises(ValueError, match="normaliser must be one of"):
        global_normalisers({"distill": weight}, size, {"distill": mask}, lens, normaliser="median")
    with pytest.raises(ValueError, match="mean weight of the training rows"):
        global_normalisers({"distill": weight}, size, {"distill": mask}, lens, normaliser="dataset")
    # samples of questions are missing
    with pytest.raises(ValueError, match="question sizes do not fit"):
        global_normalisers({}, size[:-2], {}, lens[:-2])
    for bad in (-0.25, 1e-12, math.nan):
        with pytest.raises(ValueError, match="must be 0 or at least"):
            global_normalisers({"distill": weight + bad}, size, {"distill": mask}, lens)
