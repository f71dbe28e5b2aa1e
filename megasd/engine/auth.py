"""The key that protects engines: the environment variable MEGASD_ENGINE_KEY, on both sides.

No config, no argument and no file holds it.

An engine that is started where the variable is set answers only requests with the key
(`Authorization: Bearer`); the client sends it with every request. The key travels as plain HTTP: it
keeps other users of a cluster's network out, but not a user who can read that network.
"""

from __future__ import annotations

import os
import re
from typing import Any

from megasd.types import UserError

VARIABLE = "MEGASD_ENGINE_KEY"
SHORTEST = 16


class Secret(str):
    """A string whose repr hides it, since SGLang logs a dict of all its arguments."""

    def __repr__(self) -> str:
        return "'***'"


def engine_key() -> Secret | None:
    """The key of the engines; None if the variable is not set, or empty.

    UserError for a key that HTTP cannot carry; the message does not quote it.
    """
    found = os.environ.get(VARIABLE, "")
    if not found:
        return None
    if len(found) < SHORTEST or not re.fullmatch(r"[!-~]+", found):
        raise UserError(
            f"environment: {VARIABLE} must be {SHORTEST} or more visible ASCII characters without spaces, as"
            " openssl rand -hex 32 gives"
        )
    return Secret(found)


def protect(server_args: Any) -> None:
    """Give SGLang its `api_key` from the environment, in the server's process.

    The key is then in no argument vector and no log.
    """
    key = engine_key()
    if key is not None:
        server_args.api_key = key
