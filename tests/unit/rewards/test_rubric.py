"""rewards/rubric.py: the score of a rubric by hand, each rule, the rubric written for a row without
one, and the verifier around them.

Proves: s = sum w v / sum w, the threshold between right and wrong, that a judge that fails or hangs
leaves a sample unscored, one line for a bad criterion. Does not prove that rules judge well.
"""

from __future__ import annotations

import pytest

from megasd.config.schema import RewardConfig
from megasd.rewards.reward_pool import RewardPool
from megasd.rewards.rubric import NUMBER_RULES, TEXT_RULES, RuleJudge, score, write_rubric
from megasd.types import Group, Prompt, Sample, UserError, Verdict
from tests.clock import Clock

RUBRIC = [
    {"rule": "contains", "value": "42", "weight": 2.0},
    {"rule": "max_words", "value": 5},
    {"rule": "ends_with_answer", "value": "42", "weight": 3.0},
]


def group(
    *texts: str, rubric: list[dict] | None = None, answer: str = "42", solution: str | None = None
) -> Group:
    samples = [Sample("p", i, [], [], [], text, "stop", 0) for i, text in enumerate(texts)]
    return Group(Prompt("p", [{"role": "user", "content": "?"}], answer, solution, rubric=rubric), samples)


def test_the_score_is_the_weighted_mean():
    assert score([(2.0, 1.0), (1.0, 0.0), (3.0, 0.5)]) == pytest.approx((2 * 1 + 1 * 0 + 3 * 0.5) / 6)
    for bad in ([], [(0.0, 1.0)], [(-1.0, 1.0)], [(1.0, 1.5)], [(1.0, float("nan"))], [(float("nan"), 1.0)]):
        with pytest.raises(ValueError):
            score(bad)


@pytest.mark.parametrize(
    "rule, value, met, unmet",
    [
        ("contains", "42", "it is 42.", "it is 142, or 42.5"),
        ("contains", "Paris", "in paris now", "Parisian"),
        ("lacks", "sorry", "fine", "Sorry, no"),
        ("matches", r"^\d+$", "a\n12\nb", "a12"),
        ("max_words", 3, "a b c", "a b c d"),
        ("min_words", 3, "a b c", "a b"),
        ("ends_with_answer", "42", "so\n\\boxed{42}.\n", "42 it is"),
        ("ends_with_answer", "42", "the answer is **42**", "the answer is 142"),
        ("ends_with_answer", "x", "$x$", "max"),
        (
            "no_repetition",
            1,
            "one two three four five. six.",
            "one two three four five. One two three  four five.",
        ),
    ],
)
def test_each_rule(rule, value, met, unmet):
    function = TEXT_RULES.get(rule) or NUMBER_RULES[rule]
    assert function(met, value) and not function(unmet, value)


def test_samples_get_a_score_and_a_verdict_by_the_threshold():
    texts = [
        # contains (weight 2), max_words (1), ends_with_answer (3): 6/6
        "it is 42",
        # contains, max_words: 3/6
        "42 it is",
        # max_words: 1/6
        "none",
        # contains, ends_with_answer: 5/6
        "a b c d e f 42",
        # cut off, so no answer: 0
        "<think>42",
    ]
    scores = [1.0, 0.5, 1 / 6, 5 / 6, 0.0]
    for threshold, verdicts in ((0.5, "RRWRW"), (0.75, "RWWRW"), (1.0, "RWWWW")):
        judged = group(*texts, rubric=RUBRIC)
        with RewardPool(RewardConfig(verifier="rubric", rubric_threshold=threshold)) as pool:
            counts = pool.score([judged])
        assert [s.score for s in judged.samples] == pytest.approx(scores)
        assert "".join(s.verdict.value[0].upper() for s in judged.samples) == verdicts
        assert counts["right"] == verdicts.count("R")
    assert "ends_with_answer, contains" in judged.samples[2].feedback and judged.samples[0].feedback == ""


def test_a_row_without_a_rubric_gets_one_of_4_to_12_criteria():
    bare, rich = (
        group().prompt,
        group(solution="Take 6 and 7. " + " ".join(str(n) for n in range(100, 120)) + " so 42").prompt,
    )
    assert [row["rule"] for row in write_rubric(bare)] == [
        "ends_with_answer",
        "contains",
        "no_repetition",
        "max_words",
    ]
    written = write_rubric(rich)
    assert len(written) == 12 and all(row["weight"] > 0 for row in written)
    assert [row["value"] for row in written[4:6]] == ["6", "7"] and "42" not in [
        row["value"] for row in written[4:]
    ]
    judge = RuleJudge()
    assert (
        score(judge.judge(rich, "6 times 7 is\n42"))
        > score(judge.judge(rich, "it is\n42"))
        > score(judge.judge(rich, "41"))
    )


def test_a_bad_criterion_is_one_line_and_no_verdict():
    for row, said in (
        ({"rule": "nonsense", "value": "x"}, "'nonsense' is no rule; use one of contains"),
        ({"rule": "contains", "value": 3}, "give a text"),
        ({"rule": "max_words", "value": "3"}, "give a number"),
        ({"rule": "contains", "value": "x", "weight": 0}, "greater than 0"),
        ({"rule": "matches", "value": "("}, "no regular expression"),
    ):
        judged = group("x", rubric=[row])
        with RewardPool(RewardConfig(verifier="rubric")) as pool:
            with pytest.raises(UserError, match="row p: rubric: ") as caught:
                pool.check_rows([judged.prompt])
            assert said in str(caught.value) and "\n" not in str(caught.value)
            pool.score([judged])
        assert (
            judged.samples[0].verdict is Verdict.ERROR
            and judged.pass_rate is None
            and judged.samples[0].score is None
        )


def test_a_pattern_that_never_ends_is_a_timeout():
    judged = group("a" * 40, rubric=[{"rule": "matches", "value": "^(a+)+$x"}])
    fine = group("it is 42", rubric=RUBRIC)
    with RewardPool(RewardConfig(verifier="rubric", workers=1, timeout=0.5)) as pool:
        # a worker is up
        pool.score([fine])
        clock = Clock()
        pool.score([judged])
        assert clock.within(1.5)
        assert judged.samples[0].verdict is Verdict.TIMEOUT and judged.samples[0].score is None
        pool.score([fine])
    assert fine.samples[0].score == 1.0


def test_another_judge_may_take_the_rules_place():
    class Length:
        def judge(self, prompt: Prompt, response_text: str) -> list[tuple[float, float]]:
            if response_text == "boom":
                raise RuntimeError("no connection")
            return (
                [(1.0, 1.0 / len(response_text)), (1.0, float(prompt.answer in response_text))]
                if response_text != "odd"
                else [(1.0, 7.0)]
            )

    judged = group("42", "long text", "boom", "odd")
    with RewardPool(RewardConfig(verifier="rubric"), judge=Length()) as pool:
        pool.score([judged])
    assert [s.verdict for s in judged.samples] == [Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR, Verdict.ERROR]
    assert (
        judged.samples[0].score == 0.75
        and "no connection" in judged.samples[2].detail
        and "judge: " in judged.samples[3].detail
    )
