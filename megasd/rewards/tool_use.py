"""Tool calls as answers: the verifier `tool_use`.

Calls are compared as ToolAlpaca's scorer in the code of SDPO (2601.20802) compares them, without the
faults of that scorer.

    Action: getForecast
    Action Input: {"city": "Paris", "days": {"from": 1, "to": 3}}

Right: the names after `Action:` are the same multiset as the reference's, and so are the arguments
of all `Action Input:` blocks together, each counted as a pair (key, value). Which call an argument
belongs to is not compared, nor is the order of the calls.

What differs from upstream:

* The upstream pattern ends at the first "}": arguments that hold an object did not parse and were
  dropped. Here a JSON decoder reads them.
* The upstream dict keeps one value a key: {"id": 1} and {"id": 2} together equalled {"id": 2}. Here
  both count.
* An input that is no JSON object is wrong here; upstream ignores it.
* Upstream feedback printed the expected call. Here feedback says only which part is wrong.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from megasd.rewards.verifier_row import Judgement, RewardSettings, Verifier
from megasd.types import Prompt, UserError, Verdict

ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
ACTION_INPUT = re.compile(r"^[ \t]*Action Input:", re.MULTILINE)
# No JSON object holds such a line, because JSON strings have no newlines.
LINE = re.compile(r"^[ \t]*Action(?: Input)?:", re.MULTILINE)
DECODER = json.JSONDecoder()
NO_CALL = "no `Action:` line was found"


@dataclass(frozen=True)
class Calls:
    """The calls of a text, both parts sorted: the names, and (key, value as JSON) of all arguments."""

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
    try:
        calls = _from_json(json.loads(answer)) if answer.lstrip().startswith("[") else parse_calls(answer)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _no_calls(row, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if calls is None:
        raise _no_calls(row, NO_CALL)
    if calls.broken:
        raise _no_calls(row, "an `Action Input:` is no JSON object")
    return calls


def _no_calls(row: str, reason: str) -> UserError:
    return UserError(
        f'row {row}: "answer" is no tool call ({reason}); write lines "Action: name" and "Action Input:'
        ' {...}"'
    )


def _from_json(calls: list[dict]) -> Calls | None:
    arguments = [
        (key, json.dumps(item, sort_keys=True))
        for call in calls
        for key, item in call["action_input"].items()
    ]
    return Calls(tuple(sorted(call["action"] for call in calls)), tuple(sorted(arguments))) if calls else None


def canonical(calls: Calls) -> str:
    """One text for all ways to write the same calls: the answer, and the vote of maj@k."""
    return json.dumps([calls.names, calls.arguments, calls.broken])


def from_canonical(text: str) -> Calls:
    """The calls that `canonical` wrote."""
    names, arguments, broken = json.loads(text)
    return Calls(tuple(names), tuple((key, value) for key, value in arguments), broken)


def read_calls(text: str) -> str | None:
    """The calls of a response as one canonical text; None without an `Action:` line."""
    calls = parse_calls(text)
    return None if calls is None else canonical(calls)


def read_gold_calls(prompt: Prompt, settings: RewardSettings) -> Calls:
    """The calls in the row's answer. UserError naming the row."""
    return parse_gold(prompt.answer.strip(), prompt.id)


def judge_calls(answer: str, gold: Calls) -> Judgement:
    """RIGHT for the same calls, else WRONG with feedback on the part that differs."""
    wrong = compare_calls(from_canonical(answer), gold)
    return _wrong(wrong) if wrong else Judgement(Verdict.RIGHT)


def _wrong(reason: str) -> Judgement:
    return Judgement(Verdict.WRONG, feedback=f"The tool call is wrong: {reason}.")


def compare_calls(found: Calls | None, gold: Calls) -> str:
    """What is wrong with the calls, without saying what was expected; empty for the same calls."""
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


TOOL_USE: Verifier[Calls] = Verifier(
    read_answer=read_calls,
    read_gold=read_gold_calls,
    compare=judge_calls,
    no_answer=_wrong(NO_CALL),
)
