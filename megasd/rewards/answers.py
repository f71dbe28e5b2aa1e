"""Short text answers: the verifiers exact_match and multiple_choice.

    exact_match      The whole text, stripped, equals the gold answer, stripped.
    multiple_choice  The text after the last <answer>, up to </answer>, stripped, equals the gold
                     letter (the rule of SDPO, 2601.20802). Without the tag, the answer is the last
                     capital A-H or J that stands alone: "(C)", "**C**" and "C." count; "C-H", "He"
                     and "A's" do not. I is a pronoun. A task with more options, or with an article
                     "A" after its answer, should ask for the tag.

Both are one linear pass over a string. They cannot hang, so they run in this process.
"""

from __future__ import annotations

import re
from functools import partial

from megasd.rewards.verifier_row import Judgement, RewardSettings, Verifier
from megasd.types import Prompt, Verdict

ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
LETTER = re.compile(r"(?<![\w'’-])([A-HJ])(?![\w'’-])")


def after_thinking(text: str) -> str | None:
    """The text after the last </think>; None for a response that never closes its <think>."""
    text = text.rpartition("</think>")[2]
    return None if "<think>" in text else text


def read_letter(text: str) -> str | None:
    """The chosen option: what the last <answer> holds, else the last capital that stands alone."""
    start = text.rfind("<answer>")
    if start >= 0 and (tagged := ANSWER_TAG.match(text, start)):
        return tagged[1].strip()
    letters = LETTER.findall(text)
    return letters[-1] if letters else None


def read_gold_text(prompt: Prompt, settings: RewardSettings) -> str:
    """The row's answer, stripped."""
    return prompt.answer.strip()


def compare_text(answer: str, gold: str, *, feedback: str) -> Judgement:
    """RIGHT for equal texts, else WRONG with this feedback."""
    if answer == gold:
        return Judgement(Verdict.RIGHT)
    return Judgement(Verdict.WRONG, feedback=feedback)


EXACT_MATCH: Verifier[str] = Verifier(
    read_answer=str.strip,
    read_gold=read_gold_text,
    compare=partial(compare_text, feedback="The answer is not the expected text."),
    no_answer=Judgement(Verdict.WRONG, feedback="No answer was found after the thinking."),
)
MULTIPLE_CHOICE: Verifier[str] = Verifier(
    read_answer=read_letter,
    read_gold=read_gold_text,
    compare=partial(compare_text, feedback="The chosen option is not the right one."),
    no_answer=Judgement(Verdict.WRONG, feedback="No chosen option was found."),
)
