"""Told to leave: SIGUSR1 (Slurm's --signal) or SIGTERM asks a run to save and to end with exit code
85, so that it is queued again.

Rank 0 decides, the others follow it: it leaves what it samples or verifies at once, and goes on
from the batch's questions when it is started again; an optimizer step that has begun is finished
first. Plain Python.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# exit code: told to leave, and saved
EXIT_PREEMPTED = 85
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# file of run.dir that says so, since torchrun's own exit code is 1 whatever a rank's was
PREEMPTED_MARKER = "preempted"


class Preempted(BaseException):
    """The run was told to leave. Raised by `PreemptionSignal` where what is under way can be done again."""


class PreemptionSignal:
    """What this process was told. Before `armed` a signal ends it (SystemExit; by SIGUSR1 with
    EXIT_PREEMPTED, since there is nothing to save yet); then the first one counts, and more change
    nothing.
    """

    def __init__(self) -> None:
        # whether there is a run to save
        self.armed = False
        # the signal
        self.asked: int | None = None
        self._breakable = False

    def install(self) -> None:
        """Take the signals over; main thread only."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.armed:
            # Unwinds the stack, so that a started engine is closed. SIGTERM may also come from
            # torchrun, after another rank's failure.
            raise SystemExit(EXIT_PREEMPTED if number == signal.SIGUSR1 else 128 + number)
        self.asked = self.asked or number
        if self._breakable:
            self._breakable = False
            raise Preempted

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """Leave is raised in the block as soon as the process is told to, or at once if it was before."""
        self._breakable = self.armed
        try:
            if self._breakable and self.asked is not None:
                raise Preempted
            yield
        finally:
            self._breakable = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within `breakable`: a part that must be finished, since other ranks take part in it."""
        before, self._breakable = self._breakable, False
        try:
            yield
        finally:
            self._breakable = before
        if before and self.asked is not None:
            raise Preempted
