"""Proves that `megasd data check` names every planted fault of a 1,000-row file by its line and
nothing else: 60 faults of 12 kinds, five variants a kind, through the command, with a real
tokenizer and a held-out file; 58 further variants one by one; that clean files of several styles
and the quickstart's rows have no errors; what counts as the same prompt; exit codes, the JSON line,
lengths and prompts shown. Does not prove that answers are right: only that a verifier can read them
and that nothing in the row denies them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megasd.data.check import CheckRules, check_file
from megasd.data.prompts import load_prompts
from megasd.data.same_text import question_of, same_text
from tools.make_quickstart import make_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[3]
THINGS = ("apples", "books", "stamps", "marbles", "tickets")
# prompt tokens; the tokenizer's are characters
LIMIT = 300


def clean_rows(count: int, seed: int = 0, first: int = 100) -> list[dict]:
    """Rows of four styles: words with a boxed solution, LaTeX, multiple choice, messages with a
    system turn.
    """
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        a, b = draw.randint(10, 99), first + i
        row: dict = {"id": f"row-{first + i}", "level": i % 5}
        if i % 4 == 0:
            row |= {
                "prompt": f"Ana has {a} {THINGS[i % 5]} and buys {b} more. How many has she now?",
                "answer": str(a + b),
            }
            row["solution"] = f"She has {a} + {b} of them, that is \\boxed{{{a + b}}}."
        elif i % 4 == 1:
            row |= {
                "prompt": f"Simplify $\\frac{{{2 * b}}}{{{2 * b + a}}}$.",
                "answer": f"\\frac{{{2 * b}}}{{{2 * b + a}}}",
            }
            row["solution"] = f"Nothing cancels: $\\boxed{{\\dfrac{{{2 * b}}}{{{2 * b + a}}}}}$"
        elif i % 4 == 2:
            options = "\n".join(
                f"{letter}. {text}" for letter, text in zip("ABCD", [a + b, a - b, a * b, b - a], strict=True)
            )
            row |= {"prompt": f"What is the sum of {a} and {b}?\n{options}", "answer": "A"}
        else:
            turns = [
                {"role": "system", "content": "Answer in one number."},
                {"role": "user", "content": f"{a} * {b} - {i} = ?"},
            ]
            row |= {"prompt": turns, "answer": str(a * b - i), "pass_rate": (i % 9) / 8}
        rows.append(row)
    return rows


def line_of(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def text_of(row: dict) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


# A fault turns a clean row, an earlier clean row of text and a held-out row into a line.
Plant = Callable[[dict, dict, dict], bytes]
PLANTS: dict[str, list[Plant]] = {
    "json": [
        lambda row, early, held: line_of(row)[:-9],
        lambda row, early, held: line_of(row).replace(b'"answer":', b'"answer"', 1),
        lambda row, early, held: line_of(row) + b" " + line_of(early),
        lambda row, early, held: line_of(row)[:-1] + b', "score": NaN}',
        lambda row, early, held: line_of(row)[:-1] + b', "answer": "7"}',
    ],
    "encoding": [
        lambda row, early, held: line_of(row | {"note": "café"}).decode().encode("latin-1"),
        lambda row, early, held: b"\xef\xbb\xbf" + line_of(row),
        lambda row, early, held: line_of(row)[:-1] + b', "note": "\\u0000"}'.replace(b"\\u0000", b"\0"),
        lambda row, early, held: json.dumps(row | {"prompt": text_of(row) + " \ud83d"}).encode(),
        lambda row, early, held: line_of(row | {"prompt": "Caf\ufffd: " + text_of(row)}),
    ],
    "damage": [
        lambda row, early, held: line_of(row | {"prompt": text_of(row) + " CafÃ© prices are no matter."}),
        lambda row, early, held: line_of(row | {"answer": "\x0crac{1}{2}"}),
        lambda row, early, held: line_of(row | {"prompt": text_of(row) + "\x1b[0m"}),
        lambda row, early, held: line_of(row | {"prompt": "It\u00e2\u20ac\u2122s simple. " + text_of(row)}),
        lambda row, early, held: line_of(row | {"answer": "3\times 4"}),
    ],
    "type": [
        lambda row, early, held: line_of(row | {"answer": 15}),
        lambda row, early, held: json.dumps([row]).encode(),
        lambda row, early, held: line_of(row | {"prompt": [user(text_of(row))]}),
        lambda row, early, held: line_of(row | {"prompt": {"text": text_of(row)}}),
        lambda row, early, held: line_of(row | {"answer": [row["answer"]]}),
    ],
    "missing": [
        lambda row, early, held: line_of({key: value for key, value in row.items() if key != "prompt"}),
        lambda row, early, held: line_of({key: value for key, value in row.items() if key != "answer"}),
        lambda row, early, held: line_of(row | {"answer": None}),
        lambda row, early, held: line_of(
            {("anwser" if key == "answer" else key): value for key, value in row.items()}
        ),
        lambda row, early, held: line_of(
            {("Prompt" if key == "prompt" else key): value for key, value in row.items()}
        ),
    ],
    "empty": [
        lambda row, early, held: line_of(row | {"prompt": ""}),
        lambda row, early, held: line_of(row | {"answer": " \t"}),
        lambda row, early, held: line_of(row | {"prompt": []}),
        lambda row, early, held: line_of(row | {"answer": "nan"}),
        lambda row, early, held: b"",
    ],
    "turns": [
        lambda row, early, held: line_of(row | {"prompt": [{"role": "human", "content": text_of(row)}]}),
        lambda row, early, held: line_of(
            row | {"prompt": [*user(text_of(row)), {"role": "assistant", "content": "Well."}]}
        ),
        lambda row, early, held: line_of(
            row | {"prompt": [*user(text_of(row)), {"role": "system", "content": "Be brief."}]}
        ),
        lambda row, early, held: line_of(row | {"prompt": [{"role": "user", "text": text_of(row)}]}),
        lambda row, early, held: line_of(row | {"prompt": user("  ")}),
    ],
    "id": [
        lambda row, early, held: line_of(row | {"id": early["id"]}),
        lambda row, early, held: line_of(row | {"id": 17}),
        lambda row, early, held: line_of(row | {"id": ""}),
        lambda row, early, held: line_of(row | {"pass_rate": 1.5}),
        lambda row, early, held: line_of(row | {"question": "Another question altogether?"}),
    ],
    "duplicate": [
        lambda row, early, held: line_of(early),
        lambda row, early, held: line_of(row | {key: early[key] for key in ("prompt", "answer", "solution")}),
        lambda row, early, held: line_of(
            early | {"id": row["id"], "prompt": "  " + early["prompt"].upper().replace(" ", "  ")}
        ),
        lambda row, early, held: line_of(early | {"id": row["id"], "prompt": user(early["prompt"])}),
        lambda row, early, held: line_of(
            early | {"id": row["id"], "answer": "12345", "solution": "So it is \\boxed{12345}."}
        ),
    ],
    "leak": [
        lambda row, early, held: line_of(held | {"id": row["id"]}),
        lambda row, early, held: line_of(
            held | {"id": row["id"], "prompt": held["prompt"].lower().replace(" ", "\u00a0")}
        ),
        lambda row, early, held: line_of(held | {"id": row["id"], "prompt": user(held["prompt"])}),
        lambda row, early, held: line_of(
            held | {"id": row["id"], "prompt": held["prompt"] + "\nPut the final answer within \\boxed{}."}
        ),
        lambda row, early, held: line_of(held | {"id": row["id"], "answer": "7", "solution": "\\boxed{7}"}),
    ],
    "length": [
        lambda row, early, held: line_of(row | {"prompt": text_of(row) + " Take your time." * 20}),
        lambda row, early, held: line_of(row | {"prompt": user("x" * 400)}),
        lambda row, early, held: line_of(row | {"prompt": text_of(row) + "\n" * 290}),
        lambda row, early, held: line_of(row | {"note": "x" * 300_000}),
        lambda row, early, held: line_of(
            row | {"prompt": [{"role": "system", "content": "Be brief. " * 40}, *user(text_of(row))]}
        ),
    ],
    "answer": [
        lambda row, early, held: line_of(
            row | {"prompt": text_of(row) + "\nA) 1\nB) 2\nC) 3", "answer": "E"}
        ),
        lambda row, early, held: line_of(row | {"answer": "\\boxed{\\frac{1}{2}"}),
        lambda row, early, held: line_of(row | {"answer": "\\sqrt{2"}),
        lambda row, early, held: line_of(row | {"answer": "15", "solution": "Hence \\boxed{16}."}),
        lambda row, early, held: line_of(
            row | {"prompt": text_of(row) + "\nAnswer: 7 km", "answer": "7 km", "solution": "7 km"}
        ),
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "vocab_size": 128, "eos_token_id": 2})
    )
    return directory


def plant(directory: Path, seed: int) -> tuple[Path, Path, dict[int, str]]:
    """A file of 1,000 rows with 60 faults, its held-out file, and {line: kind}."""
    draw = random.Random(seed)
    rows, held = clean_rows(1000, seed=seed), clean_rows(100, seed=seed, first=5000)
    lines = [line_of(row) for row in rows]
    plants = [(kind, make) for kind, makes in PLANTS.items() for make in makes]
    chosen = draw.sample(range(100, 1000), len(plants))
    # rows of text with a solution, never planted
    wordy = range(0, 100, 4)
    faults = {}
    for place, early, (kind, make) in zip(chosen, draw.choices(wordy, k=len(plants)), plants, strict=True):
        lines[place] = make(rows[place], rows[early], held[4 * draw.randrange(25)])
        faults[place + 1] = kind
    train, evaluation = directory / "train.jsonl", directory / "eval.jsonl"
    train.write_bytes(b"".join(line + b"\n" for line in lines))
    evaluation.write_bytes(b"".join(line_of(row) + b"\n" for row in held))
    return train, evaluation, faults


def command(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "megasd.cli", "data", "check", *map(str, args)]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def test_sixty_planted_faults_of_twelve_kinds_are_named_by_line_and_nothing_else_is(tmp_path, model):
    train, evaluation, faults = plant(tmp_path, seed=1)
    assert len(faults) == 60 and len(PLANTS) == 12
    done = command(
        "train.jsonl",
        "--against",
        "eval.jsonl",
        "--model",
        model,
        "--max-prompt-tokens",
        LIMIT,
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 1 and done.stderr == "", done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    named = [error["line"] for error in report["errors"]]
    assert set(named) == set(faults), [(faults.get(n), n) for n in set(named) ^ set(faults)]
    # each once, in order
    assert named == sorted(faults)
    assert all(
        error["file"] == "train.jsonl" and error["kind"] and "\n" not in error["message"]
        for error in report["errors"]
    )
    assert report["rows"] == 1000 and report["unit"] == "tokens" and report["against"]["errors"] == []
    assert f"train.jsonl:{named[0]}: " in done.stdout


@pytest.mark.parametrize("seed", range(2, 6))
def test_planted_elsewhere_they_are_found_too(seed, tmp_path):
    train, evaluation, faults = plant(tmp_path, seed)
    report = check_file(train, CheckRules(held_out=check_file(evaluation), max_prompt_length=LIMIT))
    assert [error.line for error in report.errors] == sorted(faults)


ROW = {
    "id": "x",
    "prompt": "How many legs have 3 spiders and 2 ants?",
    "answer": "36",
    "solution": "24 + 12 = 36, so \\boxed{36}",
}
CHOICES = "Which is prime?\n(A) 4\n(B) 7\n(C) 9\n(D) 12"
FURTHER: dict[str, tuple[dict | bytes, str]] = {
    "UTF-16": (json.dumps(ROW).encode("utf-16"), "encoding"),
    "single quotes": (str(ROW).encode(), "json"),
    "Infinity": (b'{"prompt": "1", "answer": "1", "x": -Infinity}', "json"),
    "a string": (b'"row"', "type"),
    "spaces": (b"   ", "blank"),
    "form feed": (ROW | {"prompt": "a\x0cb"}, "encoding"),
    "byte order mark inside": (ROW | {"prompt": "\ufeffHow many?"}, "encoding"),
    "C1 control": (ROW | {"prompt": "It\u0092s"}, "encoding"),
    "tab for a backslash": (ROW | {"solution": "2 \times 3 = \\boxed{36}"}, "encoding"),
    "unfilled template": (ROW | {"prompt": "{question}"}, "empty"),
    "None as text": (ROW | {"answer": "None"}, "empty"),
    "reward_model without an answer": ({"prompt": "1+1", "reward_model": {"style": "rule"}}, "missing"),
    "reward_model a string": ({"prompt": "1+1", "reward_model": "2"}, "type"),
    "two answers": (ROW | {"label": "37"}, "columns"),
    "two solutions": (
        ROW | {"messages": [*user(ROW["prompt"]), {"role": "assistant", "content": "36"}]},
        "columns",
    ),
    "look-alike of pass_rate": (ROW | {"passrate": 0.5}, "key"),
    "look-alike of solution": (ROW | {"Solution ": "x"}, "key"),
    "pass_rate a string": (ROW | {"pass_rate": "0.5"}, "field"),
    "negative pass_rate": (ROW | {"pass_rate": -0.1}, "field"),
    "rubric a string": (ROW | {"rubric": "be brief"}, "field"),
    "empty rubric": (ROW | {"rubric": []}, "field"),
    "unknown rule": (ROW | {"rubric": [{"rule": "sings", "value": 1}]}, "field"),
    "tool turn": (ROW | {"prompt": [{"role": "tool", "content": "x"}]}, "role"),
    "extra key of a message": (ROW | {"prompt": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
    "assistant first": (
        ROW | {"prompt": [{"role": "assistant", "content": "Hi"}, *user(ROW["prompt"])]},
        "role",
    ),
    "two user turns": (ROW | {"prompt": [*user("Hello."), *user(ROW["prompt"])]}, "role"),
    "a rendered template": (ROW | {"prompt": "<|im_start|>user\n" + ROW["prompt"]}, "template"),
    "messages as text": (ROW | {"prompt": json.dumps(user(ROW["prompt"]))}, "messages"),
    "no letter or digit": (ROW | {"prompt": "???!"}, "empty"),
    "a dash for an answer": (ROW | {"answer": "-", "solution": None}, "empty"),
    "invisible": (ROW | {"answer": "3\u200b6", "solution": None}, "encoding"),
    "trailing operator": (ROW | {"answer": "36 +", "solution": None}, "answer"),
    "division by zero": (ROW | {"answer": "36/0", "solution": None}, "answer"),
    "the prompt is the answer": (ROW | {"prompt": "36"}, "shown"),
    "letter off the column": ({"question": "Prime?", "choices": ["4", "7"], "answer": "C"}, "answer"),
    "letter off the labels": (
        {"question": "Prime?", "choices": {"text": ["4", "7"], "label": ["A", "B"]}, "answer": "D"},
        "answer",
    ),
    "letter off the list": (ROW | {"prompt": CHOICES, "answer": "E", "solution": None}, "answer"),
    "letter in brackets": (ROW | {"prompt": CHOICES, "answer": "(B)", "solution": None}, "answer"),
    "letter and text": (ROW | {"prompt": CHOICES, "answer": "B) 7", "solution": None}, "answer"),
    "small letter": (ROW | {"prompt": CHOICES, "answer": "b", "solution": None}, "answer"),
    "solution boxes another letter": (
        ROW | {"prompt": CHOICES, "answer": "B", "solution": "Hence \\boxed{C}"},
        "solution",
    ),
    "half a fraction": (ROW | {"answer": "\\frac{1}{", "solution": None}, "answer"),
    "empty root": (ROW | {"answer": "\\sqrt{}", "solution": None}, "answer"),
    "left without right": (ROW | {"answer": "\\left( 1, 2 )", "solution": None}, "answer"),
    "bracket": (ROW | {"answer": "(3, 4", "solution": None}, "answer"),
    "empty box": (ROW | {"answer": "\\boxed{}", "solution": None}, "answer"),
    "dollar": (ROW | {"answer": "$\\pi", "solution": None}, "answer"),
    "a whole GSM8K answer": (ROW | {"answer": "24 + 12 = 36\n#### 36", "solution": None}, "answer"),
    "too long an answer": (ROW | {"answer": "1 + " * 2000, "solution": None}, "answer"),
    "solution boxes another number": (ROW | {"solution": "24 + 11 = \\boxed{35}"}, "solution"),
    "solution ends on another, GSM8K": (ROW | {"solution": "24 + 11 = 35\n#### 35"}, "solution"),
    "solution's box is open": (ROW | {"solution": "It is \\boxed{36"}, "solution"),
    "other mathematics": (
        ROW | {"answer": "\\sqrt{12}", "solution": "Hence \\boxed{3\\sqrt{2}}"},
        "solution",
    ),
    "the prompt ends on the answer": (ROW | {"prompt": ROW["prompt"] + " The answer is 36."}, "shown"),
    "the prompt boxes the answer": (ROW | {"prompt": ROW["prompt"] + " \\boxed{36}"}, "shown"),
    "the prompt holds the solution": (ROW | {"prompt": ROW["prompt"] + "\n" + ROW["solution"]}, "shown"),
    "tests without outputs": (
        ROW | {"answer": '{"inputs": ["1"], "outputs": [], "fn_name": null}', "solution": None},
        "answer",
    ),
    "calls without input": (ROW | {"answer": '[{"action": "f"}]', "solution": None}, "answer"),
}


def test_further_faults_one_by_one(tmp_path):
    path, wrong = tmp_path / "rows.jsonl", []
    for name, (row, kind) in FURTHER.items():
        path.write_bytes(
            b'{"prompt": "7+8=", "answer": "15"}\n'
            + (row if isinstance(row, bytes) else json.dumps(row).encode())
            + b"\n"
        )
        found = [(error.line, error.kind) for error in check_file(path).errors]
        if name == "UTF-16":
            # its newline is two bytes: the rest is a line too
            found = found[:1]
        wrong += [(name, found)] if found != [(2, kind)] else []
    assert not wrong


CLEAN = [
    {
        "prompt": "Is $x^2 \\ge 0$? Put your answer in \\boxed{}.",
        "answer": "\\text{yes}",
        "uid": 3,
        "question_id": 7,
        "answer_type": "t",
    },
    {"prompt": "Factor x² - 1.", "answer": "(x-1)(x+1)", "solution": "It is $\\boxed{(x + 1)(x - 1)}$."},
    {"prompt": "Interval?", "answer": "[0, 1)", "solution": "\\boxed{\\left[0,1\\right)}"},
    {"prompt": "A third?", "answer": "\\frac13", "solution": "\\boxed{\\frac{1}{3}}"},
    {"prompt": "Half a hundred, in per cent?", "answer": "50\\%", "solution": "\\boxed{0.5}"},
    {"prompt": "Ten thousand and one?", "answer": "10,001", "solution": "\\boxed{10001}"},
    {"prompt": "Steps:\na) find x\nb) find y", "answer": "y"},
    {"prompt": "Statements (A) 1 = 1, (B) 2 = 2 and (C) 3 = 4: how many are true?", "answer": "2"},
    {
        "prompt": "Wie heißt „Ä“ auf Englisch? – „Spaß“ naïve façade Ångström İstanbul 日本語 😀 é",
        "answer": "A umlaut",
    },
    {"prompt": "Cost of a pen at 2 for $10?", "answer": "$5"},
    {"prompt": "Which brace opens a block in C?", "answer": "the character {"},
    {"prompt": "Solve 2y = 6 for y.", "answer": "y=3", "solution": "Thus \\boxed{3}"},
    {"prompt": 'Q: 1+1? Remember to put your answer on its own line after "Answer:".', "answer": "2"},
    {"prompt": [*user("2+2?"), {"role": "assistant", "content": "4"}, *user("And 3 more?")], "answer": "7"},
    {
        "messages": [
            {"role": "user", "content": "Say six."},
            {"role": "assistant", "content": "Six it is: 6"},
        ],
        "answer": "6",
    },
    {"question": "Seven?", "label": "7", "solution": None, "extra_info": {"index": 1}},
    {"problem": "Eight?", "reward_model": {"ground_truth": "8", "style": "rule"}, "data_source": "x"},
    {
        "prompt": "Nine?",
        "answer": "9",
        "pass_rate": 0.25,
        "rubric": [{"rule": "contains", "value": "9", "weight": 2.0}],
    },
    {
        "prompt": "Add two numbers.",
        "answer": '{"inputs": ["1 2"], "outputs": ["3"], "fn_name": null, "time_limit": 6}',
    },
    {"prompt": "Weather in Paris?", "answer": '[{"action": "weather", "action_input": {"city": "Paris"}}]'},
]


def test_clean_rows_of_many_styles_have_no_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in CLEAN))
    report = check_file(path)
    assert [str(fault) for fault in report.errors + report.warnings] == []
    assert len(load_prompts(path)) == report.prompts == len(CLEAN)
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in clean_rows(1000, seed=3)))
    assert check_file(path).errors == []


def test_the_quickstart_has_no_errors_though_its_warmup_is_wrong_on_purpose(tmp_path):
    rows = make_rows(1)
    for name in ("warmup", "train", "eval"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(line_of(row) + b"\n" for row in rows[name]))
    held_out = check_file(tmp_path / "eval.jsonl")
    for name in ("warmup", "train"):
        report = check_file(tmp_path / f"{name}.jsonl", CheckRules(held_out=held_out, require_solution=True))
        assert (report.errors, report.warnings) == ([], [])


def test_what_nearly_all_rows_do_makes_a_rule(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"{i}+{i}=", "answer": str(2 * i), "solution": f"{i} + {i} = {2 * i}"} for i in range(100)
    ]
    rows[40]["solution"] = "40 + 40 = 81"
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    assert [(error.line, error.kind) for error in check_file(path).errors] == [(41, "solution")]
    rows[40] |= {"solution": None, "answer": "eighty"}
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    assert [(error.line, error.kind) for error in check_file(path).errors] == [(41, "answer")]
    rows[40]["answer"] = "80"
    # one in ten: no rule
    for i in range(50, 60):
        rows[i]["solution"] = "I do not know 7"
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    assert check_file(path).errors == []


def test_sameness():
    same = (
        "What is 7 + 8?",
        "what is  7+8",
        "What is 7\u00a0+\u00a08 ?",
        "\uff37hat is 7 + 8?\n",
        "What is\u200b 7 + 8?",
    )
    assert len({same_text(text) for text in same}) == 1
    for other in ("What is 7 - 8?", "What is 78?", "What is 7 + 8!"):
        assert same_text(other) != same_text(same[0])
    assert same_text("2\u00b2") != same_text("22") and same_text("1 2") != same_text("12")
    question = question_of(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 7+8?\nThink step by step."},
        ]
    )
    assert question == question_of([{"role": "user", "content": same[0]}])
    with_numbers = [
        question_of([{"role": "user", "content": f"Give the final answer of {n}+1."}]) for n in (1, 2)
    ]
    assert with_numbers[0] != with_numbers[1]


def test_nearly_the_same_is_a_warning_and_mends_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        ("What is 17 times 3?", "51"),
        ("Please compute 17 times 3.", "51"),
        ("What is 17 times 4?", "68"),
    ]
    path.write_bytes(
        b"".join(line_of({"prompt": prompt, "answer": answer}) + b"\n" for prompt, answer in rows)
    )
    done = command("rows.jsonl", "--json", cwd=tmp_path)
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and report["errors"] == []
    assert [(fault["line"], fault["kind"]) for fault in report["warnings"]] == [(2, "near")]


def test_exit_codes_and_unusable_arguments(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert command("rows.jsonl", cwd=tmp_path).returncode == 0
    for args, expected in (
        (["absent.jsonl", "--json"], "absent.jsonl: no such file"),
        (["rows.jsonl", "--max-prompt-tokens", "5"], "give --model DIR too"),
        (["rows.jsonl", "--model", "absent"], "config.json: no such file"),
        (["rows.jsonl", "--mapping", "gsm9k"], "invalid choice: 'gsm9k'"),
        (["rows.jsonl", "--recipe", "nothing"], "invalid choice: 'nothing'"),
        (["rows.jsonl", "--against", "absent.jsonl"], "absent.jsonl: no such file"),
        (["rows.jsonl", "--against", "./rows.jsonl"], "is the file itself"),
        (["rows.jsonl", "--max-row-bytes", "0"], "--max-row-bytes: '0' is no whole number of 1 or more"),
        ([], "arguments are required: FILE"),
    ):
        done = command(*args, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and expected in done.stderr, done
    done = command("empty.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 1 and json.loads(done.stdout.splitlines()[-1])["errors"][0]["line"] == 1


def test_lengths_and_prompts_are_shown_as_the_model_reads_them(tmp_path, model):
    rows = [
        {"id": f"r{i}", "prompt": "1+" * i + "1=", "answer": str(i + 1), "solution": f"count: {i + 1}"}
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    done = command("rows.jsonl", "--model", model, "--recipe", "sft", "--show", "1", "--json", cwd=tmp_path)
    lengths = json.loads(done.stdout.splitlines()[-1])["prompt_lengths"]
    # three tokens of the template each
    assert (lengths["min"], lengths["max"], lengths["p50"]) == (5, 43, 23) and lengths["count"] == 20
    assert sum(count for *_, count in lengths["histogram"]) == 20
    assert "<|user|>1=<|im_end|><|assistant|>" in done.stdout and "teacher" not in done.stdout
    done = command("rows.jsonl", "--recipe", "sc_sdpo", "--show", "1", cwd=tmp_path)
    assert (
        "in characters (--model DIR counts tokens)" in done.stdout
        and "teacher reads\n[user] 1=\n\nA correct solution:" in done.stdout
    )


def test_parquet_rows_are_named_by_their_number(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "solution": None} for i in range(300)]
    rows[200]["answer"], rows[280]["prompt"] = "", "7+1="
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=64)
    assert [(error.line, error.kind) for error in check_file(tmp_path / "rows.parquet").errors] == [
        (201, "empty"),
        (281, "conflict"),
    ]


def test_a_file_that_breaks_off_is_an_error_after_its_last_whole_row(tmp_path):
    table = pa.table(
        {"prompt": [f"{i}+1=" for i in range(4000)], "answer": [str(i + 1) for i in range(4000)]}
    )
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    content = (tmp_path / "rows.arrow").read_bytes()
    (tmp_path / "rows.arrow").write_bytes(content[: len(content) // 2])
    report = check_file(tmp_path / "rows.arrow")
    assert [error.kind for error in report.errors] == ["file"] and report.rows in (1000, 2000)
    assert report.errors[0].line == report.rows + 1
