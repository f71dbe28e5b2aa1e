"""The exact sums of loss/normalise.py, its metrics and what it hands to Megatron, in one process.

Proves: words do not depend on order or grouping, agree with math.fsum of the quantised values, hold
their documented range and give NaN beyond it, for every dtype; metrics from words; masked tokens
add exactly 0 in value and gradient. Does not prove ranks: tests/distributed.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from megasd.loss import exact_sum
from megasd.loss.exact_sum import MAX_VALUES, exact_value, exact_words, reduce_metrics
from megasd.loss.megatron_scaling import megatron_loss, without_division
from megasd.loss.normalise import weighted

QUANTUM = Fraction(1, 2**60)


def spread(n: int, seed: int) -> torch.Tensor:
    """Values of both signs over 40 orders of magnitude, below and above the quantum."""
    g = torch.Generator().manual_seed(seed)
    exponents = torch.rand(n, generator=g, dtype=torch.float64) * 40 - 32
    return torch.randn(n, generator=g, dtype=torch.float64) * 10**exponents


def nearest(value: float) -> Fraction:
    # ties to even, as in the code
    return round(Fraction(value) / QUANTUM) * QUANTUM


@pytest.mark.parametrize("seed", range(5))
def test_words_are_the_sum_of_the_quantised_values(seed):
    values = spread(999, seed)
    exact = sum((nearest(v) for v in values.tolist()), Fraction(0))
    words = exact_words(values)
    assert words.dtype == torch.int64 and words.shape == (3,)
    # float of a Fraction rounds once
    assert exact_value(words) == float(exact)
    assert (
        abs(Fraction(exact_value(words)) - Fraction(math.fsum(values.tolist())))
        <= len(values) * QUANTUM + abs(exact) / 2**52
    )


def test_order_and_grouping_do_not_matter():
    values = spread(1000, 7)
    whole = exact_words(values)
    floats = set()
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        shuffled = values[torch.randperm(len(values), generator=g)]
        # empty parts among them
        cuts = sorted(torch.randint(0, len(values) + 1, (seed % 9,), generator=g).tolist())
        parts = [exact_words(part) for part in torch.tensor_split(shuffled, cuts)]
        assert torch.equal(sum(parts[1:], parts[0]), whole)
        floats.add(torch.stack([p.sum() for p in torch.tensor_split(shuffled, cuts)]).sum().item())
    # the plain sum does depend on them, or this would prove nothing
    assert len(floats) > 1
    # one by one, scalars
    assert torch.equal(sum(exact_words(v) for v in values), whole)


def test_single_values():
    for value in (
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.1,
        -0.1,
        1 / 3,
        2.0**-60,
        -(2.0**-60),
        2.0**37 + 2.0**-15,
        -(2.0**38) * (1 - 2.0**-53),
        3e9 + 0.125,
    ):
        assert exact_value(exact_words(torch.tensor(value, dtype=torch.float64))) == float(nearest(value))
    # a tie, to even
    assert exact_value(exact_words(torch.tensor(2.0**-61, dtype=torch.float64))) == 0.0
    assert exact_value(exact_words(torch.tensor([3 * 2.0**-61, 5e-324], dtype=torch.float64))) == 2.0**-59
    assert exact_value(exact_words(torch.zeros(0))) == 0.0
    assert exact_value(exact_words(torch.tensor([1e8, 1e-15, -1e8], dtype=torch.float64))) == pytest.approx(
        1e-15, abs=2.0**-61
    )


def test_dtypes_and_dimension():
    floats = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_words(floats), exact_words(floats.double()))
    assert exact_value(exact_words(floats.bfloat16())) == math.fsum(
        floats.bfloat16().double().flatten().tolist()
    )
    assert exact_value(exact_words(floats > 0)) == int((floats > 0).sum())
    assert exact_value(exact_words(torch.tensor([2**37, -5]))) == 2**37 - 5
    rows = exact_words(floats.requires_grad_(), dim=-1)
    assert rows.shape == (5, 3) and not rows.requires_grad
    assert all(torch.equal(row, exact_words(values)) for row, values in zip(rows, floats, strict=True))
    assert torch.equal(rows.sum(0), exact_words(floats))
    assert torch.equal(exact_words(floats[:, :0], dim=-1), torch.zeros(5, 3, dtype=torch.int64))


def test_low_word_needs_no_carry_in_its_range():
    """The largest low word there is, 2^35 units, 2^28 - 1 times, with either sign: 64 bits hold it.
    A product stands in for the sum.
    """
    for sign in (1, -1):
        # half a unit of the high word: rounds to even 0, all of it stays low
        value = sign * 2.0**-25
        words = exact_words(torch.tensor(value, dtype=torch.float64))
        assert words.tolist() == [0, sign * 2**35, 0]
        many = words * (MAX_VALUES - 1)
        assert exact_value(many) == value * (MAX_VALUES - 1)
        assert exact_value(many + exact_words(torch.tensor(-value, dtype=torch.float64))) == value * (
            MAX_VALUES - 2
        )


def test_high_word_cannot_wrap_unseen():
    """Just below the guard the sum is right; from the guard on it is NaN, before the word is full,
    also for huge values that cancel.
    """
    for value, count in (
        (2.0**38 - 2.0**-14, 1),
        (2.0**37, 1),
        (255.99, MAX_VALUES - 1),
        (1023.0, 2**28 - 2**10),
    ):
        for sign in (1, -1):
            words = exact_words(torch.tensor(sign * value, dtype=torch.float64)) * count
            if count * (value // 256) < 2**30:
                assert exact_value(words) == float(nearest(value) * sign * count)
            else:
                assert math.isnan(exact_value(words))
            # what Python's integers say: no wrap
            assert abs(int(words[0])) == abs(round(Fraction(value) * 2**24)) * count < 2**63
    assert math.isnan(exact_value(exact_words(torch.tensor([2.0**37, -(2.0**37)], dtype=torch.float64))))
    assert (
        exact_value(exact_words(torch.tensor([2.0**36, 2.0**36, 2.0**36], dtype=torch.float64)))
        == 3 * 2.0**36
    )
    # The worst mixture: the guard at its last value below the bound, every value just short of the next unit.
    assert (2**30 - 1 + MAX_VALUES) * 2**8 * 2**24 + MAX_VALUES // 2 < 2**63
    # And the guard itself, every value not finite.
    assert 2**30 * MAX_VALUES < 2**63


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, 2.0**38, -(2.0**38)])
def test_values_out_of_range_are_nan(bad):
    values = torch.tensor([1.0, bad, 2.0], dtype=torch.float64)
    assert math.isnan(exact_value(exact_words(values)))
    words = exact_words(values[:1]) + exact_words(values[1:2]) + exact_words(values[2:])
    assert torch.equal(words, exact_words(values)) and torch.equal(words, exact_words(values.flip(0)))
    assert math.isnan(exact_value(exact_words(torch.tensor([bad, -bad], dtype=torch.float64))))


def test_too_many_values(monkeypatch):
    monkeypatch.setattr(exact_sum, "MAX_VALUES", 8)
    exact_words(torch.zeros(7))
    with pytest.raises(ValueError, match="fewer than 2\\^28 values, got 8"):
        exact_words(torch.zeros(8))


def test_weighing_and_what_megatron_gets():
    losses = torch.tensor([2.0, math.inf, math.nan, -3.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.0, 0.25], dtype=torch.float64)
    weighed = weighted(losses, weights)
    assert weighed.dtype == torch.float64 and exact_value(exact_words(weighed)) == 0.25
    loss, num_tokens, log = megatron_loss(weighed.sum().float())
    loss.backward()
    # masked tokens: exactly 0
    assert losses.grad.tolist() == weights.tolist()
    assert loss.item() == 0.25 and log == {}
    assert num_tokens.dtype == torch.int and num_tokens.item() == 0
    with pytest.raises(ValueError, match="must be a scalar"):
        megatron_loss(losses)
    nothing = torch.tensor([math.inf, 1.0], requires_grad=True)
    megatron_loss(weighted(nothing, torch.zeros(2, dtype=torch.float64)).sum())[0].backward()
    assert nothing.grad.tolist() == [0.0, 0.0]
    seen = []
    without_division(lambda model, num_tokens, **kwargs: seen.append((model, num_tokens, kwargs)))(
        ["chunk"], torch.ones(1), pg_collection=7
    )
    assert seen == [(["chunk"], None, {"pg_collection": 7})]


def test_metrics():
    def words(*values: float) -> torch.Tensor:
        return exact_words(torch.tensor(values, dtype=torch.float64))

    assert reduce_metrics({"loss": words(1.0, 2.0), "tokens": words(2)}, {"loss": "tokens"}, group=None) == {
        "loss": 1.5,
        "tokens": 2.0,
    }
    assert reduce_metrics({"loss": words(), "tokens": words()}, {"loss": "tokens"}, group=None) == {
        "loss": 0.0,
        "tokens": 0.0,
    }
    # A weight may itself be a metric with a weight: sums are divided, not means.
    three = {"a": words(3), "b": words(4), "c": words(2)}
    assert reduce_metrics(three, {"a": "b", "b": "c"}, group=None) == {"a": 0.75, "b": 2.0, "c": 2.0}
    assert math.isnan(
        reduce_metrics({"loss": words(math.inf), "tokens": words(2)}, {"loss": "tokens"}, group=None)["loss"]
    )
    assert reduce_metrics({}, {}, group=None) == {}
    with pytest.raises(ValueError, match="without a sum: kl, tokens"):
        reduce_metrics({}, {"kl": "tokens"}, group=None)
