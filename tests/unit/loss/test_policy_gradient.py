"""Importance ratios and the surrogates of the policy gradient, per token: golden values, clipping
in every quadrant, gradients.

Proves: values and gradients of ppo (dual clip too), gspo, cispo, importance and reinforce equal
their published formulas, on and off policy; the corrections truncate or mask as said. Does not
prove which tokens they are given.
"""

from __future__ import annotations

import math

import pytest
import torch

from megasd.loss.policy_gradient import SURROGATES, is_ratio, policy_gradient, tis

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_is_ratio():
    ratio = is_ratio(t(-1.0, 0.3, 1.2), torch.zeros(3, dtype=torch.float64), 2.0)
    assert ratio.tolist() == pytest.approx([0.367879, 1.349859, 2.0], abs=6e-7)


def test_ratios_are_detached_truncated_from_above_only_and_one_on_policy():
    logp = torch.tensor([-100.0, -1.0, 100.0], requires_grad=True)
    old = torch.zeros(3)
    assert not is_ratio(logp, old, 2.0).requires_grad
    assert is_ratio(logp, old, 2.0)[0].item() == pytest.approx(math.exp(-20))
    assert is_ratio(logp, logp.detach(), 2.0).tolist() == [1.0, 1.0, 1.0]
    off = is_ratio(logp, old, None)
    assert off.tolist() == [1.0, 1.0, 1.0] and not off.requires_grad
    assert tis(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -0.5]), 2.0).tolist() == pytest.approx(
        [2.0, math.exp(-0.5)]
    )
    assert tis(torch.tensor([-1.0]), torch.tensor([-9.0]), None).tolist() == [1.0]


def test_tis_masks_or_truncates_between_its_bounds():
    # ratios e^2, e^.5, e^-.5, e^-2.5
    old, rollout = t(-1.0, -1.0, -1.0, -1.0), t(-3.0, -1.5, -0.5, 1.5)
    kept = [math.exp(0.5), math.exp(-0.5)]
    assert tis(old, rollout, 2.0, low=0.5, mode="truncate").tolist() == pytest.approx([2.0, *kept, 0.5])
    assert tis(old, rollout, 2.0, low=0.5, mode="mask").tolist() == pytest.approx([0.0, *kept, 0.0])
    assert tis(old, rollout, 2.0, mode="mask").tolist() == pytest.approx([0.0, *kept, math.exp(-2.5)])
    # the bounds are inside
    assert tis(t(0.0), t(0.0), 1.0, low=1.0, mode="mask").tolist() == [1.0]
    with pytest.raises(ValueError, match="mode must be one of"):
        tis(old, rollout, 2.0, mode="drop")


@pytest.mark.parametrize(
    "ratio,advantage,value,flows",
    [
        (1.1, 1.0, -1.1, True),
        # clipped above
        (1.5, 1.0, -1.28, False),
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        # clipped below
        (0.5, -1.0, 0.8, False),
        (0.9, -1.0, 0.9, True),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_clip(ratio, advantage, value, flows):
    logp = t(math.log(ratio)).requires_grad_()
    loss = policy_gradient(logp, t(0.0), t(advantage), **CLIPS)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value)
    assert logp.grad.item() == pytest.approx(value if flows else 0.0)


@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
@pytest.mark.parametrize(
    "ratio,advantage,value,flows",
    [
        (5.0, -1.0, 3.0, False),
        (2.0, -1.0, 2.0, True),
        (0.5, -1.0, 0.8, False),
        (5.0, 1.0, -1.28, False),
        (0.1, 2.0, -0.2, True),
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens(surrogate, ratio, advantage, value, flows):
    logp = t(math.log(ratio)).requires_grad_()
    sequence = logp.detach().clone()
    loss = policy_gradient(
        logp, t(0.0), t(advantage), surrogate=surrogate, dual_clip=3.0, sequence_log_ratio_T=sequence, **CLIPS
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(value)
    assert logp.grad.item() == pytest.approx(value if flows else 0.0)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_on_policy_every_gradient_is_reinforce(surrogate, dual_clip):
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.75, -0.25], requires_grad=True)
    options = {"sequence_log_ratio_T": torch.zeros(2), "dual_clip": dual_clip}
    loss = policy_gradient(logp, logp.detach(), advantages, surrogate=surrogate, **options, **CLIPS)
    loss.sum().backward()
    assert logp.grad.tolist() == (-advantages).tolist() and advantages.grad is None
    values = -advantages * (logp if surrogate in ("cispo", "reinforce") else 1.0)
    assert loss.tolist() == values.tolist()


def off_policy(n=200):
    g = torch.Generator().manual_seed(0)
    logp, old, advantages = torch.randn(3, n, generator=g, dtype=torch.float64)
    return (logp * 0.7 - 2).requires_grad_(), old * 0.7 - 2, advantages


def test_gspo_clips_the_sequence_and_differentiates_the_token():
    """sg(s) pi / sg(pi): the value of every token of a response is the sequence's, the gradient s A
    grad log pi where it is not clipped.
    """
    logp, old, advantages = off_policy()
    ratio = (torch.arange(200) % 5 - 2) * 2e-4
    loss = policy_gradient(
        logp, old, advantages, surrogate="gspo", clip_low=3e-4, clip_high=4e-4, sequence_log_ratio_T=ratio
    )
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    for s, a, value, slope in zip(
        ratio.exp().tolist(), advantages.tolist(), loss.tolist(), grad.tolist(), strict=True
    ):
        clipped = min(max(s, 1 - 3e-4), 1 + 4e-4)
        assert value == pytest.approx(-min(s * a, clipped * a), rel=1e-12)
        assert slope == pytest.approx(-s * a if s * a <= clipped * a else 0.0, rel=1e-12)
    assert (grad == 0).any() and (grad != 0).any()
    with pytest.raises(ValueError, match="sequence_log_ratio_T"):
        policy_gradient(logp, old, advantages, surrogate="gspo", **CLIPS)


def test_cispo_drops_no_token():
    logp, old, advantages = off_policy()
    loss = policy_gradient(logp, old, advantages, surrogate="cispo", **CLIPS)
    weight = (logp.detach() - old).exp().clamp(0.8, 1.28)
    torch.testing.assert_close(loss, -weight * advantages * logp, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logp)[0], -weight * advantages, rtol=1e-13, atol=0
    )


def test_importance_and_reinforce_do_not_clip():
    logp, old, advantages = off_policy()
    ratio = (logp.detach() - old).exp()
    loss = policy_gradient(logp, old, advantages, surrogate="importance", **CLIPS)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logp)[0], -ratio * advantages, rtol=1e-13, atol=0
    )
    loss = policy_gradient(logp, old, advantages, surrogate="reinforce", **CLIPS)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], -advantages, rtol=1e-13, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_far_off_policy_is_finite(surrogate):
    logp = torch.tensor([500.0, -500.0], requires_grad=True)
    options = {"sequence_log_ratio_T": torch.tensor([500.0, -500.0])}
    loss = policy_gradient(
        logp, torch.zeros(2), torch.tensor([-1.0, -1.0]), surrogate=surrogate, **options, **CLIPS
    )
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()


def test_an_unknown_surrogate_is_named():
    with pytest.raises(ValueError, match="surrogate must be one of ppo, gspo"):
        policy_gradient(t(0.0), t(0.0), t(1.0), surrogate="trpo", **CLIPS)
