"""A clock for tests of time limits that does not go while the machine is busy with something else."""

from __future__ import annotations

import resource
import time

# Seconds past a limit that no load excuses.
NET = 120.0


def _stalled() -> float:
    """Seconds in which some task waited for a processor or a disk, ever; 0 where the kernel does not say."""
    total = 0.0
    for name in ("cpu", "io"):
        try:
            with open(f"/proc/pressure/{name}") as file:
                total += int(file.readline().rpartition("total=")[2]) / 1e6
        except (OSError, ValueError):
            pass
    return total


def processor_seconds() -> float:
    """Of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Clock:
    """Goes from when it is made. On a quiet machine its seconds are everybody's, as they always are where the
    kernel gives no /proc/pressure."""

    def __init__(self) -> None:
        self._began, self._stalled = time.monotonic(), _stalled()

    def within(self, seconds: float) -> bool:
        """Whether no more have gone by, less those in which something waited for the machine."""
        elapsed = time.monotonic() - self._began
        return elapsed - (_stalled() - self._stalled) < seconds and elapsed < seconds + NET
