"""Statistics of responses and of the batch (loss/sequence_stats.py) in one process: golden values,
the definitions in plain Python, edges.

Proves: each function equals its definition on a batch of responses of 1 to 13 tokens under masks;
the median is exact; the gate's states; nothing outside a mask counts; empty batches. Does not prove
that ranks agree (tests/distributed/test_methods.py).
"""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from megasd.loss.sequence_stats import (
    EntropyGate,
    confidence,
    entropy_discount,
    margin_shift,
    median,
    returns,
    scan,
    sequence_log_ratio,
)

LENS = torch.tensor([4, 1, 13, 2, 7, 3])
OWNER = torch.arange(6).repeat_interleave(LENS)
PLACE = torch.arange(30) - (LENS.cumsum(0) - LENS)[OWNER]
# sample 3 not at all, sample 1 by its length
MASK = (OWNER != 3) & (PLACE >= 1) & (PLACE < 9)
NO_LENS, NO_MASK = LENS[:0], MASK[:0]


def values(seed=0):
    return torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def garbage(x):
    """What stands outside the mask must not matter: huge there."""
    return torch.where(MASK, x, 1e6)


def by_sample(x):
    """The masked values of each sample, with their places in [R]."""
    return [[(t, x[t].item()) for t in ((OWNER == i) & MASK).nonzero()[:, 0].tolist()] for i in range(6)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_confidence_is_one_on_average(scale):
    entropy = values().abs()
    found = confidence(garbage(entropy), MASK, scale=scale, group=None)
    raw = [math.exp(-scale * h) for one in by_sample(entropy) for _, h in one]
    expected = torch.zeros(30, dtype=torch.float64)
    expected[MASK] = torch.tensor(raw, dtype=torch.float64) / statistics.fmean(raw)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert found[MASK].mean().item() == pytest.approx(1.0, rel=1e-13)
    # no information: exactly 1
    assert scale or torch.equal(found, MASK.double())
    assert (confidence(entropy, MASK & False, scale=scale, group=None) == 0).all()


@pytest.mark.parametrize("window", [0, 1, 3, 50])
# the highest entropy below and above the floor of 1 nat
@pytest.mark.parametrize("factor", [0.1, 2.0])
def test_entropy_discount_is_its_definition(window, factor):
    entropy = values(1).abs() * factor
    found = entropy_discount(garbage(entropy), MASK, LENS, scale=1.3, window=window, group=None)
    highest = max(1.0, max(h for one in by_sample(entropy) for _, h in one))
    expected = [1.0] * 30
    for one in by_sample(entropy):
        for k, (t, _) in enumerate(one):
            expected[t] = min(max(1 - 1.3 * min(h for _, h in one[k : k + window + 1]) / highest, 0.1), 1.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-13)
    assert factor < 1 or min(expected) == 0.1 or window


def test_golden_entropy_discount():
    """EGRSD's golden vectors: gamma 0.3, entropies 0.5 and 2, the highest 2."""
    found = entropy_discount(
        torch.tensor([0.5, 2.0]), MASK[1:3] | True, torch.tensor([2]), scale=0.3, window=0, group=None
    )
    assert found.tolist() == pytest.approx([0.925, 0.7], rel=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001, 4096])
def test_median_is_the_lower_one_exactly(size):
    g = torch.Generator().manual_seed(size)
    for x in (
        torch.randn(size, generator=g),
        torch.randn(size, generator=g) * 1e-30,
        torch.randint(-3, 3, (size,), generator=g).float(),
        -torch.rand(size, generator=g),
        torch.rand(size, generator=g).double() * 1e30,
        torch.zeros(size),
    ):
        assert median(x, torch.ones(size, dtype=torch.bool), group=None) == x.float().median().item()
        half = torch.arange(size) % 2 == 0
        assert median(torch.where(half, x, -1e30), half, group=None) == x[half].float().median().item()
    assert math.isnan(median(torch.ones(size), torch.zeros(size, dtype=torch.bool), group=None))


def test_gate_is_a_schmitt_trigger():
    gate = EntropyGate(warmup=3, ratio=0.9)
    # the reference is their mean, 1
    assert [gate.observe(x) for x in (1.0, math.nan, 2.0, 0.0)] == [False] * 4
    assert [gate.observe(x) for x in (0.95, 0.91, 0.89, 0.95, 0.99, 1.0, 0.9, 0.5)] == [
        True,
        True,
        False,
        False,
        False,
        True,
        True,
        False,
    ]
    state = json.loads(json.dumps(gate.state_dict()))
    other = EntropyGate(warmup=3, ratio=0.9)
    other.load_state_dict(state)
    assert other == gate
    assert [other.observe(x) for x in (math.nan, 0.95, 1.2, math.nan)] == [False, False, True, True]


def test_gate_with_ratio_zero_never_shuts():
    gate = EntropyGate(warmup=1, ratio=0.0)
    assert [gate.observe(x) for x in (5.0, 0.001, 0.0, 7.0)] == [False, True, True, True]


def test_returns_are_whitened_means_of_what_is_to_come():
    x = values(2) * 3
    found = returns(garbage(x), MASK, LENS, clip=2.0, group=None)
    raw = {}
    for one in by_sample(x):
        for k, (t, _) in enumerate(one):
            raw[t] = statistics.fmean(min(max(v, -2.0), 2.0) for _, v in one[k:])
    mean = statistics.fmean(raw.values())
    std = math.sqrt(statistics.pvariance(raw.values()) + 1e-8)
    for t, value in enumerate(found.tolist()):
        assert value == (pytest.approx((raw[t] - mean) / std, rel=1e-12, abs=1e-14) if MASK[t] else 0.0)
    one = returns(x, torch.arange(30) == 5, LENS, clip=2.0, group=None)
    assert (one == 0).all()
    assert (returns(x, MASK & False, LENS, clip=2.0, group=None) == 0).all()


RIGHT = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
SCORED = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.bool)


def margin(x, **options):
    options = {"right_N": RIGHT, "scored_N": SCORED, "margin": 0.4} | options
    return margin_shift(garbage(x), MASK, LENS, **options, group=None)


def test_margin_is_made_half_and_half():
    x = values(3)
    found = margin(x, margin=5.0)
    mean = [statistics.fmean(v for _, v in one) if one else None for one in by_sample(x)]
    # 1 and 3 have no token
    gap = statistics.fmean([mean[0], mean[2]]) - statistics.fmean([mean[4], mean[5]])
    shift = (5.0 - gap) / 2
    for t, value in enumerate(found.tolist()):
        expected = x[t].item() + (shift if RIGHT[OWNER[t]] else -shift)
        assert value == (pytest.approx(expected, rel=1e-12) if MASK[t] else 0.0)
    after = [statistics.fmean(v for _, v in one) if one else None for one in by_sample(found)]
    assert statistics.fmean([after[0], after[2]]) - statistics.fmean([after[4], after[5]]) == pytest.approx(
        5.0
    )


def test_margin_leaves_alone_what_leads_or_has_one_class():
    x = values(3)
    plain = torch.where(MASK, x, 0.0)
    assert torch.equal(margin(x, margin=-9.0), plain)
    for right in (RIGHT | True, RIGHT & False):
        assert torch.equal(margin(x, right_N=right, margin=5.0), plain)
    scored = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.bool)
    found = margin(x, scored_N=scored, margin=5.0)
    assert torch.equal(found[OWNER == 5], plain[OWNER == 5]) and not torch.equal(
        found[OWNER == 4], plain[OWNER == 4]
    )
    only_without_tokens = torch.tensor([0, 1, 0, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(margin(x, right_N=only_without_tokens, margin=5.0), plain)


def test_golden_scan():
    r = torch.tensor([0.01, 0.02, 0.3, 0.02], dtype=torch.float64)
    c = scan(r, torch.ones(4, dtype=torch.bool), torch.tensor([4]), kappa=5.0)
    gates = [(c[k + 1].item() - 1) / c[k].item() for k in range(3)]
    assert gates == pytest.approx([0.595681, 0.583583, 0.256832], abs=6e-7)
    assert (c * r).mean().item() == pytest.approx(0.162799, abs=6e-7)


@pytest.mark.parametrize("kappa", [0.0, 5.0])
def test_scan_is_the_gradient_of_the_backward_recursion(kappa):
    x = values(4).abs().requires_grad_()
    total = 0.0
    for i in range(6):
        r = x[(OWNER == i) & MASK]
        if len(r):
            gate = torch.sigmoid(-kappa * (r - r.mean())).detach()
            carried = r[-1]
            total = total + carried
            for k in range(len(r) - 2, -1, -1):
                carried = r[k] + gate[k] * carried
                total = total + carried
    (expected,) = torch.autograd.grad(total, x)
    found = scan(garbage(x.detach()), MASK, LENS, kappa=kappa)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert (found * x.detach()).sum().item() == pytest.approx(total.item(), rel=1e-12)


def test_sequence_log_ratio_is_the_mean_over_the_response():
    logp, old = values(5), values(6)
    found = sequence_log_ratio(logp, old, LENS)
    for i in range(6):
        assert found[OWNER == i].tolist() == pytest.approx(
            [(logp - old)[OWNER == i].mean().item()] * int(LENS[i]), rel=1e-12
        )
    assert (sequence_log_ratio(logp, logp, LENS) == 0).all()


def test_no_samples():
    none = torch.zeros(0)
    assert (
        len(confidence(none, NO_MASK, scale=1.0, group=None))
        == len(scan(none, NO_MASK, NO_LENS, kappa=5.0))
        == 0
    )
    assert len(entropy_discount(none, NO_MASK, NO_LENS, scale=1.0, window=3, group=None)) == 0
    assert (
        len(returns(none, NO_MASK, NO_LENS, clip=1.0, group=None))
        == len(sequence_log_ratio(none, none, NO_LENS))
        == 0
    )
    assert len(margin_shift(none, NO_MASK, NO_LENS, NO_MASK, NO_MASK, margin=1.0, group=None)) == 0
    assert math.isnan(median(none, NO_MASK, group=None))
