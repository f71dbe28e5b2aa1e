"""Programs as answers: the last fenced code block, run on every test of the row in a sandbox; right
only when all tests pass.

A row's `answer` is JSON, in the shape of LiveCodeBench's tests:

    {"inputs": ["3 4\\n"], "outputs": ["7\\n"], "fn_name": null, "time_limit": 6}

fn_name null: a script; the input is its standard input, and standard output is compared line by
line, stripped, blank lines at the end dropped. Else the program defines that function, or `class
Solution` with that method; an input is a JSON list of arguments, or text with one JSON value a
line; the result equals the output as JSON (tuples are lists). time_limit: seconds a test (default:
reward.timeout).

A program that fails a test is wrong. One that ran out of time, memory, processes, output or files,
or that asked for the network, was not judged: TIMEOUT or ERROR, neither right nor wrong.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from megasd.rewards.sandbox import Limits, Outcome, Sandbox
from megasd.rewards.sandbox_init import CANNOT_START
from megasd.types import UserError, Verdict

FENCE = re.compile(r"^[ \t]*```[^\n`]*\n", re.MULTILINE)
FENCE_END = re.compile(r"^[ \t]*```", re.MULTILINE)
# characters of an input or an output in feedback
SHOWN = 400


@dataclass(frozen=True)
class Tests:
    # standard input, or the arguments as a JSON list
    inputs: list[str]
    # lines of standard output, or the result
    outputs: list[Any]
    fn_name: str | None
    # a test
    seconds: float


def last_code_block(text: str) -> str | None:
    """The text of the last ```fenced``` block; None without one. One that is never closed is cut
    off: no program.
    """
    position, found = 0, None
    while opening := FENCE.search(text, position):
        closing = FENCE_END.search(text, opening.end())
        if closing is None:
            return None
        found = text[opening.end() : closing.start()]
        position = closing.end()
    return found


def parse_tests(answer: str, row: str, default_seconds: float) -> Tests:
    """The tests of a row's `answer`. UserError naming the row and what is wrong."""
    try:
        tests = json.loads(answer)
        inputs, outputs, fn_name = tests["inputs"], tests["outputs"], tests.get("fn_name")
        seconds = float(tests.get("time_limit") or default_seconds)
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        if fn_name is None:
            return Tests(
                [str(text) for text in inputs], [_lines(str(text)) for text in outputs], None, seconds
            )
        if not isinstance(fn_name, str) or not fn_name.isidentifier():
            raise ValueError(f"fn_name {fn_name!r} is no name of a function")
        return Tests(
            [_arguments(value) for value in inputs], [_value(value) for value in outputs], fn_name, seconds
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(
            f'row {row}: "answer" holds no tests ({reason}); write {{"inputs": [...], "outputs": [...],'
            ' "fn_name": null, "time_limit": 6}'
        ) from error


def check_code(
    program: str, tests: Tests, *, total_seconds: float, limits: Limits | None = None
) -> tuple[Verdict, str, str]:
    """(verdict, detail of a check that failed, feedback for the model), stopping at the first test
    that does not pass.

    `total_seconds` bounds all tests together. Feedback shows the failing test's input and what the
    program printed, never what was expected.
    """
    deadline = time.monotonic() + total_seconds
    with Sandbox(program, fn_name=tests.fn_name, limits=limits) as sandbox:
        for number, (text, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
            left = deadline - time.monotonic()
            if left <= 0:
                return (
                    Verdict.TIMEOUT,
                    f"test {number} of {len(tests.inputs)}: no time left of {total_seconds:g} s",
                    "",
                )
            outcome = sandbox.run(text, seconds=min(tests.seconds, left))
            where = f"test {number} of {len(tests.inputs)}"
            if outcome.limit == "time":
                detail = f"{where}: no end within {min(tests.seconds, left):.3g} s"
                return Verdict.TIMEOUT, detail, _feedback(text, outcome, "ran out of time")
            if outcome.limit is not None:
                return (
                    Verdict.ERROR,
                    f"{where}: {LIMITS_MET[outcome.limit]}",
                    _feedback(text, outcome, LIMITS_MET[outcome.limit]),
                )
            if outcome.status == CANNOT_START:
                return (
                    Verdict.ERROR,
                    f"{where}: the sandbox could not start the program: {outcome.stderr[-200:]}",
                    "",
                )
            if outcome.status:
                return Verdict.WRONG, "", _feedback(text, outcome, "failed")
            if not _passes(tests.fn_name, outcome.stdout, expected):
                return Verdict.WRONG, "", _feedback(text, outcome, "gave a wrong result")
    return Verdict.RIGHT, "", ""


LIMITS_MET = {
    "memory": "took more memory than allowed",
    "processes": "started more processes or threads than allowed",
    "output": "printed more than allowed",
    "files": "wrote more to files than allowed",
    "network": "asked for the network, which there is none of",
    "killed": "was killed",
}


def _passes(fn_name: str | None, stdout: str, expected: Any) -> bool:
    if fn_name is None:
        return _lines(stdout) == expected
    try:
        return _equal(json.loads(stdout), expected)
    except (ValueError, RecursionError):
        return False


def _equal(found: Any, expected: Any) -> bool:
    """Equality of JSON values in which true is not 1."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in found)
    return found == expected


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _arguments(value: Any) -> str:
    """The JSON list of arguments: of a list, or of text with one JSON value a line."""
    if isinstance(value, str):
        value = [json.loads(line) for line in value.splitlines() if line.strip()]
    if not isinstance(value, list):
        raise ValueError(f"arguments {value!r} are no list")
    return json.dumps(value)


def _value(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _feedback(text: str, outcome: Outcome, what: str) -> str:
    lines = [f"The program {what} on this input:", _short(text)]
    if outcome.stdout.strip():
        lines += ["It printed:", _short(outcome.stdout)]
    error = _own_traceback(outcome.stderr)
    if error:
        lines += ["Its error:", _short(error, from_end=True)]
    return "\n".join(lines)


def _own_traceback(stderr: str) -> str:
    """Standard error without the frames of the file that runs the program."""
    kept, skipping = [], False
    for line in stderr.strip().splitlines():
        if line.startswith("  File "):
            skipping = "sandbox_program.py" in line
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def _short(text: str, *, from_end: bool = False) -> str:
    text = text.strip()
    if len(text) <= SHOWN:
        return text
    return f"...{text[-SHOWN:]}" if from_end else f"{text[:SHOWN]}..."
