"""Importance ratios and the clipped policy gradient, per token: golden values, clipping in every quadrant, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megasd.loss.policy import is_ratio, policy_gradient, tis


def test_golden_is_ratio():
    ratio = is_ratio(torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 2.0)
    assert ratio.tolist() == pytest.approx([0.367879, 1.349859, 2.0], abs=6e-7)


def test_ratios_are_detached_truncated_from_above_only_and_one_on_policy():
    logp = torch.tensor([-100.0, -1.0, 100.0], requires_grad=True)
    old = torch.zeros(3)
    assert not is_ratio(logp, old, 2.0).requires_grad
    assert is_ratio(logp, old, 2.0)[0].item() == pytest.approx(math.exp(-20))
    assert is_ratio(logp, logp.detach(), 2.0).tolist() == [1.0, 1.0, 1.0]
    off = is_ratio(logp, old, None)
    assert off.tolist() == [1.0, 1.0, 1.0] and not off.requires_grad
    assert tis(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -0.5]), 2.0).tolist() == pytest.approx([2.0, math.exp(-0.5)])
    assert tis(torch.tensor([-1.0]), torch.tensor([-9.0]), None).tolist() == [1.0]


@pytest.mark.parametrize(
    "ratio,advantage,value,flows",
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.28, False),  # clipped above
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.8, False),  # clipped below
        (0.9, -1.0, 0.9, True),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_clip(ratio, advantage, value, flows):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = policy_gradient(
        logp, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), clip_low=0.2, clip_high=0.28
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(value)
    assert logp.grad.item() == pytest.approx(value if flows else 0.0)


def test_on_policy_is_reinforce():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.75, -0.25])
    loss = policy_gradient(logp, logp.detach(), advantages, clip_low=0.2, clip_high=0.28)
    loss.sum().backward()
    assert loss.tolist() == (-advantages).tolist() and logp.grad.tolist() == (-advantages).tolist()


def test_far_off_policy_is_finite():
    logp = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = policy_gradient(logp, torch.zeros(2), torch.tensor([-1.0, -1.0]), clip_low=0.2, clip_high=0.28)
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()
