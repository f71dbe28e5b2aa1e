"""The teacher's weights where they are not the live model's, sharded exactly as the model is.

live           the student's own
ema            phi <- (1 - r) phi + r theta, fp32, once after each batch (SDPO 2601.20802, 2.3)
frozen         the start model
snapshot       a copy every `refresh_every` steps (RLSD 2604.03128, RLCSD 2606.11709)
gated          a copy once pass rates have risen and lengths have no long tail (CGTR 2606.03532)
trust_region   softmax((1 - a) z_start + a z_live), both reading the teacher's context (SDPO 2.3)
separate       another model of the same vocabulary, frozen (GKD 2306.13649)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megasd.config.schema import TeacherConfig
from megasd.weights.te_fp8 import lend, plain, storage


@dataclass(frozen=True)
class Refresh:
    """Decides the next copy of a snapshot or gated teacher; JSON-able, saved with a checkpoint."""

    # batches since the last copy
    steps: int = 0
    # Pass rate of the batch after which the last copy was made, at first of the first batch. None
    # before any batch.
    pass_rate: float | None = None
    # copies made so far
    copies: int = 0


@dataclass(frozen=True)
class Outcome:
    """Two numbers of a batch, by which a gated teacher decides whether to copy the student."""

    # share of right answers among the scored samples
    pass_rate: float | None = None
    # the longest response over the mean length
    length_tail: float = 0.0


class TeacherState(Protocol):
    """The weights of a teacher, or of none: what follows the student and what a checkpoint saves."""

    # value of algorithm.teacher.weights; "live" where there is no teacher
    kind: str
    # name of a model parameter -> fp32 copy of this rank's part; empty where no copy is kept
    shadow: dict[str, Tensor]

    def update(self, outcome: Outcome) -> dict[str, float]:
        """Bring the weights up to date after the last update of a batch; returns metrics."""

    def state(self) -> dict[str, object]:
        """Entries of a checkpoint's JSON file."""

    def restore(self, state: dict) -> None:
        """Take over the entries that `state` gave."""


class NoTeacherWeights:
    """The weights of an algorithm without a teacher: none, and a checkpoint says nothing of them."""

    def __init__(self) -> None:
        self.kind = "live"
        self.shadow: dict[str, Tensor] = {}

    def update(self, outcome: Outcome) -> dict[str, float]:
        """Nothing follows the student; no metrics."""
        return {}

    def state(self) -> dict[str, object]:
        """No entries."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing to take over."""


class TeacherWeights:
    """fp32 copies of this rank's parameters, where the kind of teacher keeps them. No collective."""

    def __init__(self, model: torch.nn.Module, config: TeacherConfig) -> None:
        self.model, self.config = model, config
        self.kind: str = config.weights
        self.refresh = Refresh()
        self.shadow: dict[str, Tensor] = {}
        if KINDS[self.kind].has_shadow:
            self.shadow = {name: plain(p).float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, outcome: Outcome) -> dict[str, float]:
        """Bring the copies up to date after the last update of a batch; returns metrics."""
        return KINDS[self.kind].follow(self, outcome)

    def state(self) -> dict[str, object]:
        """The kind and the count towards the next copy; a checkpoint saves the copies as tensors."""
        return {"teacher_weights": self.kind, "teacher_refresh": asdict(self.refresh)}

    def restore(self, state: dict) -> None:
        """Take over the count towards the next copy, which checkpoints of early versions lack."""
        if "teacher_refresh" in state:
            self.refresh = Refresh(**state["teacher_refresh"])

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the model with the teacher's weights while the context lasts.

        The student's storage is only set aside, so optimizer buffers stay valid. FP8 parameters
        (actor.fp8_param_gather) get the teacher's weights quantised again; delayed scaling thereby
        also sees the teacher's largest weights.
        """
        if not self.shadow:
            yield
            return
        student = {name: storage(p) for name, p in self.model.named_parameters()}
        try:
            for name, p in self.model.named_parameters():
                # An fp32 model needs no copy: `to` returns the shadow itself.
                lend(p, self.shadow[name].to(p.dtype))
            yield
        finally:
            for name, p in self.model.named_parameters():
                lend(p, student[name])

    def tensor_of(self, parameter: Tensor) -> Tensor:
        """The teacher's value of one model parameter, detached, in the parameter's dtype."""
        for name, p in self.model.named_parameters():
            if p is parameter and self.shadow:
                return self.shadow[name].to(p.dtype)
        return parameter.detach()


def _stay(weights: TeacherWeights, outcome: Outcome) -> dict[str, float]:
    """Keep the weights as they are: frozen, or the student's own."""
    return {}


def _average(weights: TeacherWeights, outcome: Outcome) -> dict[str, float]:
    """phi <- (1 - r) phi + r theta with r = teacher.ema_rate."""
    for name, p in weights.model.named_parameters():
        weights.shadow[name].lerp_(plain(p).float(), weights.config.ema_rate)
    return {}


def _copy_when_due(weights: TeacherWeights, outcome: Outcome) -> dict[str, float]:
    """Copy the student every `refresh_every` batches."""
    return _copy_if(weights, outcome, lambda state: True)


def _copy_through_gate(weights: TeacherWeights, outcome: Outcome) -> dict[str, float]:
    """Copy the student when a copy is due, pass rates have risen and lengths have no long tail."""
    config = weights.config

    def is_open(state: Refresh) -> bool:
        rise = (outcome.pass_rate or 0.0) - (state.pass_rate or 0.0)
        return rise >= config.gate_gain and outcome.length_tail <= config.gate_length

    return _copy_if(weights, outcome, is_open)


def _copy_if(
    weights: TeacherWeights, outcome: Outcome, is_open: Callable[[Refresh], bool]
) -> dict[str, float]:
    """Copy the student when `refresh_every` batches have gone by and `is_open` of the state."""
    state = weights.refresh
    seen = outcome.pass_rate if state.pass_rate is None else state.pass_rate
    state = replace(state, steps=state.steps + 1, pass_rate=seen)
    if state.steps >= weights.config.refresh_every and is_open(state):
        for name, p in weights.model.named_parameters():
            weights.shadow[name].copy_(plain(p))
        state = Refresh(steps=0, pass_rate=outcome.pass_rate, copies=state.copies + 1)
    weights.refresh = state
    return {"teacher_copies": float(state.copies)}


@dataclass(frozen=True)
class WeightsKind:
    """What a value of algorithm.teacher.weights means."""

    # whether an fp32 copy of the start model is kept
    has_shadow: bool
    # brings the copy up to date after a batch; returns metrics
    follow: Callable[[TeacherWeights, Outcome], dict[str, float]]


KINDS: dict[str, WeightsKind] = {
    "live": WeightsKind(False, _stay),
    "ema": WeightsKind(True, _average),
    "frozen": WeightsKind(True, _stay),
    "snapshot": WeightsKind(True, _copy_when_due),
    "gated": WeightsKind(True, _copy_through_gate),
    "trust_region": WeightsKind(True, _stay),
    "separate": WeightsKind(False, _stay),
}
