"""Tool calls as answers, as ToolAlpaca's scorer in SDPO's code (2601.20802) compares them, without
its faults.

    Action: getForecast
    Action Input: {"city": "Paris", "days": {"from": 1, "to": 3}}

Right: the names after `Action:` are the same multiset as the reference's, and so are the arguments
of all `Action Input:` blocks together, each counted as a pair (key, value). Which call an argument
belongs to is not compared, nor is the order of the calls.

What differs from upstream: its pattern ends at the first "}", so arguments with an object inside
did not parse and were dropped; here they are read by a JSON decoder. Its merged dict keeps one
value a key, so {"id": 1} beside {"id": 2} equalled {"id": 2}; here both count. An input that is no
JSON object is wrong instead of ignored. Its feedback printed the expected call; here it says only
which part is wrong.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from megasd.types import UserError

ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
ACTION_INPUT = re.compile(r"^[ \t]*Action Input:", re.MULTILINE)
# no JSON object holds such a line: its strings have no newlines
LINE = re.compile(r"^[ \t]*Action(?: Input)?:", re.MULTILINE)
DECODER = json.JSONDecoder()
NO_CALL = "no `Action:` line was found"


@dataclass(frozen=True)
class Calls:
    """What a text calls: names, and (key, value as canonical JSON) of all arguments, each with its count."""

    names: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    # `Action Input:` blocks that are no JSON object
    broken: int = 0


def parse_calls(text: str) -> Calls | None:
    """Every call of a text, names and arguments sorted; None without an `Action:` line."""
    names = [name for name in ACTION.findall(text) if name]
    if not names:
        return None
    arguments, broken = [], 0
    ends = [match.start() for match in LINE.finditer(text)][1:] + [len(text)]
    for match, end in zip(LINE.finditer(text), ends, strict=True):
        if not ACTION_INPUT.match(match[0]):
            continue
        try:
            value, _ = DECODER.raw_decode(text[match.end() : end].lstrip())
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            arguments += [(key, json.dumps(item, sort_keys=True)) for key, item in value.items()]
        else:
            broken += 1
    return Calls(tuple(sorted(names)), tuple(sorted(arguments)), broken)


def parse_gold(answer: str, row: str) -> Calls:
    """The calls of a reference answer: text as above, or JSON [{"action": name, "action_input":
    object}]. UserError when it is neither.
    """
    reason = ""
    try:
        calls = _from_json(json.loads(answer)) if answer.lstrip().startswith("[") else parse_calls(answer)
        reason = NO_CALL if calls is None else "an `Action Input:` is no JSON object" if calls.broken else ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason:
        raise UserError(
            f'row {row}: "answer" is no tool call ({reason}); write lines "Action: name" and "Action Input:'
            ' {...}"'
        )
    return calls


def _from_json(calls: list[dict]) -> Calls | None:
    arguments = [
        (key, json.dumps(item, sort_keys=True))
        for call in calls
        for key, item in call["action_input"].items()
    ]
    return Calls(tuple(sorted(call["action"] for call in calls)), tuple(sorted(arguments))) if calls else None


def canonical(calls: Calls) -> str:
    """One text for all ways to write the same calls: the vote of maj@k."""
    return json.dumps([calls.names, calls.arguments, calls.broken])


def compare_calls(found: Calls | None, gold: Calls) -> str:
    """ "" when they are the same calls, else what is wrong, without saying what was expected."""
    if found is None:
        return NO_CALL
    if found.broken:
        return "an `Action Input:` is not a JSON object"
    if Counter(found.names) != Counter(gold.names):
        return "the names of the called tools are not the expected ones"
    missing, unexpected = (
        Counter(gold.arguments) - Counter(found.arguments),
        Counter(found.arguments) - Counter(gold.arguments),
    )
    if not missing and not unexpected:
        return ""
    wrong_values = {key for key, _ in missing} & {key for key, _ in unexpected}
    if wrong_values:
        return f"the value of the argument {sorted(wrong_values)[0]!r} is not the expected one"
    if unexpected:
        return f"the argument {sorted(unexpected)[0][0]!r} is not expected"
    return "an argument is missing"
