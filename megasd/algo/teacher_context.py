"""Teacher contexts: what the self-teacher of each sample reads in place of the student's prompt.

The teacher is given privileged text in its last user turn. Where the text comes from
(algorithm.teacher.context):

    first_success     right samples of the group in their order, the sample's own index excluded, as
                      released by SDPO (2601.20802, 2):
                      the only success of a group is untaught, every failure shares the first success, without a success all are untaught
    random_success    the same, drawn per sample
    shortest_success  the same, fewest response tokens first (SSOPD 2605.17497)
    solution          the reference solution of the row (OPSD 2601.18734)
    answer            its final answer alone (RLSD 2604.03128)
    prefix            the first lines of the solution, and the answer in a box (ATESD 2605.11458)
    prompt            nothing: the question as it is, perhaps after a system turn (OPCD 2602.12275;
                      a separate teacher)

`contrast` adds the same turn with the text of wrong samples (RLCSD 2606.11709) or the answer of one
(CEPO 2605.19436): a difference of two teachers in which the template cancels. The student's own
failed attempt is never shown to the first teacher (SDPO: it costs diversity).
"""  # noqa: E501

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping

from megasd.config.schema import DEFAULT_TEMPLATE, TeacherConfig
from megasd.types import Group, Message, Prompt, Sample, TeacherContext, UserError, Verdict

PLACEHOLDER = re.compile(r"\{(prompt|solution)\}")
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# between demonstrations
ANOTHER = "\n\nAnother correct solution:\n\n"
FEEDBACK = "\n\nFeedback on an earlier attempt that failed:\n\n"
VERDICTS = {
    Verdict.RIGHT: "The answer that follows is correct.",
    Verdict.WRONG: "The answer that follows is incorrect.",
}

# privileged text, and where it came from
Text = tuple[str, str]


def check_template(template: str) -> None:
    """Raise UserError unless {prompt} and {solution} each occur once; other braces are plain text,
    so LaTeX needs no escapes.
    """
    found = sorted(PLACEHOLDER.findall(template))
    if found != ["prompt", "solution"]:
        raise UserError(
            f"algorithm.teacher.template: {{prompt}} and {{solution}} must each occur once, found {found}:"
            f" {template!r}"
        )


def with_solution(
    messages: list[Message], solution: str, *, template: str = DEFAULT_TEMPLATE
) -> list[Message]:
    """The messages with their last user turn put into `template`; earlier turns are kept and
    nothing is changed in place.

    with_solution([{"role": "user", "content": "7+8="}], "15", template="{prompt}
    ({solution})")[-1]["content"] == "7+8= (15)"
    """
    check_template(template)
    return _with_question(messages, lambda question: _fill(template, question, solution))


def without_thinking(text: str) -> str:
    """The text without <think>...</think> blocks; without an opening tag (a template may have
    written it) all up to </think> goes.
    """
    text = THINKING.sub("", text)
    return text.rpartition("</think>")[2].strip()


def solution_prefix(solution: str, answer: str, fraction: float) -> str:
    """The first floor(fraction * m) of a solution's m lines that are not blank, and the boxed
    answer; all of them: the solution as it is.

    solution_prefix("7+8\\n= 10+5\\n= 15", "15", 0.5) == "7+8\\n\\boxed{15}"
    """
    lines = solution.splitlines()
    filled = [k for k, line in enumerate(lines) if line.strip()]
    # 0.29 * 100 is a little less than 29
    count = math.floor(fraction * len(filled) + 1e-9)
    if count >= len(filled):
        return solution
    return "\n".join([*lines[: filled[count - 1] + 1 if count else 0], f"\\boxed{{{answer}}}"])


def final_answer(text: str) -> str:
    """What a response ends on: its last \\boxed{...} if that closes, else its last <answer>, else
    its last line, "" without one.
    """
    text = without_thinking(text)
    start, depth = text.rfind("\\boxed{"), 0
    for end in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 7 : end].strip()
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return text.splitlines()[-1].strip() if text else ""


def teacher_contexts(
    group: Group,
    teacher: TeacherConfig,
    *,
    seed: str,
    prefix_fraction: float | None = None,
    buffer: Mapping[str, str] | None = None,
    answer_of: Callable[[str], str | None] = final_answer,
) -> list[list[TeacherContext]]:
    """For each sample of the group what its teacher reads, then what that is contrasted with; an
    empty list where it stays untaught.

    Only a sample judged RIGHT demonstrates, only one judged WRONG contrasts; one whose verifier
    failed (ERROR, TIMEOUT) is taught like a wrong one. A sample is taught if it has a demonstration
    or feedback. Nothing is shortened: too long a context is the caller's to count. `seed` decides
    every draw. `prefix_fraction` stands in for the config's. `buffer`: prompt id -> text of an
    earlier right sample. `answer_of` reads a wrong sample's answer (CEPO). UserError: a row without
    the solution that the config reads; an unknown context.
    """
    return [
        _contexts(group, i, teacher, seed, prefix_fraction, buffer or {}, answer_of)
        for i in range(len(group.samples))
    ]


def _contexts(
    group: Group,
    position: int,
    teacher: TeacherConfig,
    seed: str,
    prefix_fraction: float | None,
    buffer: Mapping[str, str],
    answer_of: Callable[[str], str | None],
) -> list[TeacherContext]:
    sample = group.samples[position]
    draw = random.Random(f"{seed}/{sample.index}")
    siblings = [s for i, s in enumerate(group.samples) if i != position or not teacher.exclude_self]
    shown = _demonstration(group.prompt, siblings, teacher, prefix_fraction, buffer, draw)
    feedback = (
        sample.feedback
        if teacher.feedback == "always" or (teacher.feedback != "never" and shown is None)
        else ""
    )
    if shown is None and not feedback and teacher.context != "prompt":
        return []
    texts: list[Text | None] = [shown]
    if shown is not None:
        texts += _contrasts(group, siblings, teacher, answer_of, draw)
    return [_context(group.prompt, text, feedback, sample.verdict, teacher) for text in texts]


def _demonstration(
    prompt: Prompt,
    siblings: list[Sample],
    teacher: TeacherConfig,
    prefix_fraction: float | None,
    buffer: Mapping[str, str],
    draw: random.Random,
) -> Text | None:
    """What the first teacher is shown; None for nothing."""
    kind = teacher.context
    if kind == "prompt":
        return None
    if kind == "answer":
        return prompt.answer, "answer"
    if kind == "solution":
        return _solution(prompt, "context=solution"), "solution"
    if kind == "prefix":
        fraction = teacher.prefix_fraction if prefix_fraction is None else prefix_fraction
        return (
            solution_prefix(_solution(prompt, "context=prefix"), prompt.answer, fraction),
            f"prefix {fraction:.3f}",
        )
    chosen = _pick(
        [s for s in siblings if s.verdict is Verdict.RIGHT], kind, teacher.num_demonstrations, draw
    )
    if chosen:
        texts = [without_thinking(s.text) if teacher.strip_thinking else s.text for s in chosen]
        return ANOTHER.join(texts), f"sibling {', '.join(str(s.index) for s in chosen)}"
    if teacher.fallback == "solution":
        return (prompt.solution, "solution") if prompt.solution else None
    if teacher.fallback == "buffer" and prompt.id in buffer:
        return without_thinking(buffer[prompt.id]) if teacher.strip_thinking else buffer[prompt.id], "buffer"
    return None


def _contrasts(
    group: Group,
    siblings: list[Sample],
    teacher: TeacherConfig,
    answer_of: Callable[[str], str | None],
    draw: random.Random,
) -> list[Text]:
    """Texts that the demonstration is held against."""
    # UNSURE which of more than K failures (RLCSD): chosen as the demonstration is
    if teacher.contrast == "failures":
        chosen = _pick(
            [s for s in siblings if s.verdict is Verdict.WRONG], teacher.context, teacher.num_contrasts, draw
        )
        return [
            (without_thinking(s.text) if teacher.strip_thinking else s.text, f"wrong sibling {s.index}")
            for s in chosen
        ]
    # one for the group, the sample itself included: its worst answer (CEPO)
    if teacher.contrast == "wrong_answer":
        wrong = sorted((s for s in group.samples if s.verdict is Verdict.WRONG), key=lambda s: s.score or 0.0)
        answers = ((answer_of(s.text), s.index) for s in wrong)
        found = next(((text, index) for text, index in answers if text and text != group.prompt.answer), None)
        return [(found[0], f"wrong answer {found[1]}")] if found else []
    return []


def _pick(candidates: list[Sample], kind: str, count: int, draw: random.Random) -> list[Sample]:
    """Up to `count` of the samples, by the rule that a kind of context names; the first ones for a
    kind that names none.
    """
    if kind == "random_success":
        return draw.sample(candidates, min(count, len(candidates)))
    if kind == "shortest_success":
        candidates = sorted(candidates, key=lambda s: len(s.response_ids))
    elif kind not in ("first_success", "solution", "answer", "prefix"):
        raise UserError(
            f"algorithm.teacher.context: {kind!r} is none; see megasd/config/schema.py for those there are"
        )
    return candidates[:count]


def _solution(prompt: Prompt, reader: str) -> str:
    if not prompt.solution:
        raise UserError(f'row {prompt.id!r}: algorithm.teacher.{reader} reads the row\'s "solution"; add one')
    return prompt.solution


def _context(
    prompt: Prompt, text: Text | None, feedback: str, verdict: Verdict | None, teacher: TeacherConfig
) -> TeacherContext:
    def write(question: str) -> str:
        if text is None and not feedback:
            turn = question
        else:
            turn = _fill(teacher.template, question, text[0] if text else None, feedback)
        told = VERDICTS.get(verdict) if teacher.say_verdict else None
        return f"{turn}\n\n{told}" if told else turn

    check_template(teacher.template)
    messages = _with_system(_with_question(prompt.messages, write), teacher.system)
    sources = ([text[1]] if text else []) + (["feedback"] if feedback else [])
    return TeacherContext(messages, source=" + ".join(sources) or "prompt")


def _fill(template: str, question: str, solution: str | None, feedback: str = "") -> str:
    """The template in one pass: braces inside the texts stay as they are. Feedback follows the
    solution; without a solution its part of the template (up to the question, or from it on) gives
    way to the feedback, and the instruction at the end stays.
    """
    head, first, middle, _, tail = PLACEHOLDER.split(template)
    block = f"{FEEDBACK}{feedback}" if feedback else ""
    if first == "prompt":
        return head + question + (block if solution is None else middle + solution + block) + tail
    return (block.lstrip("\n") if solution is None else head + solution + block) + middle + question + tail


def _with_question(messages: list[Message], write: Callable[[str], str]) -> list[Message]:
    if not messages or messages[-1]["role"] != "user":
        raise UserError("a teacher context needs messages that end with a user turn")
    return [*messages[:-1], {"role": "user", "content": write(messages[-1]["content"])}]


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """A first system turn; templates take but one, so a row's own is kept at its head."""
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{system}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
