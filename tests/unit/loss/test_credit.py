"""Advantages in the light of a teacher: golden values, the formulas written out, and what must never happen.

Proves: RLSD, CEPO, AntiSD, EGRSD and RLCSD per token equal their published formulas; no sign of an
advantage changes where the paper forbids it; a teacher equal to the student changes nothing, bit
for bit; results are constants. Does not prove ranks or that the objective uses them
(tests/distributed/test_methods.py).
"""

from __future__ import annotations

import math

import pytest
import torch

from megasd.loss.credit import antisd, contrast, egrsd, phi, rlcsd, rlsd


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "a,d,lam,expected",
    [(1, 0.1, 0.5, 1.052585), (1, 0.5, 0.5, 1.1), (-1, 0.5, 0.5, -0.9), (-1, -0.1, 0.25, -1.026293)],
)
def test_golden_rlsd(a, d, lam, expected):
    assert rlsd(t(a), t(d), lam=lam, clip=0.2).item() == pytest.approx(expected, abs=6e-7)


def test_golden_phi():
    expected = [-0.346574, -0.283110, -0.109535, 0, 0.140465, 0.716890, 9.653426]
    assert phi(t(-20, -2, -0.5, 0, 0.5, 2, 20)).tolist() == pytest.approx(expected, abs=6e-7)


def test_golden_rlcsd():
    second, mask = rlcsd(t(0.9, 0.3, -0.9), t(-0.05, -0.05, 0.05), lam=0.5, tau=0.02, threshold=0.02)
    assert second.tolist() == pytest.approx([0.406693, 0.0, -0.406693], abs=6e-7) and mask.all()


def grid(n=400, seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    a, d = torch.randn(2, n, generator=g, dtype=torch.float64) * scale
    a[::7] = 0.0
    return a, d


@pytest.mark.parametrize("lam,clip", [(0.5, 0.2), (1.0, 0.5), (0.3, 1.0), (0.0, 0.2)])
def test_rlsd_is_its_formula_and_keeps_every_sign(lam, clip):
    a, d = grid()
    found = rlsd(a, d, lam=lam, clip=clip)
    for x, y, z in zip(a.tolist(), d.tolist(), found.tolist(), strict=True):
        w = math.exp(math.copysign(1, x) * y)
        assert z == pytest.approx(
            x * ((1 - lam) + lam * min(max(w, 1 - clip), 1 + clip)), rel=1e-13, abs=1e-15
        )
    assert (found.sign() * a.sign() >= 0).all() and (found[a == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_said_changes_nothing_bit_for_bit(dtype):
    """lam 0, or log T = log S, or e = 0: the advantages of GRPO, for every lam."""
    a, d = (x.to(dtype) for x in grid())
    zero = torch.zeros_like(a)
    for lam in (0.1, 0.3, 0.49, 0.5, 0.7, 1.0, 1 / 3):
        assert torch.equal(rlsd(a, zero, lam=lam, clip=0.2), a)
        assert torch.equal(antisd(a, zero, lam=lam), a)
        second, mask = rlcsd(a, zero, lam=lam, tau=0.02, threshold=0.02)
        assert torch.equal(second, a) and not mask.any()
    assert torch.equal(rlsd(a, d * 100, lam=0.0, clip=0.2), a) and torch.equal(antisd(a, d, lam=0.0), a)
    assert torch.equal(egrsd(a, zero, torch.ones_like(a), clip=0.2), a)


def test_antisd_subtracts_phi_where_the_gate_is_open():
    a, u = grid()
    assert torch.equal(antisd(a, u, lam=0.5), a - 0.5 * phi(u))
    gate = (torch.arange(len(a)) % 2).double() * 0.5
    assert torch.equal(antisd(a, u, lam=gate)[::2], a[::2]) and torch.equal(
        antisd(a, u, lam=gate)[1::2], antisd(a, u, lam=0.5)[1::2]
    )


def test_phi_is_bounded_below_and_accurate_near_zero():
    """phi = (softplus(u) - log 2) / 2, and its derivative sigmoid(u) / 2, in float32 too, where the
    plain difference loses all digits.
    """
    u = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(
        phi(u), 0.5 * (torch.nn.functional.softplus(u, threshold=100) - math.log(2)), rtol=1e-13, atol=1e-15
    )
    assert phi(t(-1e4)).item() == pytest.approx(-0.5 * math.log(2)) and phi(t(1e4)).item() == pytest.approx(
        5e3 - 0.5 * math.log(2)
    )
    small = torch.tensor([1e-6, -1e-6])
    torch.testing.assert_close(phi(small), small / 4, rtol=1e-5, atol=0)


def test_golden_egrsd():
    # gamma 0.3, H 0.5 and 2 of at most 2; tests/unit/loss/test_sequence_stats.py makes them
    om = t(1 - 0.3 * 0.5 / 2, 1 - 0.3 * 2 / 2)
    assert egrsd(t(1, -1), t(0.1, 0.5), om, clip=0.2).tolist() == pytest.approx([1.022283, -0.56], abs=6e-7)


def test_contrast_is_the_gap_to_the_mean_of_the_contexts_present():
    teacher, others = -torch.rand(5, dtype=torch.float64), -torch.rand(3, 5, dtype=torch.float64) * 4
    present = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    garbage = others.masked_fill(~present, torch.nan)
    found = contrast(teacher, garbage, present)
    for i in range(5):
        told = others[present[:, i], i].exp()
        assert found[i].item() == pytest.approx(
            0.0 if not len(told) else teacher[i].item() - math.log(told.mean().item()), rel=1e-13
        )
    assert found[3] == 0.0
    assert torch.equal(contrast(teacher, others[:0], present[:0]), torch.zeros(5, dtype=torch.float64))
    # CEPO: one context
    torch.testing.assert_close(
        contrast(teacher, others[:1], torch.ones(1, 5, dtype=torch.bool)), teacher - others[0]
    )


def test_cepo_is_rlsd_on_the_contrast():
    a, plus = grid(seed=1)
    minus = grid(seed=2)[1]
    e = contrast(plus, minus[None], torch.ones(1, len(plus), dtype=torch.bool))
    torch.testing.assert_close(rlsd(a, e, lam=0.5, clip=0.5), rlsd(a, plus - minus, lam=0.5, clip=0.5))


def test_rlcsd_masks_and_never_crosses_zero():
    a, e = grid(scale=0.05)
    a = a * 4
    second, mask = rlcsd(a, e, lam=0.5, tau=0.02, threshold=0.02)
    residual = 0.5 * torch.tanh(e / 0.02)
    assert torch.equal(mask, residual.abs() > 0.02) and 0 < int(mask.sum()) < len(a)
    for x, r, m, z in zip(a.tolist(), residual.tolist(), mask.tolist(), second.tolist(), strict=True):
        expected = x + r if m else x
        expected = max(0.0, expected) if x > 0 else min(0.0, expected) if x < 0 else 0.0
        assert z == pytest.approx(expected, abs=1e-15)
    assert (second * a >= 0).all() and ((second == 0) & (a != 0)).any()


def test_results_are_finite_constants():
    """Impossible tokens (+-inf) and no gradient."""
    a = t(1, -1, 0, 1, -1, 0).requires_grad_()
    u = t(math.inf, math.inf, math.inf, -math.inf, -math.inf, -math.inf).requires_grad_()
    for found in (
        rlsd(a, u, lam=0.5, clip=0.2),
        egrsd(a, u, torch.ones(6), clip=0.2),
        rlcsd(a, u, lam=0.5, tau=0.02, threshold=0.02)[0],
    ):
        assert found.isfinite().all() and not found.requires_grad
    assert (
        not antisd(a, u, lam=0.5).requires_grad
        and not contrast(a, u[None], torch.ones(1, 6, dtype=torch.bool)).requires_grad
    )
