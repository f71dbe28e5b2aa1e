"""Make teacher contexts: the messages that a sample's teacher reads in place of the prompt.

The last user turn of the teacher's messages holds privileged text. Where the text comes from
(algorithm.teacher.context):

    first_success     right samples of the group in their order, without the sample itself, as SDPO
                      was released (2601.20802, 2): the only right sample of a group has no teacher,
                      every wrong sample gets the first right sample, and if no sample is right, no
                      sample of the group has a teacher
    random_success    as first_success, but drawn at random for each sample
    shortest_success  as first_success, but fewest response tokens first (SSOPD 2605.17497)
    solution          the reference solution of the row (OPSD 2601.18734)
    answer            the final answer of the row alone (RLSD 2604.03128)
    prefix            the first lines of the solution, and the answer in a box (ATESD 2605.11458)
    prompt            no text: the question as it is, perhaps after a system turn (OPCD 2602.12275;
                      a separate teacher)

`CONTEXTS` lists them by name. CONTEXT_TRAITS in config/variants.py holds the properties of a
context that other files read.

`contrast` adds contrasting contexts: the same turn around the text of wrong samples (RLCSD
2606.11709) or around the answer of one wrong sample (CEPO 2605.19436). In the difference of two
teachers the template cancels. The first teacher never reads the student's own failed attempt (SDPO:
that costs diversity).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megasd.config.schema import DEFAULT_TEMPLATE, TeacherConfig
from megasd.config.variants import CONTEXT_TRAITS
from megasd.types import Group, Message, Prompt, Sample, TeacherContext, UserError, Verdict

PLACEHOLDER = re.compile(r"\{(prompt|solution)\}")
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# The text between two demonstrations.
ANOTHER = "\n\nAnother correct solution:\n\n"
FEEDBACK = "\n\nFeedback on an earlier attempt that failed:\n\n"
VERDICTS = {
    Verdict.RIGHT: "The answer that follows is correct.",
    Verdict.WRONG: "The answer that follows is incorrect.",
}

# (privileged text, where the text came from).
Text = tuple[str, str]


def check_template(template: str) -> None:
    """Raise UserError unless {prompt} and {solution} each occur once in the template.

    Other braces are plain text, so LaTeX needs no escapes.
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
    """The messages with the last user turn and the solution put into `template`.

    Earlier turns are kept. Nothing is changed in place.

    with_solution([{"role": "user", "content": "7+8="}], "15", template="{prompt}
    ({solution})")[-1]["content"] == "7+8= (15)"
    """
    check_template(template)
    return _with_question(messages, lambda question: _fill(template, question, solution))


def without_thinking(text: str) -> str:
    """The text without <think>...</think> blocks.

    If the opening tag is missing (a template may have written it), everything up to </think> is
    removed.
    """
    text = THINKING.sub("", text)
    return text.rpartition("</think>")[2].strip()


def solution_prefix(solution: str, answer: str, fraction: float) -> str:
    """The first floor(fraction * m) of a solution's m non-blank lines, and the boxed answer.

    If that is all m lines, the solution is returned as it is.

    solution_prefix("7+8\\n= 10+5\\n= 15", "15", 0.5) == "7+8\\n\\boxed{15}"
    """
    lines = solution.splitlines()
    filled = [k for k, line in enumerate(lines) if line.strip()]
    # 0.29 * 100 is a little less than 29, and floor would give 28.
    count = math.floor(fraction * len(filled) + 1e-9)
    if count >= len(filled):
        return solution
    return "\n".join([*lines[: filled[count - 1] + 1 if count else 0], f"\\boxed{{{answer}}}"])


def final_answer(text: str) -> str:
    """The final answer in a response.

    It is the last \\boxed{...} if that closes, else the last <answer>, else the last line, else "".
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
    """For each sample of the group: the teacher's context, then the contrasting contexts.

    A sample has a teacher if it has a demonstration or feedback; else its list is empty. Only a
    sample judged RIGHT demonstrates. Only a sample judged WRONG contrasts. A sample whose verifier
    failed (ERROR, TIMEOUT) has a teacher as a wrong sample has. No text is shortened: the caller
    drops contexts that are too long. `seed` decides every draw. `prefix_fraction` replaces
    teacher.prefix_fraction. `buffer`: prompt id -> text of an earlier right sample. `answer_of`
    reads a wrong sample's answer (CEPO). UserError: a row without the solution that the config
    reads; an unknown context.
    """
    if teacher.context not in CONTEXTS:
        raise UserError(
            f"algorithm.teacher.context: {teacher.context!r} is none; choose from {', '.join(CONTEXTS)}"
        )
    fraction = teacher.prefix_fraction if prefix_fraction is None else prefix_fraction
    return [
        _contexts(
            ContextRequest(
                group=group,
                sample=sample,
                siblings=[s for k, s in enumerate(group.samples) if k != place or not teacher.exclude_self],
                teacher=teacher,
                prefix_fraction=fraction,
                buffer=buffer or {},
                answer_of=answer_of,
                draw=random.Random(f"{seed}/{sample.index}"),
            )
        )
        for place, sample in enumerate(group.samples)
    ]


@dataclass(frozen=True)
class ContextRequest:
    """One sample, and the material that its teacher may be shown."""

    group: Group
    sample: Sample
    # The samples of the group; with teacher.exclude_self, without the sample itself.
    siblings: list[Sample]
    teacher: TeacherConfig
    # The fraction of the solution that context=prefix shows.
    prefix_fraction: float
    # prompt id -> text of a right sample of an earlier step.
    buffer: Mapping[str, str]
    # Reads the answer in the text of a wrong sample.
    answer_of: Callable[[str], str | None]
    # The random numbers of this sample.
    draw: random.Random

    def text_of(self, response: str) -> str:
        """The text of a response as the teacher is shown it."""
        return without_thinking(response) if self.teacher.strip_thinking else response


# (samples, count, random numbers of the sample) -> up to `count` of the samples.
Choose = Callable[[list[Sample], int, random.Random], list[Sample]]


def _first(samples: list[Sample], count: int, draw: random.Random) -> list[Sample]:
    return samples[:count]


def _drawn(samples: list[Sample], count: int, draw: random.Random) -> list[Sample]:
    return draw.sample(samples, min(count, len(samples)))


def _shortest(samples: list[Sample], count: int, draw: random.Random) -> list[Sample]:
    return sorted(samples, key=lambda sample: len(sample.response_ids))[:count]


@dataclass(frozen=True)
class Context:
    """A row of `CONTEXTS`."""

    # The text that the first teacher is shown; None if there is no text for this sample.
    text: Callable[[ContextRequest], Text | None]
    # Chooses the samples to show, and the contrasting samples, if there are more than wanted.
    choose: Choose = _first


def _success(request: ContextRequest) -> Text | None:
    """Right siblings; if there are none, the text that teacher.fallback names."""
    teacher, prompt = request.teacher, request.group.prompt
    right = [sample for sample in request.siblings if sample.verdict is Verdict.RIGHT]
    chosen = CONTEXTS[teacher.context].choose(right, teacher.num_demonstrations, request.draw)
    if chosen:
        texts = [request.text_of(sample.text) for sample in chosen]
        return ANOTHER.join(texts), f"sibling {', '.join(str(sample.index) for sample in chosen)}"
    if teacher.fallback == "solution":
        return (prompt.solution, "solution") if prompt.solution else None
    if teacher.fallback == "buffer" and prompt.id in request.buffer:
        return request.text_of(request.buffer[prompt.id]), "buffer"
    return None


def _whole_solution(request: ContextRequest) -> Text:
    return _solution(request.group.prompt, "context=solution"), "solution"


def _answer(request: ContextRequest) -> Text:
    return request.group.prompt.answer, "answer"


def _prefix(request: ContextRequest) -> Text:
    prompt, fraction = request.group.prompt, request.prefix_fraction
    text = solution_prefix(_solution(prompt, "context=prefix"), prompt.answer, fraction)
    return text, f"prefix {fraction:.3f}"


def _nothing(request: ContextRequest) -> None:
    return None


CONTEXTS: dict[str, Context] = {
    "first_success": Context(_success),
    "random_success": Context(_success, _drawn),
    "shortest_success": Context(_success, _shortest),
    "solution": Context(_whole_solution),
    "answer": Context(_answer),
    "prefix": Context(_prefix),
    "prompt": Context(_nothing),
}


def _failures(request: ContextRequest) -> list[Text]:
    """Wrong siblings, at most K = teacher.num_contrasts (RLCSD).

    UNSURE which K of more siblings: they are chosen as the demonstration is.
    """
    wrong = [sample for sample in request.siblings if sample.verdict is Verdict.WRONG]
    teacher = request.teacher
    chosen = CONTEXTS[teacher.context].choose(wrong, teacher.num_contrasts, request.draw)
    return [(request.text_of(sample.text), f"wrong sibling {sample.index}") for sample in chosen]


def _wrong_answer(request: ContextRequest) -> list[Text]:
    """The answer of the worst wrong sample of the group, the sample itself included (CEPO)."""
    group = request.group
    wrong = sorted((s for s in group.samples if s.verdict is Verdict.WRONG), key=lambda s: s.score or 0.0)
    for sample in wrong:
        answer = request.answer_of(sample.text)
        if answer and answer != group.prompt.answer:
            return [(answer, f"wrong answer {sample.index}")]
    return []


# teacher.contrast -> the texts of the contrasting contexts.
CONTRASTS: dict[str, Callable[[ContextRequest], list[Text]]] = {
    "none": lambda request: [],
    "failures": _failures,
    "wrong_answer": _wrong_answer,
}


def _contexts(request: ContextRequest) -> list[TeacherContext]:
    """The contexts of one sample; empty if the sample has no teacher."""
    teacher, sample, prompt = request.teacher, request.sample, request.group.prompt
    shown = CONTEXTS[teacher.context].text(request)
    reads_feedback = teacher.feedback == "always" or (teacher.feedback != "never" and shown is None)
    feedback = sample.feedback if reads_feedback else ""
    if shown is None and not feedback and not CONTEXT_TRAITS[teacher.context].shows_nothing:
        return []
    texts: list[Text | None] = [shown]
    if shown is not None:
        texts += CONTRASTS[teacher.contrast](request)
    return [_context(prompt, text, feedback, sample.verdict, teacher) for text in texts]


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
        told = VERDICTS.get(verdict) if teacher.say_verdict and verdict is not None else None
        return f"{turn}\n\n{told}" if told else turn

    check_template(teacher.template)
    messages = _with_system(_with_question(prompt.messages, write), teacher.system)
    sources = ([text[1]] if text else []) + (["feedback"] if feedback else [])
    return TeacherContext(messages, source=" + ".join(sources) or "prompt")


def _fill(template: str, question: str, solution: str | None, feedback: str = "") -> str:
    """Fill the template in one pass, so that braces inside the texts stay as they are.

    Feedback follows the solution. Without a solution, the feedback replaces the solution's part of
    the template (up to the question, or from the question on). The instruction at the end stays.
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
    """The messages with `system` in the first system turn.

    Chat templates take a single system turn. If the row has a system turn, its text is kept and
    `system` follows it.
    """
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{system}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
