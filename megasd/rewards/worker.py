"""One verifier process: `python -m megasd.rewards.worker CHECK [PREPARE] TIMEOUT`.

rewards/worker_pool.py drives it over pipes. CHECK and PREPARE name functions of modules, such as
megasd.rewards.math_answers:check_math. PREPARE runs once, before the first line:

    <- {"ready": true}                                       the first line on stdout
    -> {"answer": "\\frac{1}{2}", "gold": "0.5"}             a line on stdin
    <- {"verdict": "right", "detail": "", "result": null}    a line on stdout

A check has three deadlines, because sympy and regular expressions can hang in pure Python and in C
alike:

1. An alarm after TIMEOUT seconds raises inside the check, and the worker goes on.
2. The parent kills the worker half a second later.
3. A watchdog thread ends an orphan whose parent is gone.

RLIMIT_AS bounds memory. This process imports neither torch nor transformers.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

# address space; sympy with its caches takes about 0.5 GB of it
MAX_MEMORY_BYTES = 4 << 30
# Seconds from the alarm until the parent kills. The watchdog waits twice as long.
GRACE = 0.5


class CheckTimeout(BaseException):
    """Raised by the alarm. It is no Exception, so handlers in sympy and math-verify let it pass."""


def serve_checks(check: Callable[[str, str], Any], timeout: float) -> None:
    """Answer requests until stdin closes. `timeout`: seconds a check may take.

    True and False of a check become verdicts. Any other result is passed on.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # whatever a library prints must not reach the protocol
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, _raise_timeout)
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _reply(replies, _judge(check, request["answer"], request["gold"], timeout))


def _judge(check: Callable[[str, str], Any], answer: str, gold: str, timeout: float) -> dict[str, Any]:
    faulthandler.dump_traceback_later(timeout + 2 * GRACE, exit=True)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            found = check(answer, gold)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except CheckTimeout:
        return {"verdict": "timeout", "detail": f"no verdict within {timeout:g} s", "result": None}
    except Exception as error:
        # str() of a sympy argument may itself hang
        said = error.args[0] if error.args and isinstance(error.args[0], str) else ""
        return {
            "verdict": "error",
            "detail": f"{type(error).__name__}: {' '.join(said.split())[:200]}",
            "result": None,
        }
    finally:
        faulthandler.cancel_dump_traceback_later()
    if isinstance(found, bool):
        return {"verdict": "right" if found else "wrong", "detail": "", "result": None}
    return {"verdict": "right", "detail": "", "result": found}


def _raise_timeout(signum: int, frame: FrameType | None) -> None:
    raise CheckTimeout


def _reply(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def main(argv: list[str], check: Callable[[str, str], Any] | None = None) -> None:
    """Serve `check`, or the function that argv names; argv is CHECK [PREPARE] TIMEOUT, or TIMEOUT."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    *names, timeout = argv
    if check is None:
        check, *prepare = map(_find_function, names)
        for function in prepare:
            function()
    serve_checks(check, float(timeout))


def _find_function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    main(sys.argv[1:])
