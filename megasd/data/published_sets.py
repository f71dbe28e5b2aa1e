"""The mappings of published data sets, as they are published.

    dapo_math       The instruction to end on an "Answer:" line becomes the instruction to box the
                    answer, as in Kim et al. (arXiv 2603.24472): the verifier math reads boxes.
                    Repeats of a row are left out, and counted.
    sciknoweval     Multiple choice of level 3; the prompt asks for the letter in <answer>. Other
                    rows are left out, and counted.
    toolalpaca      A tool per row (`jq -c '.[]'` of the files), or a request per row.
    livecodebench   Public and private tests. Train and test share problems upstream.
    math500, aime   Several column names; the prompt asks for a boxed answer.

Answers are text. The answer of livecodebench is JSON, {"inputs": [str], "outputs": [str], "fn_name":
str or null, "time_limit": seconds}. Without fn_name a program reads an input on stdin. With fn_name a
function gets its arguments, one JSON value per line. Outputs have the same form. The answer of
toolalpaca is JSON, [{"action": str, "action_input": object}], the calls in order.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import re
import zlib
from typing import Any

from megasd.data.column_values import Mapped, column, decoded, object_column
from megasd.data.rows import DataError, short

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
# seconds a test, as LiveCodeBench has it
TIME_LIMIT = 6
# how large the unpacked tests of one problem may be
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


def dapo_math(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows {"prompt", "reward_model": {"ground_truth"}, "extra_info": {"index"}}.

    The prompt is a list of one user message, or text.
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
    values["answer"] = column(
        object_column(row, "reward_model", where), where, "ground_truth", within="reward_model."
    )
    index = row["extra_info"].get("index") if isinstance(row.get("extra_info"), dict) else None
    values |= {"id": str(index)} if index is not None else {}
    return [Mapped(values, {"answer": "reward_model.ground_truth"})]


def sciknoweval(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows {"question", "choices": {"text": [], "label": []}, "answerKey", "type", "details": {"level"}}."""
    given = row.get("details")
    details = given if isinstance(given, dict) else {}
    if details.get("level", "L3") != "L3" or not str(row.get("type", "mcq")).startswith("mcq"):
        return [None]
    choices = object_column(row, "choices", where)
    texts, labels = choices.get("text"), choices.get("label")
    if (
        not isinstance(texts, list)
        or not isinstance(labels, list)
        or not len(texts) == len(labels) > 1
        or not all(isinstance(value, str) and value.strip() for value in texts + labels)
    ):
        raise DataError(
            f'{where}: "choices" must hold "text" and "label", two lists of as many strings; rewrite it',
            "type",
        )
    key = column(row, where, "answerKey")
    if len(set(labels)) < len(labels) or key not in labels:
        raise DataError(
            f'{where}: "answerKey" is {short(key)}, which is not one of the options {", ".join(labels)};'
            " correct it",
            "answer",
        )
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    return [
        Mapped({"prompt": f"{column(row, where, 'question')}\n\n{options}\n\n{CHOICE}", "answer": key}, {})
    ]


def toolalpaca(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows of a tool, with Instructions and Golden_Answers or with Instances; or of one request.

    A request is {"prompt", "golden_answer"}, optionally with "system". Instances are left out if they
    have no call, or a call of getDetails, which asks the user something.
    """
    if "prompt" in row:
        return [_request(row, where)]
    tool, name = column(row, where, "NLDocumentation"), column(row, where, "Name")
    if "Golden_Answers" in row:
        requests, answers = (
            column(row, where, "Instructions", kinds=(list,)),
            column(row, where, "Golden_Answers", kinds=(list,)),
        )
        if len(requests) != len(answers):
            raise DataError(
                f'{where}: {len(requests)} "Instructions" and {len(answers)} "Golden_Answers"; correct them',
                "type",
            )
        pairs = [(request, answer) for request, answer in zip(requests, answers, strict=True)]
    else:
        pairs = [_instance(instance, where) for instance in column(row, where, "Instances", kinds=(list,))]
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


def _request(row: dict[str, Any], where: str) -> Mapped:
    """ToolAlpaca's row of one request."""
    name = next((name for name in ("golden_answer", "answer") if row.get(name) is not None), "golden_answer")
    prompt = row["prompt"]
    if isinstance(prompt, str) and isinstance(row.get("system"), str) and row["system"].strip():
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}]
    values = {
        "prompt": prompt,
        "answer": _calls(column(row, where, name, kinds=(str, list)), where, name),
    }
    return Mapped(values | ({"id": row["id"]} if "id" in row else {}), {})


def livecodebench(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows of problems with their tests.

    {"question_content", "starter_code", "public_test_cases", "private_test_cases",
    "metadata": {"func_name"}, "question_id"}
    """
    metadata = decoded(row.get("metadata") or "{}", where, "metadata")
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
    values = {"prompt": f"{column(row, where, 'question_content').strip()}\n\n{task}"}
    values["answer"] = json.dumps(
        {"inputs": inputs, "outputs": outputs, "fn_name": name or None, "time_limit": TIME_LIMIT}
    )
    return [
        Mapped(values | ({"id": str(row["question_id"])} if row.get("question_id") is not None else {}), {})
    ]


def math500(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows {"problem", "solution", "answer", "unique_id"}."""
    values = {
        "prompt": f"{column(row, where, 'problem').strip()}\n{BOXED}",
        "answer": column(row, where, "answer"),
    }
    values |= {"solution": row["solution"]} if row.get("solution") is not None else {}
    return [Mapped(values | ({"id": str(row["unique_id"])} if row.get("unique_id") is not None else {}), {})]


def aime(row: dict[str, Any], where: str) -> list[Mapped | None]:
    """Rows {"problem", "answer", "solution", "id"}, in capitals or not.

    The answer is 0 to 999, as number or text. The solution and the id are optional; the id may also be
    problem_idx.
    """
    lower = {key.lower(): value for key, value in row.items()}
    answer = column(lower, where, "answer", kinds=(str, int))
    if not re.fullmatch(r"\s*0*\d{1,3}\s*", str(answer)):
        raise DataError(
            f'{where}: "answer" is {short(answer)}, and answers of the AIME are numbers from 0 to 999;'
            " correct it",
            "answer",
        )
    values: dict[str, Any] = {
        "prompt": f"{column(lower, where, 'problem').strip()}\n{BOXED}",
        "answer": str(int(answer)),
    }
    values |= {"solution": lower["solution"]} if lower.get("solution") is not None else {}
    name = next((name for name in ("id", "problem_idx") if lower.get(name) is not None), None)
    return [Mapped(values | ({"id": str(lower[name])} if name else {}), {})]


def _calls(value: Any, where: str, name: str) -> str:
    """The answer of tool calls, as JSON; `value`: [{"Action": name, "Action_Input": JSON or object}]."""
    calls = decoded(value, where, name)
    if not isinstance(calls, list) or not calls:
        raise DataError(f'{where}: "{name}" must be a list of calls; correct it', "answer")
    found = []
    for call in calls:
        lower = {key.lower(): held for key, held in call.items()} if isinstance(call, dict) else {}
        action, given = lower.get("action"), lower.get("action_input", {})
        given = decoded(given or "{}", where, f"{name}: Action_Input") if isinstance(given, str) else given
        if not isinstance(action, str) or not action.strip() or not isinstance(given, dict):
            raise DataError(
                f'{where}: "{name}": a call needs "Action" and a JSON object "Action_Input", not'
                f" {short(call)}",
                "answer",
            )
        found.append({"action": action.strip(), "action_input": given})
    return json.dumps(found)


def _instance(instance: Any, where: str) -> tuple[Any, list[dict[str, Any]] | None]:
    """The request and the calls of one of ToolAlpaca's simulated conversations; calls None: left out.

    The steps of a conversation are [[action, input, thought], observation].
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
    """A column of tests: JSON, or base64 of zlib of a pickled JSON text.

    The pickle is searched for one text, and never unpickled.
    """
    value = column(row, where, name, kinds=(str, list))
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        try:
            value = _unpacked(value)
        except (ValueError, zlib.error, binascii.Error) as error:
            raise DataError(
                f'{where}: "{name}" is neither JSON nor the packed text of LiveCodeBench ({str(error)[:80]});'
                " write it as JSON, [{input, output, testtype}]",
                "answer",
            ) from error
    tests = decoded(value, where, name)
    keys = ("input", "output", "testtype")
    if not isinstance(tests, list) or not all(
        isinstance(t, dict) and all(isinstance(t.get(key), str) for key in keys) for t in tests
    ):
        raise DataError(
            f'{where}: "{name}" must list tests of {", ".join(keys)}, all text; correct it', "answer"
        )
    return tests


def _unpacked(packed: str) -> str:
    """The text in base64(zlib(pickle(text))), or in base64(zlib(text)).

    ValueError: a pickle of anything except a text. Nothing is unpickled.
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
