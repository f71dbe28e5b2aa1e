"""Mathematics as answers: the verifier `math`.

The answer is what the last \\boxed{...} holds, compared with the gold answer by math-verify. A
response without a box, or with a last box that is cut off, is wrong.
"""

from __future__ import annotations

from megasd.rewards.verifier_row import (
    Judgement,
    RewardSettings,
    Verifier,
    WorkerCheck,
    WorkerReply,
    WorkerRequest,
)
from megasd.types import Prompt, Verdict

# A longer final answer is not checked: the time to parse LaTeX grows with the square of its length.
MAX_ANSWER_CHARACTERS = 4096
WRONG = Judgement(Verdict.WRONG, feedback="The final answer is not equal to the reference.")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, stripped, with matched braces.

    None when the text has no box, or when the last box never closes: an earlier box does not stand
    in for it.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = position = start + len("\\boxed{")
    depth = 1
    while position < len(text):
        character = text[position]
        if character == "\\":
            # \{ and \} are no braces
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[begin:position].strip()
        position += 1
    return None


def read_gold_math(prompt: Prompt, settings: RewardSettings) -> str:
    """The last box of the row's answer, or the whole answer where it has no box."""
    answer = prompt.answer.strip()
    return last_boxed(answer) or answer


def compare_math(answer: str, gold: str) -> Judgement | None:
    """The judgement of equal, empty and overlong answers; None when math-verify must compare."""
    if answer == gold:
        return Judgement(Verdict.RIGHT)
    if not answer:
        return WRONG
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARACTERS:
        which = "gold answer" if len(gold) > MAX_ANSWER_CHARACTERS else "answer"
        return Judgement(Verdict.ERROR, f"the {which} has more than {MAX_ANSWER_CHARACTERS} characters")
    return None


def check_math(answer: str, gold: str) -> bool:
    """Whether two final answers are the same mathematics, by math-verify.

    10\\% is 0.1, \\frac12 is 0.5, x=3 is 3. The timeouts of math-verify are off: they would turn a hung
    comparison into a wrong answer.
    """
    from math_verify import parse, verify

    def boxed(text: str) -> str:
        return text if "\\boxed" in text else f"\\boxed{{{text}}}"

    gold_parsed = parse(boxed(gold), parsing_timeout=None, raise_on_error=True)
    answer_parsed = parse(boxed(answer), parsing_timeout=None, raise_on_error=True)
    return verify(gold_parsed, answer_parsed, timeout_seconds=None, raise_on_error=True)


def prepare_math() -> None:
    """Use sympy once, which takes half a second the first time."""
    import logging

    # math-verify warns that its own timeouts are off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    check_math("\\frac{1}{2}", "0.5")


def conclude_math(request: WorkerRequest, reply: WorkerReply, settings: RewardSettings) -> Judgement:
    """The judgement; the detail of a check that failed shows the beginning of both texts."""
    if reply.verdict is Verdict.WRONG:
        return WRONG
    if reply.verdict.counts:
        return Judgement(reply.verdict)
    shown = f"answer {request.answer[:200]!r}, gold {request.gold[:200]!r}"
    return Judgement(reply.verdict, f"{reply.detail}; {shown}")


MATH: Verifier[str] = Verifier(
    read_answer=last_boxed,
    read_gold=read_gold_math,
    compare=compare_math,
    no_answer=Judgement(Verdict.WRONG, feedback="No \\boxed{} answer was found."),
    check=WorkerCheck(check_math, gold_text=str, conclude=conclude_math, prepare=prepare_math),
)
