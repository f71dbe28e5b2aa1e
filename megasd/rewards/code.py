"""Programs as answers: the verifier `code`.

The answer is the last fenced code block. It runs on every test of the row, in a sandbox, and is
right only when all tests pass.

A row's `answer` is JSON, in the shape of LiveCodeBench's tests:

    {"inputs": ["3 4\\n"], "outputs": ["7\\n"], "fn_name": null, "time_limit": 6}

If fn_name is null, then the program is a script: an input is its standard input, and its standard
output is compared line by line, stripped, without blank lines at the end. Otherwise the program
defines the function fn_name, or `class Solution` with a method of this name: an input is a JSON list
of arguments, or text with one JSON value a line, and the result must equal the output as JSON
(tuples are lists). time_limit: seconds a test; default: reward.timeout.

A program that fails a test is wrong. A program that ran out of time, memory, processes, output or
files, or that used the network, is not judged: TIMEOUT or ERROR, neither right nor wrong.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megasd.rewards.verifier_row import Judgement, RewardSettings, SandboxCheck, Verifier, needs_check
from megasd.types import Prompt, UserError, Verdict

if TYPE_CHECKING:
    # The config reads the table of verifiers, so this file loads the sandbox only to run a program.
    from megasd.rewards.sandbox import Limits, Outcome

FENCE = re.compile(r"^[ \t]*```[^\n`]*\n", re.MULTILINE)
FENCE_END = re.compile(r"^[ \t]*```", re.MULTILINE)
# characters of an input or an output in feedback
SHOWN = 400
# Outcome.limit -> what the program did
LIMITS_MET = {
    "memory": "took more memory than allowed",
    "processes": "started more processes or threads than allowed",
    "output": "printed more than allowed",
    "files": "wrote more to files than allowed",
    "network": "asked for the network, which there is none of",
    "killed": "was killed",
}


@dataclass(frozen=True)
class Tests:
    """The tests of one row; `inputs` and `outputs` have the same length."""

    # standard input, or the arguments as a JSON list
    inputs: list[str]
    # lines of standard output, or the result
    outputs: list[Any]
    # None: the program is a script
    fn_name: str | None
    # how long one test may take
    seconds: float


def last_code_block(text: str) -> str | None:
    """The text of the last ```fenced``` block.

    None when the text has no block, or when the last block never closes: the program is cut off.
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


def read_gold_tests(prompt: Prompt, settings: RewardSettings) -> Tests:
    """The tests in the row's answer. UserError naming the row."""
    return parse_tests(prompt.answer.strip(), prompt.id, settings.timeout)


def check_code(
    program: str, tests: Tests, *, total_seconds: float, limits: Limits | None = None
) -> Judgement:
    """Run a program on its tests, up to the first test that does not pass.

    `total_seconds` bounds all tests together. Feedback shows the input of the failing test and what
    the program printed, never what was expected.
    """
    from megasd.rewards.sandbox import Sandbox
    from megasd.rewards.sandbox_init import CANNOT_START

    deadline = time.monotonic() + total_seconds
    with Sandbox(program, fn_name=tests.fn_name, limits=limits) as sandbox:
        for number, (text, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
            where = f"test {number} of {len(tests.inputs)}"
            left = deadline - time.monotonic()
            if left <= 0:
                return Judgement(Verdict.TIMEOUT, f"{where}: no time left of {total_seconds:g} s")
            outcome = sandbox.run(text, seconds=min(tests.seconds, left))
            if outcome.limit == "time":
                detail = f"{where}: no end within {min(tests.seconds, left):.3g} s"
                return Judgement(Verdict.TIMEOUT, detail, _feedback(text, outcome, "ran out of time"))
            if outcome.limit is not None:
                met = LIMITS_MET[outcome.limit]
                return Judgement(Verdict.ERROR, f"{where}: {met}", _feedback(text, outcome, met))
            if outcome.status == CANNOT_START:
                said = outcome.stderr[-200:]
                return Judgement(Verdict.ERROR, f"{where}: the sandbox could not start the program: {said}")
            if outcome.status:
                return Judgement(Verdict.WRONG, feedback=_feedback(text, outcome, "failed"))
            if not _passes(tests.fn_name, outcome.stdout, expected):
                return Judgement(Verdict.WRONG, feedback=_feedback(text, outcome, "gave a wrong result"))
    return Judgement(Verdict.RIGHT)


def run_tests(program: str, tests: Tests, settings: RewardSettings) -> Judgement:
    """The check of the verifier: check_code with the limits of the config."""
    from megasd.rewards.sandbox import Limits

    limits = Limits(memory_bytes=settings.code_memory_mib << 20)
    return check_code(program, tests, total_seconds=settings.code_seconds, limits=limits)


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


CODE: Verifier[Tests] = Verifier(
    read_answer=last_code_block,
    read_gold=read_gold_tests,
    compare=needs_check,
    no_answer=Judgement(Verdict.WRONG, feedback="No complete fenced code block was found."),
    check=SandboxCheck(run_tests),
    can_vote=False,
)
