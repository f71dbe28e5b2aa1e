"""What SIGTERM does to a command that may have started an engine."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn


def unwind_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that a started engine is closed; exit code 128 + 15."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
