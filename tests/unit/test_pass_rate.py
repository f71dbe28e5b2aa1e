"""Question weights and their normalisation (SC-SDPO), in pure Python, and the same figures through loss/reduce.py in one process.

Does not prove the normaliser over ranks: tests/distributed/test_ops.py.
"""

from __future__ import annotations

import pytest
import torch

from megasd.algo.pass_rate import normalise, question_weight
from megasd.loss.reduce import Normaliser, global_normaliser, megatron_loss, reduce_metrics, token_weights, without_division

SUCCESSES = [0, 1, 4, 7, 8]  # of 8 samples each
GOLDEN = {
    "sqrt_pq": [0.0, 0.854249, 1.291503, 0.854249, 0.0],
    "pq": [0.0, 0.7, 1.6, 0.7, 0.0],
    "none": [1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights(name):
    weights = normalise({str(k): question_weight(name)(k / 8) for k in SUCCESSES})
    assert list(weights.values()) == pytest.approx(GOLDEN[name], abs=6e-7)


def test_informative_questions_average_to_one_without_epsilon():
    weights = normalise({"a": 1e-30, "b": 3e-30, "c": 0.0})
    assert weights == pytest.approx({"a": 0.5, "b": 1.5, "c": 0.0}, rel=1e-12)
    assert normalise({"a": 0.25}) == {"a": 1.0}
    uniform = normalise({str(i): question_weight("sqrt_pq")(0.25) for i in range(7)})
    assert list(uniform.values()) == pytest.approx([1.0] * 7, rel=1e-15)


def test_no_informative_question_is_all_zero():
    assert normalise({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}
    assert normalise({}) == {}


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
    normaliser = global_normaliser(weight, size, taught, lens)
    informative = [w for w in raw if w > 0]
    assert normaliser.mean_weight == pytest.approx(sum(informative) / len(informative), rel=1e-14)
    assert normaliser.num_questions == pytest.approx(len(informative), rel=1e-14)
    assert (normaliser.num_samples, normaliser.num_tokens) == (10, int((lens * taught).sum()))
    weights = token_weights(weight, taught, lens, normaliser=normaliser, aggregation=aggregation)
    assert weights.dtype == torch.float32 and len(weights) == int(lens.sum())
    wbar = normalise({str(j): w for j, w in enumerate(raw)})
    expected = []
    for i, length in enumerate(lens.tolist()):
        share = 1 / (10 * length) if aggregation == "sequence_mean" else 1 / int((lens * taught).sum())
        expected += [wbar[str(question[i])] * float(taught[i]) * share] * length
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_plain_weights_make_plain_means():
    """question_weight none, all taught: a constant loss c gives c in both aggregations."""
    weight, size, _, lens, _, _ = batch(name="none")
    taught = torch.ones(10, dtype=torch.bool)
    normaliser = global_normaliser(weight, size, taught, lens)
    for aggregation in ("sequence_mean", "token_mean"):
        weights = token_weights(weight, taught, lens, normaliser=normaliser, aggregation=aggregation)
        loss, num_tokens, log = megatron_loss(torch.full((int(lens.sum()),), 2.5), weights)
        assert loss.item() == pytest.approx(2.5, rel=1e-6) and log["loss"].item() == loss.item()
        assert num_tokens.dtype == torch.int and num_tokens.item() == 0


def test_nothing_informative_is_zero_loss_and_zero_gradient():
    weight, size, taught, lens, _, _ = batch(successes=(0, 8, 8, 0))
    normaliser = global_normaliser(weight, size, taught, lens)
    assert normaliser == Normaliser(0.0, 0.0, 10.0, normaliser.num_tokens)
    losses = torch.full((int(lens.sum()),), torch.inf, requires_grad=True)  # a masked token may hold anything
    loss, _, _ = megatron_loss(losses, token_weights(weight, taught, lens, normaliser=normaliser, aggregation="sequence_mean"))
    loss.backward()
    assert loss.item() == 0.0 and (losses.grad == 0).all()
    assert token_weights(weight, taught & False, lens, normaliser=Normaliser(1, 1, 10, 0), aggregation="token_mean").sum() == 0


def test_metrics_and_finalize():
    assert reduce_metrics({"loss": 3.0, "tokens": 4}, {"loss": 2.0}, group=None) == {"loss": 1.5, "tokens": 4.0}
    assert reduce_metrics({"loss": 0.0}, {"loss": 0.0}, group=None) == {"loss": 0.0}
    with pytest.raises(ValueError, match="without a sum: kl"):
        reduce_metrics({}, {"kl": 1.0}, group=None)
    seen = []
    without_division(lambda model, num_tokens, **kwargs: seen.append((model, num_tokens, kwargs)))(
        ["chunk"], torch.ones(1), pg_collection=7
    )
    assert seen == [(["chunk"], None, {"pg_collection": 7})]


def test_bad_aggregation_is_named():
    weight, size, taught, lens, _, _ = batch()
    with pytest.raises(ValueError, match="aggregation must be one of"):
        token_weights(weight, taught, lens, normaliser=Normaliser(1, 1, 1, 1), aggregation="mean")
    with pytest.raises(ValueError, match="one entry per sample"):
        global_normaliser(weight, size, taught[:3], lens)
