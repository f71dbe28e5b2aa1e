"""One verifier process: `python -m megasd.rewards.worker CHECK TIMEOUT`, driven by
rewards/worker_pool.py over pipes.

    -> {"answer": "\\frac{1}{2}", "gold": "0.5"}                    a line on stdin
    <- {"verdict": "right", "detail": "", "result": null}          a line on stdout; the first line is {"ready": true}

Three deadlines, because sympy and regular expressions can hang in pure Python and in C alike: an
alarm after TIMEOUT seconds raises inside the check (the worker lives on); the parent kills the
worker half a second later; and a watchdog thread ends an orphan whose parent is gone. RLIMIT_AS
bounds memory. Imports neither torch nor transformers.
"""  # noqa: E501

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# address space; sympy with its caches takes about 0.5 GB of it
MAX_MEMORY_BYTES = 4 << 30
# seconds past the alarm until the parent kills; the watchdog waits twice as long
GRACE = 0.5


class CheckTimeout(BaseException):
    """Raised by the alarm; no Exception, so that sympy's and math-verify's own handlers let it pass."""


def check_math(answer: str, gold: str) -> bool:
    """Whether two final answers are the same mathematics, by math-verify: 10\\% is 0.1, \\frac12 is
    0.5, x=3 is 3.

    Its own timeouts are off: they would turn a hung comparison into a wrong answer.
    """
    from math_verify import parse, verify

    def boxed(text: str) -> str:
        return text if "\\boxed" in text else f"\\boxed{{{text}}}"

    gold_parsed = parse(boxed(gold), parsing_timeout=None, raise_on_error=True)
    answer_parsed = parse(boxed(answer), parsing_timeout=None, raise_on_error=True)
    return verify(gold_parsed, answer_parsed, timeout_seconds=None, raise_on_error=True)


def judge_rubric(answer: str, gold: str) -> list[tuple[float, float, str]]:
    """(weight, value, rule) of each criterion of a response; `gold` is JSON of the row's id,
    answer, solution and rubric.
    """
    from megasd.rewards.rubric import RuleJudge
    from megasd.types import Prompt

    row, reference, solution, rubric = json.loads(gold)
    return RuleJudge().explain(Prompt(row, [], reference, solution, rubric=rubric), answer)


WORKER_CHECKS: dict[str, Callable[[str, str], Any]] = {"math": check_math, "rubric": judge_rubric}


def serve_checks(check: Callable[[str, str], Any], timeout: float) -> None:
    """Answer requests until stdin closes. `timeout`: seconds a check may take. A check that returns
    no bool has its result passed on.
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


def _reply(stream, message: dict) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def main(argv: list[str], check: Callable[[str, str], Any] | None = None) -> None:
    """Serve WORKER_CHECKS[argv[-2]], or `check`, with the timeout argv[-1]."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check = check or WORKER_CHECKS[argv[-2]]
    if check is check_math:
        import logging

        # it warns that its own timeouts are off
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # the first use of sympy takes half a second: before "ready", outside every deadline
        check_math("\\frac{1}{2}", "0.5")
    serve_checks(check, float(argv[-1]))


if __name__ == "__main__":
    main(sys.argv[1:])
