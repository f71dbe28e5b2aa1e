"""Teacher contexts: what the self-teacher of each sample reads in place of the student's prompt. SDPO (arXiv 2601.20802), section 2.

The teacher is the student with privileged text in its last user turn. Where the text comes from:

    first_success   the first right sample of the group, the sample's own index excluded, as released by SDPO. Hence the only
                    success of a group is untaught, every failure shares the first success, and a group without success is untaught.
    solution        the reference solution of the row, for every sample.

The student's own failed attempt is never shown (SDPO: it costs diversity).
"""

from __future__ import annotations

import re

from megasd.config import DEFAULT_TEMPLATE
from megasd.types import Group, Message, TeacherContext, UserError, Verdict

PLACEHOLDER = re.compile(r"\{(prompt|solution)\}")
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


def check_template(template: str) -> None:
    """Raise UserError unless {prompt} and {solution} each occur once; other braces are plain text, so LaTeX needs no escapes."""
    found = sorted(PLACEHOLDER.findall(template))
    if found != ["prompt", "solution"]:
        raise UserError(f"algorithm.teacher.template: {{prompt}} and {{solution}} must each occur once, found {found}: {template!r}")


def with_solution(messages: list[Message], solution: str, *, template: str = DEFAULT_TEMPLATE) -> list[Message]:
    """The messages with their last user turn put into `template`; earlier turns are kept and nothing is changed in place.

    with_solution([{"role": "user", "content": "7+8="}], "15", template="{prompt} ({solution})")[-1]["content"] == "7+8= (15)"
    """
    check_template(template)
    if not messages or messages[-1]["role"] != "user":
        raise UserError("a teacher context needs messages that end with a user turn")
    texts = {"prompt": messages[-1]["content"], "solution": solution}
    content = PLACEHOLDER.sub(lambda match: texts[match[1]], template)  # one pass: braces inside the texts stay as they are
    return [*messages[:-1], {"role": "user", "content": content}]


def without_thinking(text: str) -> str:
    """The text without <think>...</think> blocks; without an opening tag (a template may have written it) all up to </think> goes."""
    text = THINKING.sub("", text)
    return text.rpartition("</think>")[2].strip()


def teacher_contexts(
    group: Group, kind: str = "first_success", *, template: str = DEFAULT_TEMPLATE, strip_thinking: bool = True
) -> list[TeacherContext | None]:
    """One context per sample of the group, None where the sample stays untaught. `kind`: first_success | solution.

    Only a sample judged RIGHT demonstrates; one whose verifier failed (ERROR, TIMEOUT) is taught like a wrong one.
    `strip_thinking` removes the thinking of a sibling's demonstration (not of the row's own solution, which is given as written).
    UserError: unknown kind; kind "solution" on a row that has none.
    """
    if kind == "solution":
        solution = group.prompt.solution
        if not solution:
            raise UserError(f'row {group.prompt.id!r}: algorithm.teacher.context=solution reads the row\'s "solution"; add one')
        context = TeacherContext(with_solution(group.prompt.messages, solution, template=template), source="solution")
        return [context] * len(group.samples)
    if kind != "first_success":
        raise UserError(f"algorithm.teacher.context: {kind!r} is not one of first_success, solution")

    contexts: dict[int, TeacherContext] = {}
    successes = [position for position, sample in enumerate(group.samples) if sample.verdict is Verdict.RIGHT]
    for position in successes[:2]:  # the first, and the second for the first itself
        sample = group.samples[position]
        text = without_thinking(sample.text) if strip_thinking else sample.text
        messages = with_solution(group.prompt.messages, text, template=template)
        contexts[position] = TeacherContext(messages, source=f"sibling {sample.index}")
    chosen = (next((other for other in successes if other != position), None) for position in range(len(group.samples)))
    return [None if other is None else contexts[other] for other in chosen]
