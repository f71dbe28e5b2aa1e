"""rewards/tool_use.py: the tool calls of a response against the reference, as ToolAlpaca's scorer
compares them, without its faults.

Proves: names and arguments as multisets over all calls, nested JSON, repeated keys, broken inputs,
both forms of a reference, feedback that never says what was expected. Does not prove that the calls
would do the same on a server.
"""

from __future__ import annotations

import json

import pytest

from megasd.config.schema import RewardConfig
from megasd.rewards.reward_pool import RewardPool
from megasd.rewards.tool_use import canonical, compare_calls, parse_calls, parse_gold
from megasd.rewards.verifiers import extract_answer
from megasd.types import Group, Prompt, Sample, UserError, Verdict

GOLD = """Action: search
Action Input: {"query": "jazz", "filter": {"from": 1990, "to": {"year": 1999}}}
Action: play
Action Input: {"id": 7, "loud": true}"""


def right(text: str, gold: str = GOLD) -> bool:
    return compare_calls(parse_calls(text), parse_gold(gold, "r")) == ""


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOLD, True),
        ("Thought: I search first.\n" + GOLD + "\nAction Output: fine", True),
        # the calls in another order, keys in another order, other white space
        (
            'Action: play\nAction Input: {"loud": true, "id": 7}\n'
            'Action:search\nAction Input:\n{"filter": {"to": {"year": 1999}, "from": 1990},\n"query": "jazz"}',  # noqa: E501
            True,
        ),
        # deep inside: upstream's pattern ended at the first brace and dropped the block
        (GOLD.replace("1999", "2000"), False),
        (GOLD.replace("true", "1"), False),
        (GOLD.replace("7", '"7"'), False),
        (GOLD.replace('"id": 7, ', ""), False),
        (GOLD.replace("play", "stop"), False),
        (GOLD + "\nAction: play", False),
        (GOLD.replace('"loud": true}', '"loud": true'), False),
        ("I would search for jazz.", False),
        ("", False),
    ],
)  # fmt: skip
def test_calls_are_compared_as_multisets(text, expected):
    assert right(text) is expected


def test_a_repeated_key_counts_each_time():
    gold = 'Action: get\nAction Input: {"id": 1}\nAction: get\nAction Input: {"id": 2}'
    assert right(gold, gold)
    assert right('Action: get\nAction Input: {"id": 2}\nAction: get\nAction Input: {"id": 1}', gold)
    # equal after upstream's merge
    assert not right('Action: get\nAction Input: {"id": 2}\nAction: get\nAction Input: {"id": 2}', gold)
    assert not right('Action: get\nAction: get\nAction Input: {"id": 2}', gold)


def test_a_reference_may_be_json():
    gold = json.dumps(
        [
            {"action": "get", "action_input": {"id": 1, "deep": {"a": [1, {"b": 2}]}}},
            {"action": "stop", "action_input": {}},
        ]
    )
    assert right(
        'Action: get\nAction Input: {"id": 1, "deep": {"a": [1, {"b": 2}]}}\nAction: stop\nAction Input: {}',
        gold,
    )
    for bad in (
        "get it",
        "[]",
        "[1]",
        '[{"action": "get"}]',
        "Action: get\nAction Input: {",
        '["',
        "[" * 100_000,
    ):
        with pytest.raises(UserError, match='row r7: "answer" is no tool call') as caught:
            parse_gold(bad, "r7")
        assert "\n" not in str(caught.value)


def test_the_vote_of_equal_calls_is_equal():
    other = 'Action: play\nAction Input: {"loud": true, "id": 7}\n' + "\n".join(GOLD.splitlines()[:2])
    assert (
        extract_answer("tool_use", GOLD)
        == extract_answer("tool_use", f"<think>Action: no</think>{other}")
        == canonical(parse_calls(GOLD))
    )
    assert extract_answer("tool_use", "nothing") is None
    assert extract_answer("tool_use", "<think>" + GOLD) is None


@pytest.mark.parametrize(
    "text, said",
    [
        (GOLD, ""),
        ("no call", "no `Action:` line"),
        (GOLD.replace("play", "stop"), "names of the called tools"),
        (GOLD.replace("}}}", "}}"), "not a JSON object"),
        (GOLD.replace("7", "8"), "value of the argument 'id'"),
        (GOLD.replace('"id"', '"number"'), "the argument 'number' is not expected"),
        (GOLD.replace('"id": 7, ', ""), "an argument is missing"),
    ],
)
def test_feedback_names_the_part_and_never_what_was_expected(text, said):
    sample = Sample("p", 0, [], [], [], text, "stop", 0)
    with RewardPool(RewardConfig(verifier="tool_use")) as pool:
        pool.score([Group(Prompt("p", [], GOLD), [sample])])
        assert pool.runner.num_workers == 0
    assert sample.verdict is (Verdict.WRONG if said else Verdict.RIGHT)
    assert said in sample.feedback and (bool(said) == bool(sample.feedback))
    assert not any(secret in sample.feedback for secret in ("jazz", "7", "search", "play", "1990", "loud"))
