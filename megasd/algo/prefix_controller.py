"""A controller that learns how much of the solution the teacher reads (ATESD 2605.11458).

A decision is a fraction alpha of the solution's lines, drawn from Beta(a, b), (a, b) = 1 +
softplus(MLP(state)). A decision holds for HOLD steps. LOOK_AHEAD steps after the decision, the
controller knows its reward: the falls of the student's loss, with g = DISCOUNT,

    R = sum_{i=1..L} g^(i-1) max(0, loss_{i-1} - loss_i)

where loss_0 is the loss of the step before the decision. The paper adds a tenth of the teacher's
log-prob of the reference, which is left out here: it would cost a pass over the references. BATCH
decisions with a reward make one step of REINFORCE with R whitened over them. If the entropy of the
Beta is above MAX_ENTROPY, the excess is penalised. The first HOLD steps have the configured
fraction. Nothing is learned from that fraction, since it was not drawn.

UNSURE: every constant below, the optimiser (plain gradient descent), and what the state's mismatch,
probe and confidence are; the paper's code is not released. Here mismatch is the mean divergence and
confidence exp of the mean log-prob of the sampled tokens. A whole batch has a single alpha, as in
the paper. Torch (on the CPU, float64) is imported when a controller is made, not with this file.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# H: a decision holds for so many steps.
HOLD = 2
# L: so many steps after a decision, its reward is known.
LOOK_AHEAD = 6
# g, the discount of later falls of the loss.
DISCOUNT = 0.9
# The units of the MLP's single hidden layer.
HIDDEN = 16
# So many decisions make one update of the controller.
BATCH = 4
LEARNING_RATE = 0.05
# In nats. The highest entropy of a Beta is 0, the entropy of Beta(1, 1).
MAX_ENTROPY = -0.2
ENTROPY_WEIGHT = 1.0
# The weight of a new step in the averages of the state.
AVERAGE_RATE = 0.2
# The feature "progress" assumes so many steps if the length of the run is not known.
HORIZON = 100
FEATURES = ("progress", "fraction", "loss", "divergence", "confidence")


class PrefixController:
    """Learns `fraction`, how much of the solution to show, from the metrics of each step.

    The same seed and metrics give the same fractions.

    controller = PrefixController(seed=1, start=0.5, steps=100)
    controller.observe({"loss": 0.31, "divergence": 0.31, "logp": -0.4}); controller.fraction
    """

    def __init__(self, *, seed: int, start: float, steps: int | None = None) -> None:
        """Make a controller that has not decided yet.

        start: the fraction of the first steps, in [0, 1]. steps: length of the run, for "progress".
        """
        import torch

        self.seed, self.fraction, self.horizon = seed, start, steps or HORIZON
        self.step, self.decisions, self.updates, self.reward = 0, 0, 0, 0.0
        self.averages: dict[str, float] = {}
        # The loss of the last step.
        self.loss: float | None = None
        # The decisions whose reward is not known yet.
        self.open: list[dict[str, Any]] = []
        # The decisions with a reward, which wait for the next update.
        self.judged: list[dict[str, Any]] = []
        draw = torch.Generator().manual_seed(seed)
        size = len(FEATURES)
        self.weights: list[Tensor] = [
            torch.randn(size, HIDDEN, generator=draw, dtype=torch.float64) / math.sqrt(size),
            torch.zeros(HIDDEN, dtype=torch.float64),
            # With zeros the first draws come from the same Beta around 0.5 in every state.
            torch.zeros(HIDDEN, 2, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
        ]

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a step: "loss", and "divergence" and "logp" if they are there.

        ValueError if there is no finite loss.
        """
        loss = metrics.get("loss", math.nan)
        if not math.isfinite(loss):
            raise ValueError(f"the exposure controller learns from finite losses, got {loss}")
        self._average(metrics, loss)
        for decision in self.open:
            decision["losses"].append(loss)
        due = [d for d in self.open if len(d["losses"]) > LOOK_AHEAD]
        self.open = [d for d in self.open if len(d["losses"]) <= LOOK_AHEAD]
        self.judged += [{"state": d["state"], "fraction": d["fraction"], "reward": _reward(d)} for d in due]
        if len(self.judged) >= BATCH:
            self._learn(self.judged[:BATCH])
            self.judged = self.judged[BATCH:]
        self.loss, self.step = loss, self.step + 1
        if self.step % HOLD == 0:
            self._decide()

    def beta(self) -> tuple[float, float]:
        """(a, b) of the Beta in the present state."""
        import torch

        a, b = self._beta(torch.tensor([self._state()], dtype=torch.float64))[0].tolist()
        return a, b

    def metrics(self) -> dict[str, float]:
        """The fraction, the mean of the Beta, the updates, the mean reward of the last update."""
        a, b = self.beta()
        return {
            "fraction": self.fraction,
            "mean": a / (a + b),
            "updates": float(self.updates),
            "reward": self.reward,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON-able values."""
        names = ("fraction", "step", "decisions", "updates", "reward", "averages", "loss", "open", "judged")
        return deepcopy({name: getattr(self, name) for name in names}) | {
            "weights": [w.tolist() for w in self.weights]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`; seed, start and steps stay as the constructor set."""
        import torch

        for name, value in deepcopy(dict(state)).items():
            setattr(
                self,
                name,
                [torch.tensor(w, dtype=torch.float64) for w in value] if name == "weights" else value,
            )

    def _average(self, metrics: Mapping[str, float], loss: float) -> None:
        seen = {"fraction": self.fraction, "loss": loss, "divergence": metrics.get("divergence", 0.0)}
        seen["confidence"] = math.exp(metrics.get("logp", 0.0))
        for name, value in seen.items():
            old = self.averages.get(name, value)
            self.averages[name] = old + AVERAGE_RATE * (value - old)

    def _state(self) -> list[float]:
        known = {"progress": min(1.0, self.step / self.horizon)} | self.averages
        return [known.get(name, 0.0) for name in FEATURES]

    def _decide(self) -> None:
        self.fraction = random.Random(f"{self.seed}/exposure/{self.decisions}").betavariate(*self.beta())
        self.decisions += 1
        self.open.append({"state": self._state(), "fraction": self.fraction, "losses": [self.loss]})

    def _beta(self, states_BF: Tensor) -> Tensor:
        """(a, b) of each state, [B, 2], each above 1."""
        import torch

        w1, b1, w2, b2 = self.weights
        return 1.0 + torch.nn.functional.softplus(torch.tanh(states_BF @ w1 + b1) @ w2 + b2)

    def _learn(self, decisions: list[dict[str, Any]]) -> None:
        """Make one step of REINFORCE with the given decisions."""
        import torch
        from torch.distributions import Beta

        rewards_B = torch.tensor([d["reward"] for d in decisions], dtype=torch.float64)
        whitened_B = (rewards_B - rewards_B.mean()) / (rewards_B.std() + 1e-8)
        fractions_B = torch.tensor([d["fraction"] for d in decisions], dtype=torch.float64).clamp(
            1e-6, 1 - 1e-6
        )
        self.weights = [w.detach().requires_grad_() for w in self.weights]
        policy = Beta(*self._beta(torch.tensor([d["state"] for d in decisions], dtype=torch.float64)).T)
        excess_B = (policy.entropy() - MAX_ENTROPY).clamp(min=0.0)
        loss = (ENTROPY_WEIGHT * excess_B - whitened_B * policy.log_prob(fractions_B)).mean()
        gradients = torch.autograd.grad(loss, self.weights)
        self.weights = [
            (w - LEARNING_RATE * g).detach() for w, g in zip(self.weights, gradients, strict=True)
        ]
        self.updates, self.reward = self.updates + 1, float(rewards_B.mean())


def _reward(decision: Mapping[str, Any]) -> float:
    losses = decision["losses"]
    return sum(DISCOUNT**i * max(0.0, losses[i] - losses[i + 1]) for i in range(len(losses) - 1))
