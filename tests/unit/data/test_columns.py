"""data/columns.py: published data sets as they are published become prompts, on small files of the
same shape made here.

Proves for each mapping the prompt, the answer and the id of a row, in JSONL and in parquet; that
the answers are those which the verifiers of code and of tool calls read; that rows outside a
mapping's task are left out and counted, and bad ones refused by line; that packed tests are read
without unpickling. Column names were taken from the publishers' cards and code; that the published
files have no others is not proven.
"""

from __future__ import annotations

import base64
import json
import logging
import pickle
import zlib
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow as pa
import pytest
from pyarrow import parquet

from megasd.config.schema import DataConfig
from megasd.data.check import CheckRules, check_file
from megasd.data.columns import MAPPINGS, look_alike
from megasd.data.prompts import DataError, load_prompts
from megasd.data.published_sets import BOXED
from megasd.rewards.code import parse_tests
from megasd.rewards.tool_use import parse_calls, parse_gold
from megasd.types import Prompt

DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form"
    " Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo(i: int) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{DAPO_HEAD}What is {i} + 1?{DAPO_TAIL}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"uuid-{i}"},
    }


def science(**changes: object) -> dict:
    row = {
        "prompt": {"default": "Given a question and four options, ..."},
        "question": "Which gas do plants take in?",
        "choices": {"text": ["Argon", "Carbon dioxide", "Neon", "Helium"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
        "type": "mcq-4-choices",
        "domain": "Biology",
        "details": {"level": "L3", "task": "t", "subtask": "s", "source": "made here"},
    }
    return row | changes


TOOL = {
    "Name": "Axo",
    "NLDocumentation": 'getImage: An image.\nParameters: {"color": "string."}\nOutput: Successful response.',
    "Function_Description": {"getImage": "An image."},
    "Instructions": ["Show me a wild one.", "And two more?"],
    "Golden_Answers": [
        [{"Action": "getImage", "Action_Input": '{"color": "wild", "page": {"from": 1}}'}],
        [{"Action": "getImage", "Action_Input": "{}"}, {"Action": "getImage", "Action_Input": "{}"}],
    ],
}
TRAINING_TOOL = {
    "Name": "Axo",
    "NLDocumentation": "getImage: An image.",
    "Instances": [
        {
            "input": "Show me one.\nHint: use it",
            "output": "x",
            "intermediate_steps": [[["getImage", '{"page": 2}', "thought"], "seen"]],
        },
        {
            "input": "Which one?",
            "output": "x",
            "intermediate_steps": [[["getDetails", '{"Question": "?"}', "thought"], "said"]],
        },
        {"input": "Never mind.", "output": "x", "intermediate_steps": []},
    ],
}


def packed(tests: list[dict]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def code(**changes: object) -> dict:
    row = {
        "question_title": "Add",
        "question_content": "Add two numbers.\n",
        "platform": "atcoder",
        "question_id": "abc301_a",
        "contest_id": "abc301",
        "contest_date": "2025-02-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": packed([{"input": "4 5\n", "output": "9\n", "testtype": "stdin"}]),
        "metadata": "{}",
    }
    return row | changes


FUNCTION = code(
    question_id="3000",
    starter_code="class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    public_test_cases=json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    private_test_cases=json.dumps([{"input": "4\n5", "output": "9", "testtype": "functional"}]),
    metadata='{"func_name": "add"}',
)
MATH500 = {
    "problem": "Convert $(0,3)$ to polar.",
    "solution": "So $\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}$.",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
AIME = [
    {"ID": "2024-I-1", "Problem": "Every morning?", "Solution": "Thus \\boxed{204}.", "Answer": 204},
    {"id": 60, "problem": "Let x be?", "solution": None, "answer": "025", "url": "x", "year": "2024"},
    {"problem_idx": 1, "problem": "Find the sum.", "answer": 70, "problem_type": ["NT"]},
]
ROWS = {
    "dapo_math": [dapo(1), dapo(2)],
    "sciknoweval": [science(), science(question="Other?", answerKey="D")],
    "toolalpaca": [TOOL],
    "livecodebench": [code(), FUNCTION],
    "math500": [MATH500],
    "aime": AIME[:1],
}


def jsonl(directory: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(directory: Path, mapping: str, *rows: dict) -> list[Prompt]:
    return load_prompts(jsonl(directory, list(rows)), mapping=mapping)


def refusal(directory: Path, mapping: str, row: dict) -> str:
    with pytest.raises(DataError) as caught:
        load(directory, mapping, row)
    assert str(caught.value).startswith(f"{directory / 'rows.jsonl'}:1: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_config_offers_every_mapping():
    hints = get_type_hints(DataConfig)
    assert get_args(hints["mapping"]) == tuple(MAPPINGS)
    assert get_args(get_args(hints["eval_mapping"])[0]) == tuple(MAPPINGS)


@pytest.mark.parametrize("mapping", ROWS)
def test_parquet_gives_what_jsonl_gives_and_the_check_finds_nothing(mapping, tmp_path):
    lines, table = jsonl(tmp_path, ROWS[mapping]), tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS[mapping]), table)
    prompts = load_prompts(lines, mapping=mapping)
    assert load_prompts(table, mapping=mapping) == prompts and prompts
    for path in (lines, table):
        report = check_file(path, CheckRules(mapping=mapping))
        assert (report.errors, report.warnings, report.prompts) == ([], [], len(prompts))


def test_dapo_asks_for_a_box_in_place_of_the_answer_line(tmp_path):
    (prompt,) = load(tmp_path, "dapo_math", dapo(41))
    assert prompt == Prompt("uuid-41", [{"role": "user", "content": f"What is 41 + 1?\n{BOXED}"}], "42")
    processed = {
        "prompt": "What is 2 + 2?",
        "solution": "4",
        "reward_model": {"ground_truth": "4"},
        "extra_info": {"index": "a"},
    }
    assert load(tmp_path, "dapo_math", processed)[0].messages[0]["content"] == f"What is 2 + 2?\n{BOXED}"
    assert 'no object "reward_model"' in refusal(tmp_path, "dapo_math", {"prompt": "x"})
    assert "one user message" in refusal(tmp_path, "dapo_math", {"prompt": []})


def test_dapo_repeats_are_left_out_and_counted_and_contradictions_refused(tmp_path, caplog):
    rows = [dapo(i % 3) for i in range(300)]
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, "dapo_math", *rows)) == 3
    assert "took 3 prompts and left 297 out" in caplog.text
    report = check_file(tmp_path / "rows.jsonl", CheckRules(mapping="dapo_math"))
    assert (report.errors, report.left_out, report.prompts) == ([], 297, 3)
    with pytest.raises(DataError, match=":3: id 'uuid-1' was used on line 1"):
        load(tmp_path, "dapo_math", dapo(1), dapo(2), dapo(1) | {"reward_model": {"ground_truth": "7"}})


def test_sciknoweval_takes_level_3_multiple_choice(tmp_path, caplog):
    others = [
        science(details={"level": "L1"}),
        science(type="open-ended-qa", answerKey="", choices={"text": [], "label": []}),
    ]
    with caplog.at_level(logging.WARNING):
        (prompt,) = load(tmp_path, "sciknoweval", others[0], science(), others[1])
    assert "left 2 out" in caplog.text and prompt.id == "rows-1" and prompt.answer == "B"
    text = prompt.messages[0]["content"]
    assert (
        text.startswith("Which gas do plants take in?\n\nA: Argon\nB: Carbon dioxide\nC: Neon\nD: Helium\n\n")
        and "<answer>" in text
    )
    assert "\"answerKey\" is 'E', which is not one of the options A, B, C, D" in refusal(
        tmp_path, "sciknoweval", science(answerKey="E")
    )
    assert "as many strings" in refusal(
        tmp_path, "sciknoweval", science(choices={"text": ["x"], "label": ["A", "B"]})
    )
    with pytest.raises(DataError, match="none of its 2 rows is one that mapping sciknoweval takes"):
        load(tmp_path, "sciknoweval", *others)


def test_toolalpaca_rows_hold_tools_or_requests(tmp_path):
    first, second = load(tmp_path, "toolalpaca", TOOL)
    assert (first.id, second.id) == ("Axo-0", "Axo-1")
    assert json.loads(first.answer) == [
        {"action": "getImage", "action_input": {"color": "wild", "page": {"from": 1}}}
    ]
    text = first.messages[0]["content"]
    assert (
        "Functions of Axo:\n\ngetImage: An image." in text
        and "Request: Show me a wild one." in text
        and "Action Input: {" in text
    )
    said = 'Action: getImage\nAction Input: {"page": {"from": 1}, "color": "wild"}'
    assert parse_gold(first.answer, "r") == parse_calls(said)

    # the two others ask the user, or call nothing
    (only,) = load(tmp_path, "toolalpaca", TRAINING_TOOL)
    assert json.loads(only.answer) == [{"action": "getImage", "action_input": {"page": 2}}]
    assert (
        "Request: Show me one.\n\n" in only.messages[0]["content"]
        and "Hint" not in only.messages[0]["content"]
    )

    request = {
        "id": "t1",
        "system": "Use tools.",
        "prompt": "Tools ... Show me one.",
        "golden_answer": TOOL["Golden_Answers"][0],
    }
    for answer in (request["golden_answer"], json.dumps(request["golden_answer"])):
        (prompt,) = load(tmp_path, "toolalpaca", request | {"golden_answer": answer})
        assert prompt.answer == first.answer and [message["role"] for message in prompt.messages] == [
            "system",
            "user",
        ]
    broken = TOOL | {"Golden_Answers": [[{"Action": "getImage", "Action_Input": "{'color': 1}"}], []]}
    assert '"request 0: Action_Input" is not valid JSON' in refusal(tmp_path, "toolalpaca", broken)
    assert '2 "Instructions" and 1 "Golden_Answers"' in refusal(
        tmp_path, "toolalpaca", TOOL | {"Golden_Answers": [[]]}
    )


def test_livecodebench_answers_are_tests(tmp_path):
    script, function = load(tmp_path, "livecodebench", code(), FUNCTION)
    assert json.loads(script.answer) == {
        "inputs": ["1 2\n", "4 5\n"],
        "outputs": ["3\n", "9\n"],
        "fn_name": None,
        "time_limit": 6,
    }
    assert script.id == "abc301_a" and "stdin" in script.messages[0]["content"]
    assert json.loads(function.answer) == {
        "inputs": ["1\n2", "4\n5"],
        "outputs": ["3", "9"],
        "fn_name": "add",
        "time_limit": 6,
    }
    assert (
        function.id == "3000"
        and "```python\nclass Solution:\n    def add(" in function.messages[0]["content"]
    )
    tests = parse_tests(function.answer, "r", 1.0)
    assert (tests.fn_name, tests.seconds, len(tests.inputs)) == ("add", 6.0, 2)
    plain = base64.b64encode(
        zlib.compress(b'[{"input": "4 5\\n", "output": "9\\n", "testtype": "stdin"}]')
    ).decode()
    assert load(tmp_path, "livecodebench", code(private_test_cases=plain))[0].answer == script.answer


class Malicious:
    """What a pickle could do when it is loaded."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_packed_tests_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Malicious(), [{"input": "1"}], (b"x",), ["a", "b"], 7):
        row = code(private_test_cases=base64.b64encode(zlib.compress(pickle.dumps(content))).decode())
        message = refusal(tmp_path, "livecodebench", row)
        assert '"private_test_cases" is neither JSON nor the packed text of LiveCodeBench' in message
    assert not (tmp_path / "pwned").exists()
    for broken in ("not base64!", base64.b64encode(b"not zlib").decode(), "{}"):
        refusal(tmp_path, "livecodebench", code(private_test_cases=broken))


def test_livecodebench_refuses_tests_that_do_not_fit(tmp_path):
    assert "names no function" in refusal(tmp_path, "livecodebench", FUNCTION | {"metadata": "{}"})
    assert "stdin tests" in refusal(tmp_path, "livecodebench", code(metadata='{"func_name": "add"}'))
    assert 'no "private_test_cases"' in refusal(tmp_path, "livecodebench", code(private_test_cases=None))
    assert "must list tests of input, output, testtype" in refusal(
        tmp_path, "livecodebench", code(public_test_cases='[{"input": 1}]')
    )


def test_math500_and_aime(tmp_path):
    (prompt,) = load(tmp_path, "math500", MATH500)
    assert (
        prompt.id == MATH500["unique_id"]
        and prompt.solution == MATH500["solution"]
        and prompt.answer == MATH500["answer"]
    )
    assert prompt.messages == [{"role": "user", "content": f"Convert $(0,3)$ to polar.\n{BOXED}"}]
    prompts = load(tmp_path, "aime", *AIME)
    assert [(p.id, p.answer, p.solution) for p in prompts] == [
        ("2024-I-1", "204", "Thus \\boxed{204}."),
        ("60", "25", None),
        ("1", "70", None),
    ]
    assert "numbers from 0 to 999" in refusal(tmp_path, "aime", AIME[2] | {"answer": 1000})
    assert 'no "problem"' in refusal(tmp_path, "aime", {"answer": 1})
    assert 'no "answer"' in refusal(tmp_path, "math500", {"problem": "x"})


def test_an_unknown_mapping_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.mapping: 'gsm8k' is not one of auto, dapo_math"):
        load_prompts(jsonl(tmp_path, [{}]), mapping="gsm8k")


def test_look_alikes():
    wrong = {
        "Answer": "answer",
        "answers": "answer",
        "solutoin": "solution",
        "pass-rate": "pass_rate",
        "promt": "prompt",
        "ID": "id",
        "passrate": "pass_rate",
        "Messages": "messages",
        "rubrics": "rubric",
        "questions": "question",
        "lable": "label",
    }
    assert {key: look_alike(key) for key in wrong} == wrong
    for fine in (
        "answer",
        "uid",
        "idx",
        "question_id",
        "answer_type",
        "short_answer",
        "level",
        "source",
        "data_source",
        "ability",
        "split",
    ):
        assert look_alike(fine) is None, fine
