"""Question weights (SC-SDPO), their normalisation and the reducer's token weights and metrics, through loss/reduce.py in one process.

Does not prove the normaliser over ranks (tests/distributed/test_reduce.py) or the sums themselves (test_reduce.py here).
"""

from __future__ import annotations

import math

import pytest
import torch

from megasd.algo.pass_rate import question_weight
from megasd.loss.reduce import Normaliser, global_normalisers, token_weights

SUCCESSES = [0, 1, 4, 7, 8]  # of 8 samples each
GOLDEN = {
    "sqrt_pq": [0.0, 0.854249, 1.291503, 0.854249, 0.0],
    "pq": [0.0, 0.7, 1.6, 0.7, 0.0],
    "none": [1.0, 1.0, 1.0, 1.0, 1.0],
}


def normalised(raw: list[float], size: int = 8) -> list[float]:
    """Weight of each question over the mean of the informative ones: what token_weights gives a one-token response, times all samples."""
    weight = torch.tensor(raw, dtype=torch.float64).repeat_interleave(size)
    ones = torch.ones(len(weight), dtype=torch.int64)
    normaliser = global_normalisers(weight, ones * size, {"distill": ones > 0}, ones)["distill"]
    tokens = token_weights(weight, ones > 0, ones, normaliser=normaliser, aggregation="sequence_mean")
    assert torch.equal(tokens, token_weights(weight, ones > 0, ones, normaliser=normaliser, aggregation="token_mean"))
    return (tokens * len(weight))[::size].tolist()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights(name):
    weights = normalised([question_weight(name)(k / 8) for k in SUCCESSES])
    assert weights == pytest.approx(GOLDEN[name], abs=6e-7)


def test_informative_questions_average_to_one_without_epsilon():
    assert normalised([1e-9, 3e-9, 0.0]) == pytest.approx([0.5, 1.5, 0.0], rel=1e-8)  # the quantum is 1e-18
    assert normalised([0.25]) == [1.0]
    assert normalised([question_weight("sqrt_pq")(0.25)] * 7, size=3) == pytest.approx([1.0] * 7, rel=1e-14)


def test_no_informative_question_is_all_zero():
    assert normalised([0.0, 0.0]) == [0.0, 0.0]


def test_raw_weights():
    sqrt_pq = question_weight("sqrt_pq")
    assert [round(sqrt_pq(k / 8), 4) for k in range(9)] == [0, 0.3307, 0.4330, 0.4841, 0.5, 0.4841, 0.4330, 0.3307, 0]
    assert sqrt_pq(None) == question_weight("pq")(None) == 0.0
    assert question_weight("none")(None) == 1.0
    with pytest.raises(ValueError, match="pass rate lies in"):
        sqrt_pq(-1.0)  # a reward of -1 for wrong answers must be mapped first
    with pytest.raises(ValueError, match="question_weight must be one of"):
        question_weight("paced")


def batch(successes=(0, 1, 4, 8), sizes=(2, 3, 4, 1), name="sqrt_pq"):
    """Questions of unequal size, so that a mean over samples would differ from the mean over questions."""
    raw = [question_weight(name)(k / 8) for k in successes]
    weight, size, question = [], [], []
    for j, (w, n) in enumerate(zip(raw, sizes, strict=True)):
        weight += [w] * n
        size += [n] * n
        question += [j] * n
    lens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    taught = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    return torch.tensor(weight, dtype=torch.float64), torch.tensor(size), taught, lens, question, raw


@pytest.mark.parametrize("name", ["sqrt_pq", "pq", "none"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_token_weights_are_the_definition(name, aggregation):
    weight, size, taught, lens, question, raw = batch(name=name)
    normaliser = global_normalisers(weight, size, {"distill": taught}, lens)["distill"]
    informative = [w for w in raw if w > 0]
    assert normaliser.mean_weight == pytest.approx(sum(informative) / len(informative), rel=1e-14)
    assert normaliser.num_questions == len(informative)
    assert (normaliser.num_samples, normaliser.num_tokens) == (10, int((lens * taught).sum()))
    weights = token_weights(weight, taught, lens, normaliser=normaliser, aggregation=aggregation)
    assert weights.dtype == torch.float64 and len(weights) == int(lens.sum())
    mean, expected = sum(informative) / len(informative), []
    for i, length in enumerate(lens.tolist()):
        share = 1 / (10 * length) if aggregation == "sequence_mean" else 1 / int((lens * taught).sum())
        expected += [raw[question[i]] / mean * float(taught[i]) * share] * length
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_terms_differ_in_their_tokens_alone():
    weight, size, taught, lens, _, _ = batch()
    found = global_normalisers(weight, size, {"nll": taught | True, "distill": taught}, lens)
    assert found["nll"].num_tokens == int(lens.sum()) > found["distill"].num_tokens == int((lens * taught).sum())
    assert found["nll"].mean_weight == found["distill"].mean_weight and found["nll"].num_samples == found["distill"].num_samples == 10
    assert global_normalisers(weight, size, {}, lens) == {}


def test_plain_weights_make_plain_means():
    """question_weight none, all taught: the weights of the step add up to 1 in both aggregations."""
    weight, size, taught, lens, _, _ = batch(name="none")
    normaliser = global_normalisers(weight, size, {"distill": taught | True}, lens)["distill"]
    for aggregation in ("sequence_mean", "token_mean"):
        weights = token_weights(weight, taught | True, lens, normaliser=normaliser, aggregation=aggregation)
        assert math.fsum(weights.tolist()) == pytest.approx(1.0, rel=1e-14)


def test_nothing_informative_is_all_zero():
    weight, size, taught, lens, _, _ = batch(successes=(0, 8, 8, 0))
    normaliser = global_normalisers(weight, size, {"distill": taught}, lens)["distill"]
    assert normaliser == Normaliser(0.0, 0, 10, int((lens * taught).sum()))
    for aggregation in ("sequence_mean", "token_mean"):
        assert (token_weights(weight, taught, lens, normaliser=normaliser, aggregation=aggregation) == 0).all()
    assert token_weights(weight, taught & False, lens, normaliser=Normaliser(1, 1, 10, 0), aggregation="token_mean").sum() == 0


def test_bad_inputs_are_named():
    weight, size, taught, lens, _, _ = batch()
    with pytest.raises(ValueError, match="aggregation must be one of"):
        token_weights(weight, taught, lens, normaliser=Normaliser(1, 1, 1, 1), aggregation="mean")
    with pytest.raises(ValueError, match="one entry per sample"):
        global_normalisers(weight, size, {"distill": taught[:3]}, lens)
    with pytest.raises(ValueError, match="question sizes do not fit"):  # one of a question's samples is missing
        global_normalisers(weight[:-2], size[:-2], {}, lens[:-2])
    for bad in (-0.25, 1e-12, math.nan):
        with pytest.raises(ValueError, match="must be 0 or at least"):
            global_normalisers(weight + bad, size, {}, lens)
