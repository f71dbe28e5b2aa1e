"""algo/teacher_context.py: who is taught, by whom, with which text, and what that is contrasted with.

Proves the released SDPO semantics (first other success, lone success untaught), every key of
algorithm.teacher that chooses text, that failed verifiers never demonstrate, and that the template
is filled in one pass. Does not prove that a real chat template accepts the messages (test_chat) nor
any tensor alignment.
"""

from __future__ import annotations

import pytest

from megasd.algo.teacher_context import (
    DEFAULT_TEMPLATE,
    check_template,
    final_answer,
    solution_prefix,
    teacher_contexts,
    with_solution,
    without_thinking,
)
from megasd.config.schema import TeacherConfig
from megasd.types import Group, Prompt, Sample, TeacherContext, UserError, Verdict

R, W, E, T = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT
SHORT = "{prompt}|{solution}|now"


def make_group(
    *verdicts: Verdict | None,
    solution: str | None = None,
    texts: list[str] | None = None,
    lens: list[int] | None = None,
) -> Group:
    prompt = Prompt(
        "p", [{"role": "system", "content": "s"}, {"role": "user", "content": "7+8="}], "15", solution
    )
    texts, lens = texts or [f"text {i}" for i in range(len(verdicts))], lens or [1] * len(verdicts)
    samples = [
        Sample("p", i, [1], [2] * lens[i], [-0.1] * lens[i], texts[i], "stop", 0, verdict)
        for i, verdict in enumerate(verdicts)
    ]
    return Group(prompt, samples)


def contexts_of(group: Group, *, seed: str = "1/0/p", **options) -> list[list[TeacherContext]]:
    given = {
        name: options.pop(name) for name in ("prefix_fraction", "buffer", "answer_of") if name in options
    }
    return teacher_contexts(group, TeacherConfig(**options), seed=seed, **given)


def sources(group: Group, **options) -> list[str | None]:
    return [found[0].source if found else None for found in contexts_of(group, **options)]


def turns(group: Group, **options) -> list[list[str]]:
    """The last user turn of every context of every sample."""
    found = contexts_of(group, **{"template": SHORT} | options)
    return [[context.messages[-1]["content"] for context in one] for one in found]


# ---- SDPO as released ----


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        # the lone success is untaught
        ((W, R, W, W), ["sibling 1", None, "sibling 1", "sibling 1"]),
        # the first success reads the second
        ((W, R, R, W), ["sibling 1", "sibling 2", "sibling 1", "sibling 1"]),
        ((R, R, R), ["sibling 1", "sibling 0", "sibling 0"]),
        ((W, W), [None, None]),
        # failed verifiers are taught, never teach
        ((E, T, R, W), ["sibling 2", "sibling 2", None, "sibling 2"]),
        ((E, T), [None, None]),
        ((R,), [None]),
        # an unscored sample never demonstrates
        ((None, W), [None, None]),
        ((), []),
    ],
)
def test_first_other_success_teaches(verdicts, expected):
    assert sources(make_group(*verdicts)) == expected


def test_the_last_user_turn_carries_prompt_solution_instruction():
    group = make_group(R, W)
    found = contexts_of(group)
    assert found[0] == [] and len(found[1]) == 1
    system, user = found[1][0].messages
    assert system == {"role": "system", "content": "s"} and user["role"] == "user"
    assert (
        user["content"]
        == "7+8=\n\nA correct solution:\n\ntext 0\n\nNow solve the original question correctly."
    )
    # nothing changed in place
    assert group.prompt.messages[-1]["content"] == "7+8="


def test_thinking_is_stripped_unless_asked_for():
    group = make_group(R, W, texts=["<think>long {prompt}</think>\n\n15", "?"])
    assert turns(group)[1] == ["7+8=|15|now"]
    kept = turns(group, strip_thinking=False)[1]
    # and the braces of a text are not filled in
    assert kept == ["7+8=|<think>long {prompt}</think>\n\n15|now"]


@pytest.mark.parametrize(
    "text, left",
    [
        ("a", "a"),
        ("<think>x</think>a", "a"),
        ("x</think> a", "a"),
        ("<think>x</think>a<think>\ny</think>b", "ab"),
    ],
)
def test_without_thinking(text, left):
    assert without_thinking(text) == left


def test_feedback_stands_between_solution_and_instruction():
    """SDPO 2601.20802: prompt, solution, feedback, instruction; either block alone; taught with
    feedback alone.
    """
    group = make_group(R, W, W)
    group.samples[1].feedback = "no box {solution}"
    block = "\n\nFeedback on an earlier attempt that failed:\n\nno box {solution}"
    assert turns(group, feedback="always") == [[], [f"7+8=|text 0{block}|now"], ["7+8=|text 0|now"]]
    assert turns(group, feedback="without_demonstration") == [[], ["7+8=|text 0|now"], ["7+8=|text 0|now"]]
    assert sources(group, feedback="always") == [None, "sibling 0 + feedback", "sibling 0"]
    alone = make_group(W, W)
    alone.samples[1].feedback = "no box"
    for when in ("always", "without_demonstration"):
        assert sources(alone, feedback=when) == [None, "feedback"]
        turn = turns(alone, feedback=when, template=DEFAULT_TEMPLATE)[1][0]
        assert (
            turn == "7+8=\n\nFeedback on an earlier attempt that failed:\n\nno box\n\nNow solve the original"
            " question correctly."
        )
    assert turns(alone) == [[], []]
    before = turns(alone, feedback="always", template="Known: {solution}\nQuestion: {prompt}!")[1]
    assert before == ["Feedback on an earlier attempt that failed:\n\nno box\nQuestion: 7+8=!"]


# ---- other demonstrations ----


def test_several_demonstrations_share_a_context():
    group = make_group(R, W, R, R)
    assert sources(group, num_demonstrations=2) == [
        "sibling 2, 3",
        "sibling 0, 2",
        "sibling 0, 3",
        "sibling 0, 2",
    ]
    assert turns(group, num_demonstrations=9)[1] == [
        "7+8=|text 0\n\nAnother correct solution:\n\ntext 2\n\nAnother correct solution:\n\ntext 3|now"
    ]


def test_a_sample_may_read_itself_where_asked():
    assert sources(make_group(W, R), exclude_self=False) == ["sibling 1", "sibling 1"]


def test_the_shortest_success_teaches_the_first_of_equals():
    group = make_group(R, R, W, R, lens=[5, 2, 1, 2])
    assert sources(group, context="shortest_success") == ["sibling 1", "sibling 3", "sibling 1", "sibling 1"]


def test_random_successes_are_right_others_and_follow_the_seed():
    group = make_group(R, W, R, R, R, W)
    drawn = [sources(group, context="random_success", seed=str(seed)) for seed in range(40)]
    for position in range(6):
        assert {one[position] for one in drawn} == {f"sibling {i}" for i in (0, 2, 3, 4) if i != position}
    assert drawn[7] == sources(group, context="random_success", seed="7")
    # each sample draws its own
    assert any(one[1] != one[5] for one in drawn)


def test_samples_without_a_sibling_fall_back():
    group = make_group(R, W, solution="7+8=15")
    assert sources(group, fallback="solution") == ["solution", "sibling 0"]
    # AntiSD on rows without solutions (DAPO-Math-17k)
    assert sources(make_group(R, W), fallback="solution") == [None, "sibling 0"]
    lone = make_group(W, W)
    buffer = {"p": "<think>x</think>old 15", "q": "no"}
    assert sources(lone, fallback="buffer", buffer=buffer) == ["buffer", "buffer"]
    assert turns(lone, fallback="buffer", buffer=buffer)[0] == ["7+8=|old 15|now"]
    assert sources(lone, fallback="buffer", buffer={}) == [None, None] == sources(lone, fallback="buffer")
    assert sources(lone, buffer=buffer) == [None, None]


def test_the_rows_own_solution_teaches_every_sample():
    found = contexts_of(make_group(W, R, E, solution="7+8=15"), context="solution")
    assert [one[0].source for one in found] == ["solution"] * 3
    assert "7+8=15" in found[0][0].messages[-1]["content"]


def test_the_answer_alone():
    assert turns(make_group(W, R, solution="7+8=15"), context="answer") == [["7+8=|15|now"]] * 2


@pytest.mark.parametrize("fraction, lines", [(0.0, 0), (0.32, 0), (0.34, 1), (0.5, 1), (2 / 3, 2), (0.99, 2)])
def test_a_prefix_is_whole_lines_and_the_boxed_answer(fraction, lines):
    solution = "7+8\n\n= 10+5\n= 15"
    shown = ["7+8", "7+8\n\n= 10+5"][lines - 1] + "\n" if lines else ""
    assert solution_prefix(solution, "15", fraction) == shown + "\\boxed{15}"
    assert solution_prefix(solution, "15", 1.0) == solution
    assert turns(make_group(W, solution=solution), context="prefix", prefix_fraction=fraction) == [
        [f"7+8=|{shown}\\boxed{{15}}|now"]
    ]


def test_prefixes_of_many_lines_count_exactly():
    solution = "\n".join(map(str, range(100)))
    assert solution_prefix(solution, "x", 0.29).splitlines() == [*map(str, range(29)), "\\boxed{x}"]
    # the config's half
    assert turns(make_group(W, solution=solution), context="prefix")[0][0].count("\n") == 50


def test_a_bare_prompt_and_a_system_turn():
    group = make_group(W, R)
    bare = contexts_of(group, context="prompt")
    assert [one[0].messages for one in bare] == [group.prompt.messages] * 2 and bare[0][0].source == "prompt"
    told = contexts_of(group, context="prompt", system="Be brief.")[0][0].messages
    assert told == [{"role": "system", "content": "s\n\nBe brief."}, group.prompt.messages[1]]
    group.prompt.messages = group.prompt.messages[1:]
    told = contexts_of(group, context="first_success", system="Be brief.", template=SHORT)[0][0].messages
    assert told == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "7+8=|text 1|now"},
    ]
    group.samples[0].feedback = "wrong"
    assert turns(group, context="prompt", feedback="always")[0][0].startswith("7+8=\n\nFeedback on")


def test_the_teacher_is_told_the_verdict():
    """AntiSD 2605.11609."""
    found = turns(make_group(R, R, W, E), say_verdict=True)
    assert [one[0].partition("\n\n")[2] for one in found] == [
        "The answer that follows is correct.",
        "The answer that follows is correct.",
        "The answer that follows is incorrect.",
        "",
    ]


# ---- contrasts ----


def test_failures_contrast_in_the_same_words():
    """RLCSD 2606.11709: up to K wrong siblings, itself excluded, in the demonstration's template; a
    failed check is no wrong answer.
    """
    group = make_group(W, R, W, E, W)
    found = turns(group, contrast="failures", num_contrasts=2)
    assert found[0] == [f"7+8=|text {i}|now" for i in (1, 2, 4)]
    assert found[2] == [f"7+8=|text {i}|now" for i in (1, 0, 4)]
    assert found[3] == [f"7+8=|text {i}|now" for i in (1, 0, 2)]
    # the lone success: nothing to contrast with
    assert found[1] == []
    names = [context.source for context in contexts_of(group, contrast="failures")[4]]
    assert names == ["sibling 1", "wrong sibling 0", "wrong sibling 2"]
    assert turns(make_group(R, R), contrast="failures") == [["7+8=|text 1|now"], ["7+8=|text 0|now"]]
    both = turns(make_group(R, W, W), contrast="failures", say_verdict=True)[1]
    assert [turn.partition("now")[2] for turn in both] == ["\n\nThe answer that follows is incorrect."] * 2


def test_the_worst_wrong_answer_contrasts():
    """CEPO 2605.19436: the answer of the group's lowest reward, for every sample; none wrong: none."""
    group = make_group(W, R, W, texts=["so \\boxed{3\\frac{1}{2}}", "15", "\\boxed{4}"])
    assert (
        turns(group, context="answer", contrast="wrong_answer")
        == [["7+8=|15|now", "7+8=|3\\frac{1}{2}|now"]] * 3
    )
    group.samples[2].score, group.samples[0].score = 0.1, 0.3
    assert turns(group, context="answer", contrast="wrong_answer")[0][1] == "7+8=|4|now"
    assert (
        turns(group, context="answer", contrast="wrong_answer", answer_of=lambda text: None)
        == [["7+8=|15|now"]] * 3
    )
    assert turns(make_group(R, R), context="answer", contrast="wrong_answer") == [["7+8=|15|now"]] * 2


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a \\boxed{1} b \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("<think>\\boxed{1}</think> it is\n 7 ", "7"),
        ("\\boxed{1} \\boxed{2", "\\boxed{1} \\boxed{2"),
        ("<answer>A</answer><answer> B", "B"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# ---- bad input ----


def test_latex_braces_in_template_and_texts_survive():
    messages = with_solution(
        [{"role": "user", "content": r"\frac{1}{2}"}], r"\boxed{x}", template=r"\text{Q} {prompt} {solution}"
    )
    assert messages[-1]["content"] == r"\text{Q} \frac{1}{2} \boxed{x}"


def test_bad_input_is_one_line():
    for call in (
        lambda: contexts_of(make_group(W), context="solution"),
        lambda: contexts_of(make_group(W), context="prefix"),
        lambda: contexts_of(make_group(W), context="nonsense"),
        lambda: contexts_of(make_group(W, R), template="{prompt} only"),
        lambda: check_template("{prompt} only"),
        lambda: check_template("{prompt} {solution} {solution}"),
        lambda: with_solution([{"role": "assistant", "content": "a"}], "b"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
    check_template(DEFAULT_TEMPLATE)
