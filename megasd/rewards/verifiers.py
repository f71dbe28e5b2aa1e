"""The table of verifiers: from a response's text and the gold answer to a verdict.

A verdict is 1 (right) or 0 (wrong); there is none when the check itself failed. All verifiers read
the text after the last </think>. A response that never closes its <think> has no answer and is
wrong.

    math             the last \\boxed{...} is the gold answer, by math-verify  (math_answers.py)
    exact_match      the whole text is the gold answer                        (answers.py)
    multiple_choice  the chosen letter is the gold letter                     (answers.py)
    tool_use         all tool calls have the gold names and arguments         (tool_use.py)
    code             the last fenced program passes all tests of the row      (code.py)
    rubric           the score, the weighted share of criteria met, reaches
                     reward.rubric_threshold                                  (rubric.py)

A new verifier is a module with a row (rewards/verifier_row.py) and a line in VERIFIERS. The keys of
VERIFIERS are the values of reward.verifier and of --verifier.
"""

from __future__ import annotations

from typing import Any

from megasd.rewards.answers import EXACT_MATCH, MULTIPLE_CHOICE, after_thinking
from megasd.rewards.code import CODE
from megasd.rewards.math_answers import MATH
from megasd.rewards.rubric import RUBRIC
from megasd.rewards.tool_use import TOOL_USE
from megasd.rewards.verifier_row import Verifier
from megasd.types import UserError

VERIFIERS: dict[str, Verifier[Any]] = {
    "math": MATH,
    "exact_match": EXACT_MATCH,
    "multiple_choice": MULTIPLE_CHOICE,
    "tool_use": TOOL_USE,
    "code": CODE,
    "rubric": RUBRIC,
}


def find_verifier(name: str) -> Verifier[Any]:
    """The row of this name; UserError when the table has none."""
    if name not in VERIFIERS:
        raise UserError(f"reward.verifier: {name!r} is not one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name]


def extract_answer(verifier: str, text: str) -> str | None:
    """The final answer of a response as the verifier reads it; None when the response has none.

    The answer is also the vote of maj@k. UserError: no such verifier.
    """
    row, text_after = find_verifier(verifier), after_thinking(text)
    return None if text_after is None else row.read_answer(text_after)
