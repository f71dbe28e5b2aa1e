"""rewards/verifiers.py: what each verifier reads in a response, and that the table is whole.

Proves: which text is the answer; that reading is linear in hostile text; that the config offers the
names of the table; that a worker finds every check by its name. Does not prove verdicts
(test_reward_pool.py).
"""

from __future__ import annotations

import time
from typing import get_args, get_type_hints

import pytest

from megasd.config.schema import RewardConfig
from megasd.rewards.code import last_code_block
from megasd.rewards.math_answers import last_boxed
from megasd.rewards.reward_pool import worker_program
from megasd.rewards.verifier_row import WorkerCheck
from megasd.rewards.verifiers import VERIFIERS, extract_answer
from megasd.rewards.worker import _find_function


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a \\boxed{1} b \\boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{2", None),
        ("42", None),
        ("\\boxed{", None),
        ("\\boxed{a\\", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        # cut off while thinking
        (r"<think>\boxed{1}", None),
        (r"<think>\boxed{1}</think> none", None),
        # the prompt opened the block
        (r"\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{}", ""),
    ],
)
def test_math_reads_the_last_box(text, answer):
    assert extract_answer("math", text) == answer


def test_extraction_is_linear_in_hostile_text():
    start = time.process_time()
    for text in (
        "\\boxed{" * 200_000,
        "{" * 1_000_000,
        "<think>" * 200_000,
        "<answer>" * 200_000,
        "A " * 500_000,
        "```\n" * 200_000,
        "Action Input: {" * 100_000,
        "Action:\nAction Input: [[{" * 50_000,
        "\\" * 999_999,
    ):
        for verifier in VERIFIERS:
            extract_answer(verifier, text)
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "text, answer",
    [
        ("I think A. <answer> B </answer> or C", "B"),
        ("<answer>A</answer> no, <answer>C", "C"),
        # the tag's text counts as it is
        ("<answer>(C)</answer>", "(C)"),
        ("It is (B), not (A); so **C**. I checked.", "C"),
        ("\\boxed{D}", "D"),
        ("C.", "C"),
        ("the C-H bond of B2, A's and He", None),
        ("nothing here", None),
        ("<think>A</think> B", "B"),
        ("<think>A", None),
    ],
)
def test_multiple_choice_reads_the_tag_else_the_last_letter(text, answer):
    assert extract_answer("multiple_choice", text) == answer


def test_the_last_whole_code_block():
    assert last_code_block("```\na\n```\n```py\nb\nc\n```\n") == "b\nc\n"
    assert last_code_block("```py\na\n```\n```py\nb") is None and last_code_block("`a`") is None
    assert last_code_block("  ```py\n  a\n  ```") == "  a\n"


def test_the_config_offers_the_names_of_the_table():
    assert get_args(get_type_hints(RewardConfig)["verifier"]) == tuple(VERIFIERS)
    assert RewardConfig().verifier in VERIFIERS


def test_a_worker_finds_every_check_by_its_name():
    checks = [row.check for row in VERIFIERS.values() if isinstance(row.check, WorkerCheck)]
    assert checks
    for check in checks:
        command = worker_program(check)
        functions = [_find_function(name) for name in command[command.index("megasd.rewards.worker") + 1 :]]
        assert functions == [check.check] + ([check.prepare] if check.prepare else [])


def test_feedback_and_score_of_a_response_without_an_answer():
    for name, row in VERIFIERS.items():
        assert row.no_answer.verdict.value == "wrong" and row.no_answer.feedback
        # only rubrics shape the reward
        assert row.no_answer.score == (0.0 if name == "rubric" else None)
