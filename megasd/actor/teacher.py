"""The self-teacher's weights: live, an fp32 exponential moving average, or frozen; sharded exactly as the model is.

Source of the update rule: SDPO (2601.20802) 2.3, phi <- (1 - r) phi + r theta, once after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megasd.config import TeacherConfig


class TeacherWeights:
    """fp32 copies of this rank's parameters (none for a live teacher). No collectives: every rank averages its own shards."""

    def __init__(self, model: torch.nn.Module, config: TeacherConfig) -> None:
        self.model, self.config = model, config
        self.shadow: dict[str, Tensor] = {}
        if config.weights != "live":
            self.shadow = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step; frozen and live teachers do not move."""
        if self.config.weights == "ema":
            for name, p in self.model.named_parameters():
                self.shadow[name].lerp_(p.detach().float(), self.config.ema_rate)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the model with the teacher's weights. The student's storage is only set aside, so optimizer buffers stay valid."""
        if not self.shadow:
            yield
            return
        student = {name: p.data for name, p in self.model.named_parameters()}
        try:
            for name, p in self.model.named_parameters():
                p.data = self.shadow[name].to(p.dtype)  # no copy when the model is fp32
            yield
        finally:
            for name, p in self.model.named_parameters():
                p.data = student[name]

    def tensor_of(self, parameter: Tensor) -> Tensor:
        """The teacher's value of one model parameter, detached, in the parameter's dtype."""
        for name, p in self.model.named_parameters():
            if p is parameter and self.shadow:
                return self.shadow[name].to(p.dtype)
        return parameter.detach()
