"""From the columns of a row to the fields of a prompt: the names in common use, and those of
published data sets as they are published.

    auto            prompt (text or messages), messages (a last assistant turn is the solution),
                    question, problem; answer, label,
                    reward_model.ground_truth (verl); solution; id, pass_rate, rubric. Two columns for one thing must agree.
    dapo_math       DAPO-Math-17k (arXiv 2503.14476): its instruction to end on an "Answer:" line
                    gives way to a boxed answer, as in
                    Kim et al. (arXiv 2603.24472), since the math verifier reads boxes. Its repeats of a row are left out, and counted.
    sciknoweval     SciKnowEval (arXiv 2406.09098), multiple choice of level 3; the letter is asked
                    for in <answer>. Other rows are left
                    out, and counted.
    toolalpaca      ToolAlpaca (arXiv 2306.05301): a tool per row (`jq -c '.[]'` of its files), or a
                    request per row
    livecodebench   code_generation_lite (arXiv 2403.07974): public and private tests. Train and
                    test share problems upstream.
    math500, aime   MATH-500 and the AIME sets under their several column names; a boxed answer is asked for

Answers are text. Of livecodebench it is JSON, {"inputs": [str], "outputs": [str], "fn_name": str or
null, "time_limit": seconds}: a program is given an input on stdin, or, with a name, a function one
JSON value per line as its arguments; outputs alike. Of toolalpaca it is JSON, [{"action": str,
"action_input": object}], the calls in their order.

A mapping takes (row, where) and gives a list: a Mapped for each prompt of the row, None for what it
leaves out by the rules above.
"""  # noqa: E501

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
    """The names in common use. DataError for a name that looks like one of them, and for two
    columns that disagree.
    """
    for key in row:
        if close := look_alike(key):
            raise DataError(f"{where}: unknown key {short(key)}; did you mean {close!r}? Rename it", "key")
    values = {key: row[key] for key in ("id", "pass_rate", "rubric") if key in row}
    names: dict[str, str] = {}
    questions, solutions = {}, {}
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
            # null: for the error
            values[field] = row[field]
    return [Mapped(values, names)]


MAPPINGS: dict[str, Mapping] = {
    "auto": auto,
    "dapo_math": dapo_math,
    "sciknoweval": sciknoweval,
    "toolalpaca": toolalpaca,
    "livecodebench": livecodebench,
    "math500": math500,
    "aime": aime,
}
# published with every row about a hundred times
DROPS_REPEATS = ("dapo_math",)


@lru_cache(maxsize=4096)
def look_alike(key: str) -> str | None:
    """The known column that an unknown key was probably meant to be: "Answer", "solutoin",
    "pass-rate"; None for metadata.
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
    """The messages up to a last assistant turn, and what that turn says."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return messages[:-1], last.get("content")
    return messages, None


def _agreed(found: dict[str, Any], where: str) -> tuple[Any, str]:
    """The value of the first column, and its name; DataError when another one differs."""
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
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "user"
    ):
        value = value[0].get("content")
    return value.strip() if isinstance(value, str) else value
