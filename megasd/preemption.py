"""Preemption: a signal asks a run to save a checkpoint and to end with exit code 85.

SIGUSR1 (Slurm's --signal) and SIGTERM ask for it; a scheduler then puts the job into the queue
again. Rank 0 decides and the other ranks follow. Sampling and verification are broken off at once:
the next start samples the same questions again. An optimizer step that has begun is finished first.
Plain Python, no torch.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# Exit code of a run that was preempted and has saved.
EXIT_PREEMPTED = 85
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# File in run.dir that marks a preempted run: torchrun's exit code is 1, whatever the ranks' codes were.
PREEMPTED_MARKER = "preempted"


class Preempted(BaseException):
    """The run was asked to save and to end. Raised where the interrupted work can be done again."""


class PreemptionSignal:
    """The signals that this process has received.

    Until `armed` is set, the first signal ends the process (SystemExit; exit code EXIT_PREEMPTED for
    SIGUSR1), since there is nothing to save. Afterwards the first signal is recorded in `received`,
    and further signals change nothing.
    """

    def __init__(self) -> None:
        # True once the run can save a checkpoint.
        self.armed = False
        # Number of the first signal, None before it.
        self.received: int | None = None
        self._interruptible = False

    def install(self) -> None:
        """Handle the signals from now on. Only the main thread may call this."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.armed:
            # SystemExit unwinds the stack, so that a started engine is closed. SIGTERM may also come
            # from torchrun, after another rank has failed.
            raise SystemExit(EXIT_PREEMPTED if number == signal.SIGUSR1 else 128 + number)
        self.received = self.received or number
        if self._interruptible:
            self._interruptible = False
            raise Preempted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context manager: a signal, or one received earlier, raises Preempted in the block."""
        self._interruptible = self.armed
        try:
            if self._interruptible and self.received is not None:
                raise Preempted
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Context manager within `interruptible`: the block runs to its end.

        For work that other ranks take part in. A signal received meanwhile raises Preempted after the
        block.
        """
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        if before and self.received is not None:
            raise Preempted
