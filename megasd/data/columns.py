"""From the columns of a row to the fields of a prompt: the table of mappings.

    auto            the column names in common use (below)
    dapo_math       DAPO-Math-17k (arXiv 2503.14476)
    sciknoweval     SciKnowEval (arXiv 2406.09098)
    toolalpaca      ToolAlpaca (arXiv 2306.05301)
    livecodebench   code_generation_lite (arXiv 2403.07974)
    math500, aime   MATH-500, and the AIME sets

data/published_sets.py has the mappings of published data sets. `auto` reads:

    prompt      prompt (text or messages), messages, question, problem
    answer      answer, label, reward_model.ground_truth (verl)
    solution    solution, or a last assistant turn of messages
    the rest    id, pass_rate, rubric

Two columns for one field must agree.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any

from megasd.data.column_values import Mapped, Mapping
from megasd.data.published_sets import aime, dapo_math, livecodebench, math500, sciknoweval, toolalpaca
from megasd.data.rows import DataError, kind_name, short

FIELDS = ("id", "prompt", "answer", "solution", "pass_rate", "rubric")
QUESTION_COLUMNS = ("prompt", "messages", "question", "problem")
KNOWN_COLUMNS = (*FIELDS, *QUESTION_COLUMNS[1:], "label", "reward_model", "extra_info")


def auto(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Read the column names in common use.

    DataError: a name that looks like a known name, or two columns that disagree.
    """
    for key in row:
        if close := look_alike(key):
            raise DataError(f"{where}: unknown key {short(key)}; did you mean {close!r}? Rename it", "key")
    values: dict[str, Any] = {key: row[key] for key in ("id", "pass_rate", "rubric") if key in row}
    names: dict[str, str] = {}
    questions: dict[str, Any] = {}
    solutions: dict[str, Any] = {}
    for key in QUESTION_COLUMNS:
        if row.get(key) is not None:
            questions[key], said = _without_answer(row[key]) if key == "messages" else (row[key], None)
            solutions |= {"messages": said} if said is not None else {}
    solutions |= {"solution": row["solution"]} if row.get("solution") is not None else {}
    answers = {key: row[key] for key in ("answer", "label") if row.get(key) is not None}
    if (reward := row.get("reward_model")) is not None:
        if not isinstance(reward, dict):
            raise DataError(
                f'{where}: "reward_model" is a JSON {kind_name(reward)}, not an object; rewrite it', "type"
            )
        answers |= (
            {"reward_model.ground_truth": reward["ground_truth"]}
            if reward.get("ground_truth") is not None
            else {}
        )
    for field, found in (("prompt", questions), ("answer", answers), ("solution", solutions)):
        if found:
            values[field], names[field] = _agreed(found, where)
        elif field in row and field != "solution":
            # A null is kept, so that the error names it.
            values[field] = row[field]
    return [Mapped(values, names)]


MAPPINGS: dict[str, Mapping] = {
    "auto": Mapping(auto),
    # published with every row about a hundred times
    "dapo_math": Mapping(dapo_math, verifier="math", drops_repeats=True),
    "sciknoweval": Mapping(sciknoweval, verifier="multiple_choice"),
    "toolalpaca": Mapping(toolalpaca, verifier="tool_use"),
    "livecodebench": Mapping(livecodebench, verifier="code"),
    "math500": Mapping(math500, verifier="math"),
    "aime": Mapping(aime, verifier="math"),
}


@lru_cache(maxsize=4096)
def look_alike(key: str) -> str | None:
    """The known column that a key was probably meant to be; None for metadata.

    Such keys are "Answer", "solutoin" and "pass-rate".
    """
    if key in KNOWN_COLUMNS:
        return None
    plain = re.sub(r"[\W_]", "", key).lower()
    for known in KNOWN_COLUMNS:
        if plain in (known.replace("_", ""), known.replace("_", "") + "s"):
            return known
    affixed = any(
        key.lower().startswith(f"{known}_") or key.lower().endswith(f"_{known}") for known in KNOWN_COLUMNS
    )
    near = (
        []
        if affixed
        else difflib.get_close_matches(
            key.lower(), [known for known in KNOWN_COLUMNS if len(known) > 2], n=1, cutoff=0.8
        )
    )
    return near[0] if near else None


def _without_answer(messages: Any) -> tuple[Any, Any]:
    """The messages without a last assistant turn, and the text of this turn."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return messages[:-1], last.get("content")
    return messages, None


def _agreed(found: dict[str, Any], where: str) -> tuple[Any, str]:
    """The value of the first column, and its name. DataError: another column differs."""
    (first, value), *others = found.items()
    for name, other in others:
        if _comparable(other) != _comparable(value):
            raise DataError(
                f'{where}: "{first}" and "{name}" disagree ({short(value)}, {short(other)}); keep one of'
                " them",
                "columns",
            )
    return value, first


def _comparable(value: Any) -> Any:
    """A prompt as text, stripped, if it is text or a single user message."""
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "user"
    ):
        value = value[0].get("content")
    return value.strip() if isinstance(value, str) else value
