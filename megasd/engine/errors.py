"""The errors that an engine can cause."""

from __future__ import annotations

from megasd.types import UserError


class EngineError(RuntimeError):
    """An engine did not do what it was told; telling it again would not help."""


class StartError(EngineError, UserError):
    """An engine does not start.

    Its log says why: most often a setting of rollout.engine, or the machine's memory.
    """


class Refused(EngineError):
    """An engine answered HTTP 4xx: it would refuse the same request again."""


class Unreachable(Exception):
    """A request failed and is worth another try, perhaps with another engine.

    The connection was refused, reset or closed, the answer was HTTP 5xx, or there was no progress.
    """
