"""algo/prefix_controller.py: the controller of ATESD (2605.11458), in a world whose best share of
the solution is known.

Proves the timetable (hold, look-ahead, batch), the reward's formula, that the policy moves to what
is rewarded, and that it is the same for the same seed and after a resume. Does not prove that a
language model learns more with it.
"""

from __future__ import annotations

import json

import pytest
from torch.distributions import Beta

from megasd.algo.prefix_controller import BATCH, DISCOUNT, HOLD, LOOK_AHEAD, MAX_ENTROPY, PrefixController


def run(controller: PrefixController, steps: int, *, best: float, start: int = 0) -> list[float]:
    """A student whose loss falls while the share shown is near `best` and rises while it is not.
    Shares that were shown.
    """
    shown = []
    for _ in range(start, start + steps):
        shown.append(controller.fraction)
        change = 0.5 - abs(controller.fraction - best)
        loss = (controller.loss if controller.loss is not None else 100.0) - change
        controller.observe({"loss": loss, "divergence": 0.1, "logp": -0.3})
    return shown


def test_shares_are_held_and_the_first_is_the_configured_one():
    shown = run(PrefixController(seed=1, start=0.4), 20 * HOLD, best=0.5)
    assert shown[:HOLD] == [0.4] * HOLD
    windows = [shown[k : k + HOLD] for k in range(0, len(shown), HOLD)]
    assert all(len(set(window)) == 1 for window in windows)
    assert len({window[0] for window in windows}) == len(windows) and all(0 < x < 1 for x in shown)


def test_decisions_are_judged_after_the_look_ahead():
    controller = PrefixController(seed=1, start=0.5)
    # the batch's last decision, judged
    first_update = HOLD + (BATCH - 1) * HOLD + LOOK_AHEAD
    run(controller, first_update - 1, best=0.5)
    assert controller.updates == 0
    run(controller, 1, best=0.5)
    assert controller.updates == 1 and controller.judged == []
    assert len(controller.open) == LOOK_AHEAD // HOLD


def test_the_reward_counts_falls_alone_discounted():
    controller = PrefixController(seed=1, start=0.5)
    losses = [1.0] * HOLD + [0.9, 1.2, 1.0, 0.7, 0.7, 0.6]
    assert len(losses) == HOLD + LOOK_AHEAD
    for loss in losses:
        controller.observe({"loss": loss})
    falls = [0.1, 0, 0.2, 0.3, 0, 0.1]
    expected = sum(DISCOUNT**k * fall for k, fall in enumerate(falls))
    assert controller.judged[0]["reward"] == pytest.approx(expected)


@pytest.mark.parametrize("best", [0.1, 0.9])
def test_the_policy_moves_to_what_is_rewarded(best):
    # one draw of six is still on its way to 0.9 by then
    controller = PrefixController(seed=2, start=0.5, steps=1200)
    assert controller.metrics()["mean"] == 0.5
    run(controller, 1200, best=best)
    assert abs(controller.metrics()["mean"] - best) < 0.2
    assert controller.metrics()["updates"] > 100


def test_the_policy_narrows_to_the_bound_on_its_entropy_and_no_further():
    """All rewards alike: only the penalty acts."""
    controller = PrefixController(seed=1, start=0.5)
    for _ in range(2000):
        controller.observe({"loss": 1.0})
    a, b = controller.beta()
    assert float(Beta(a, b).entropy()) == pytest.approx(MAX_ENTROPY, abs=0.02)


def test_the_seed_and_the_figures_decide_everything():
    shown = [run(PrefixController(seed=seed, start=0.5), 60, best=0.3) for seed in (1, 1, 2)]
    assert shown[0] == shown[1] != shown[2]


def test_a_resumed_controller_goes_on():
    straight = PrefixController(seed=5, start=0.5, steps=100)
    run(straight, 37, best=0.3)
    resumed = PrefixController(seed=5, start=0.5, steps=100)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert run(resumed, 40, best=0.3) == run(straight, 40, best=0.3)
    assert resumed.state_dict() == straight.state_dict()


def test_a_loss_that_is_not_finite_is_refused():
    for metrics in ({}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match="finite losses"):
            PrefixController(seed=1, start=0.5).observe(metrics)
