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

import base64
import binascii
import difflib
import json
import pickletools
import re
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from megasd.data.rows import DataError, kind_name, short

FIELDS = ("id", "prompt", "answer", "solution", "pass_rate", "rubric")
QUESTION_COLUMNS = ("prompt", "messages", "question", "problem")
KNOWN_COLUMNS = (*FIELDS, *QUESTION_COLUMNS[1:], "label", "reward_model", "extra_info")
# the wording of Kim et al. and of Qwen's model cards
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DAPO_HEAD = re.compile(
    r"\s*Solve the following math problem step by step\..*?\$Answer is the answer to the problem\.\s*",
    re.DOTALL,
)
DAPO_TAIL = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*$')
CHOICE = (
    "Reason step by step. Then write the letter of the right option, and nothing else, between <answer> and"
    " </answer>."
)
CALLS = (
    "Call the functions that the request needs. Write each call as two lines, the input as a JSON object:\n"
    "Action: name of the function\nAction Input: {...}"
)
PROGRAM = (
    "Write a Python program that reads its input from stdin and prints its output. Give the whole program in"
    " one ```python block."
)
FUNCTION = (
    "Complete this Python code. Give the whole of it in one ```python block.\n\n```python\n{starter}\n```"
)
# seconds a test, LiveCodeBench's own
TIME_LIMIT = 6
# of one problem's tests, unpacked
MAX_TESTS_BYTES = 1 << 28
TEXT_PICKLE = {
    "PROTO",
    "FRAME",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
    "MEMOIZE",
    "PUT",
    "BINPUT",
    "LONG_BINPUT",
    "STOP",
}


class Mapped(NamedTuple):
    """Values of FIELDS, unchecked, and the columns they came from where those have other names."""

    values: dict[str, Any]
    names: dict[str, str]


Mapping = Callable[[dict[str, Any], str], list[Mapped | None]]


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


def dapo_math(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """{"prompt": [one user message], "reward_model": {"ground_truth"}, "extra_info": {"index"}}; a
    plain text prompt is taken too.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("content")
    if not isinstance(prompt, str):
        raise DataError(
            f'{where}: "prompt" must be text or one user message, as DAPO-Math-17k has it; check'
            " data.mapping",
            "type",
        )
    values = {"prompt": f"{DAPO_TAIL.sub('', DAPO_HEAD.sub('', prompt, count=1)).strip()}\n{BOXED}"}
    values["answer"] = _column(
        _object(row, "reward_model", where), where, "ground_truth", within="reward_model."
    )
    index = row["extra_info"].get("index") if isinstance(row.get("extra_info"), dict) else None
    values |= {"id": str(index)} if index is not None else {}
    return [Mapped(values, {"answer": "reward_model.ground_truth"})]


def sciknoweval(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """{"question", "choices": {"text": [...], "label": [...]}, "answerKey", "type", "details": {"level"}}."""
    details = row.get("details") if isinstance(row.get("details"), dict) else {}
    if details.get("level", "L3") != "L3" or not str(row.get("type", "mcq")).startswith("mcq"):
        return [None]
    choices = _object(row, "choices", where)
    texts, labels = choices.get("text"), choices.get("label")
    is_list = isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 1
    if not is_list or not all(isinstance(value, str) and value.strip() for value in texts + labels):
        raise DataError(
            f'{where}: "choices" must hold "text" and "label", two lists of as many strings; rewrite it',
            "type",
        )
    key = _column(row, where, "answerKey")
    if len(set(labels)) < len(labels) or key not in labels:
        raise DataError(
            f'{where}: "answerKey" is {short(key)}, which is not one of the options {", ".join(labels)};'
            " correct it",
            "answer",
        )
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    return [
        Mapped({"prompt": f"{_column(row, where, 'question')}\n\n{options}\n\n{CHOICE}", "answer": key}, {})
    ]


def toolalpaca(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """A tool with its Instructions and Golden_Answers, or its Instances; or one request: {"prompt",
    "golden_answer", ("system")}.

    Left out: instances without a call, or with getDetails, which asks the user something.
    """
    if "prompt" in row:
        name = next(
            (name for name in ("golden_answer", "answer") if row.get(name) is not None), "golden_answer"
        )
        prompt = row["prompt"]
        if isinstance(prompt, str) and isinstance(row.get("system"), str) and row["system"].strip():
            prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}]
        values = {
            "prompt": prompt,
            "answer": _calls(_column(row, where, name, kinds=(str, list)), where, name),
        }
        return [Mapped(values | ({"id": row["id"]} if "id" in row else {}), {})]
    tool, name = _column(row, where, "NLDocumentation"), _column(row, where, "Name")
    if "Golden_Answers" in row:
        requests, answers = (
            _column(row, where, "Instructions", kinds=(list,)),
            _column(row, where, "Golden_Answers", kinds=(list,)),
        )
        if len(requests) != len(answers):
            raise DataError(
                f'{where}: {len(requests)} "Instructions" and {len(answers)} "Golden_Answers"; correct them',
                "type",
            )
        pairs = [(request, answer) for request, answer in zip(requests, answers, strict=True)]
    else:
        pairs = [_instance(instance, where) for instance in _column(row, where, "Instances", kinds=(list,))]
    mapped: list[Mapped | None] = []
    for i, (request, answer) in enumerate(pairs):
        if not isinstance(request, str) or not request.strip():
            raise DataError(f"{where}: request {i} is not a text; rewrite it", "type")
        prompt = f"Functions of {name}:\n\n{tool.strip()}\n\nRequest: {request}\n\n{CALLS}"
        values = {"id": f"{name}-{i}", "prompt": prompt}
        mapped.append(
            None
            if answer is None
            else Mapped({**values, "answer": _calls(answer, where, f"request {i}")}, {})
        )
    return mapped


def livecodebench(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """{"question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata":
    {"func_name"}, "question_id"}.
    """
    metadata = _decoded(row.get("metadata") or "{}", where, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    tests = [*_tests(row, where, "public_test_cases"), *_tests(row, where, "private_test_cases")]
    kinds = {test["testtype"] for test in tests}
    if not tests or kinds != {"functional" if name else "stdin"}:
        found = " and ".join(sorted(map(str, kinds))) or "no"
        raise DataError(
            f'{where}: {found} tests, and "metadata" {"names" if name else "names no"} function; correct'
            " the row",
            "answer",
        )
    inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    starter = row.get("starter_code") or ""
    task = FUNCTION.format(starter=starter.rstrip()) if starter.strip() else PROGRAM
    values = {"prompt": f"{_column(row, where, 'question_content').strip()}\n\n{task}"}
    values["answer"] = json.dumps(
        {"inputs": inputs, "outputs": outputs, "fn_name": name or None, "time_limit": TIME_LIMIT}
    )
    return [
        Mapped(values | ({"id": str(row["question_id"])} if row.get("question_id") is not None else {}), {})
    ]


def math500(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """{"problem", "solution", "answer", "unique_id"}."""
    values = {
        "prompt": f"{_column(row, where, 'problem').strip()}\n{BOXED}",
        "answer": _column(row, where, "answer"),
    }
    values |= {"solution": row["solution"]} if row.get("solution") is not None else {}
    return [Mapped(values | ({"id": str(row["unique_id"])} if row.get("unique_id") is not None else {}), {})]


def aime(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """{"problem", "answer": 0 to 999 as number or text, ("solution", "id")}, in capitals or not;
    the id may be ID or problem_idx.
    """
    lower = {key.lower(): value for key, value in row.items()}
    answer = _column(lower, where, "answer", kinds=(str, int))
    if not re.fullmatch(r"\s*0*\d{1,3}\s*", str(answer)):
        raise DataError(
            f'{where}: "answer" is {short(answer)}, and answers of the AIME are numbers from 0 to 999;'
            " correct it",
            "answer",
        )
    values: dict[str, Any] = {
        "prompt": f"{_column(lower, where, 'problem').strip()}\n{BOXED}",
        "answer": str(int(answer)),
    }
    values |= {"solution": lower["solution"]} if lower.get("solution") is not None else {}
    name = next((name for name in ("id", "problem_idx") if lower.get(name) is not None), None)
    return [Mapped(values | ({"id": str(lower[name])} if name else {}), {})]


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


def _column(
    row: dict[str, Any], where: str, name: str, *, kinds: tuple[type, ...] = (str,), within: str = ""
) -> Any:
    value = row.get(name)
    if value is None:
        raise DataError(f'{where}: no "{within}{name}"; add it, or choose another data.mapping', "missing")
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join({str: "text", list: "a list", int: "a number"}[kind] for kind in kinds)
        raise DataError(
            f'{where}: "{within}{name}" is a JSON {kind_name(value)}, not {wanted}; rewrite it', "type"
        )
    if isinstance(value, str) and not value.strip():
        raise DataError(f'{where}: "{within}{name}" is empty; fill it in or drop the row', "empty")
    return value


def _object(row: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    if not isinstance(row.get(name), dict):
        raise DataError(f'{where}: no object "{name}"; add it, or choose another data.mapping', "missing")
    return row[name]


def _decoded(value: Any, where: str, name: str) -> Any:
    """A column that holds JSON as text, or what the text would say."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f'{where}: "{name}" is not valid JSON ({error}); correct it', "answer") from error


def _calls(value: Any, where: str, name: str) -> str:
    """[{"Action": name, "Action_Input": JSON text or object}] as the JSON of the answer."""
    calls = _decoded(value, where, name)
    if not isinstance(calls, list) or not calls:
        raise DataError(f'{where}: "{name}" must be a list of calls; correct it', "answer")
    found = []
    for call in calls:
        lower = {key.lower(): held for key, held in call.items()} if isinstance(call, dict) else {}
        action, given = lower.get("action"), lower.get("action_input", {})
        given = _decoded(given or "{}", where, f"{name}: Action_Input") if isinstance(given, str) else given
        if not isinstance(action, str) or not action.strip() or not isinstance(given, dict):
            raise DataError(
                f'{where}: "{name}": a call needs "Action" and a JSON object "Action_Input", not'
                f" {short(call)}",
                "answer",
            )
        found.append({"action": action.strip(), "action_input": given})
    return json.dumps(found)


def _instance(instance: Any, where: str) -> tuple[Any, list[dict[str, Any]] | None]:
    """Request and calls of one of ToolAlpaca's simulated conversations; its steps are [[action,
    input, thought], observation].
    """
    if not isinstance(instance, dict):
        raise DataError(f'{where}: "Instances" must hold objects; rewrite it', "type")
    try:
        calls = [
            {"Action": step[0][0], "Action_Input": step[0][1]}
            for step in instance.get("intermediate_steps") or []
        ]
    except (TypeError, IndexError, KeyError) as error:
        raise DataError(
            f'{where}: "intermediate_steps" must hold [[action, input, thought], observation]; rewrite it',
            "type",
        ) from error
    request = instance.get("input")
    request = request.rsplit("\nHint: ", 1)[0] if isinstance(request, str) else request
    return request, None if not calls or any(call["Action"] == "getDetails" for call in calls) else calls


def _tests(row: dict[str, Any], where: str, name: str) -> list[dict[str, str]]:
    """A column of tests: JSON, or LiveCodeBench's base64 of zlib of a pickled JSON text, of which
    nothing but a text is read.
    """
    value = _column(row, where, name, kinds=(str, list))
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        try:
            value = _unpacked(value)
        except (ValueError, zlib.error, binascii.Error) as error:
            raise DataError(
                f'{where}: "{name}" is neither JSON nor the packed text of LiveCodeBench ({str(error)[:80]});'
                " write it as JSON, [{input, output, testtype}]",
                "answer",
            ) from error
    tests = _decoded(value, where, name)
    keys = ("input", "output", "testtype")
    if not isinstance(tests, list) or not all(
        isinstance(t, dict) and all(isinstance(t.get(key), str) for key in keys) for t in tests
    ):
        raise DataError(
            f'{where}: "{name}" must list tests of {", ".join(keys)}, all text; correct it', "answer"
        )
    return tests


def _unpacked(packed: str) -> str:
    """The text in base64(zlib(pickle(text))), or base64(zlib(text)). ValueError for a pickle of
    anything else: nothing is unpickled.
    """
    unzip = zlib.decompressobj()
    data = unzip.decompress(base64.b64decode(packed, validate=True), MAX_TESTS_BYTES)
    if unzip.unconsumed_tail:
        raise ValueError(f"more than {MAX_TESTS_BYTES >> 20} MiB")
    if data.lstrip()[:1] == b"[":
        return data.decode("utf-8")
    texts = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in TEXT_PICKLE:
            raise ValueError(f"a pickle with {opcode.name}, which is not read")
        texts += [argument] if isinstance(argument, str) else []
    if len(texts) != 1:
        raise ValueError(f"a pickle of {len(texts)} texts")
    return texts[0]
