"""algo/context.py: who is taught, by whom, and with which text.

Proves the released SDPO semantics (first other success, lone success untaught), that failed verifiers never demonstrate, and that the
template is filled in one pass. Does not prove that a real chat template accepts the messages (test_chat) nor any tensor alignment.
"""

import pytest

from megasd.algo.context import DEFAULT_TEMPLATE, check_template, teacher_contexts, with_solution, without_thinking
from megasd.types import Group, Prompt, Sample, UserError, Verdict

R, W, E, T = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT


def make_group(*verdicts: Verdict, solution: str | None = None, texts: list[str] | None = None) -> Group:
    prompt = Prompt("p", [{"role": "system", "content": "s"}, {"role": "user", "content": "7+8="}], "15", solution)
    samples = [
        Sample("p", i, [1], [2], [-0.1], texts[i] if texts else f"text {i}", "stop", 0, verdict) for i, verdict in enumerate(verdicts)
    ]
    return Group(prompt, samples)


def sources(group: Group) -> list[str | None]:
    return [context and context.source for context in teacher_contexts(group)]


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        ((W, R, W, W), ["sibling 1", None, "sibling 1", "sibling 1"]),  # the lone success is untaught
        ((W, R, R, W), ["sibling 1", "sibling 2", "sibling 1", "sibling 1"]),  # the first success reads the second
        ((R, R, R), ["sibling 1", "sibling 0", "sibling 0"]),
        ((W, W), [None, None]),
        ((E, T, R, W), ["sibling 2", "sibling 2", None, "sibling 2"]),  # failed verifiers are taught, never teach
        ((E, T), [None, None]),
        ((R,), [None]),
        ((), []),
    ],
)
def test_first_other_success_teaches(verdicts, expected):
    assert sources(make_group(*verdicts)) == expected


def test_an_unscored_sample_never_demonstrates():
    group = make_group(R, W)
    group.samples[0].verdict = None
    assert sources(group) == [None, None]


def test_the_last_user_turn_carries_prompt_solution_instruction():
    group = make_group(R, W)
    contexts = teacher_contexts(group)
    assert contexts[0] is None
    system, user = contexts[1].messages
    assert system == {"role": "system", "content": "s"} and user["role"] == "user"
    order = [user["content"].index(part) for part in ("7+8=", "text 0", "original question")]
    assert order == sorted(order) and order[0] == 0
    assert group.prompt.messages[-1]["content"] == "7+8="  # nothing changed in place


def test_thinking_is_stripped_unless_asked_for():
    group = make_group(R, W, texts=["<think>long {prompt}</think>\n\n15", "?"])
    assert teacher_contexts(group, template="{prompt}|{solution}")[1].messages[-1]["content"] == "7+8=|15"
    kept = teacher_contexts(group, template="{prompt}|{solution}", strip_thinking=False)[1].messages[-1]["content"]
    assert kept == "7+8=|<think>long {prompt}</think>\n\n15"  # and the braces of a text are not filled in


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


def test_the_rows_own_solution_teaches_every_sample():
    contexts = teacher_contexts(make_group(W, R, E, solution="7+8=15"), "solution")
    assert [context.source for context in contexts] == ["solution"] * 3
    assert "7+8=15" in contexts[0].messages[-1]["content"]


def test_latex_braces_in_template_and_texts_survive():
    messages = with_solution([{"role": "user", "content": r"\frac{1}{2}"}], r"\boxed{x}", template=r"\text{Q} {prompt} {solution}")
    assert messages[-1]["content"] == r"\text{Q} \frac{1}{2} \boxed{x}"


def test_bad_input_is_one_line():
    for call in (
        lambda: teacher_contexts(make_group(W), "solution"),
        lambda: teacher_contexts(make_group(W), "nonsense"),
        lambda: check_template("{prompt} only"),
        lambda: check_template("{prompt} {solution} {solution}"),
        lambda: with_solution([{"role": "assistant", "content": "a"}], "b"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
    check_template(DEFAULT_TEMPLATE)
