"""Rubrics: the verifier `rubric`.

A response's score is the weighted share of criteria that it meets, as ROPD (2605.07396) scores
black-box teachers:

    s = sum(w_k v_k) / sum(w_k),   w_k > 0, v_k in [0, 1]

A sample is right from reward.rubric_threshold on. In ROPD one language model writes 4 to 12 criteria
and another model judges them. `Judge` is the interface of the second model. RuleJudge, the judge
that ships, reads rules, so that the method runs without a second model. A row brings its criteria:

    "rubric": [{"rule": "contains", "value": "42", "weight": 2.0}, {"rule": "max_words", "value": 120}]

A row without criteria gets them from its answer and solution (`write_rubric`). Rules cannot see
reasoning: they are a stand-in that makes the plumbing testable, not a judge of quality. A rule may
hang in a regular expression, so rules run in a worker process (rewards/worker_pool.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from megasd.rewards.verifier_row import (
    Judgement,
    RewardSettings,
    Verifier,
    WorkerCheck,
    WorkerReply,
    WorkerRequest,
    needs_check,
)
from megasd.types import Prompt, UserError, Verdict

# failed criteria named in feedback
MAX_SHOWN = 3
# Rules read this much of a response.
MAX_CHARACTERS = 100_000
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SENTENCE_END = re.compile(r"[.!?\n]+")


class Judge(Protocol):
    """Says which criteria a response meets: rules, a reward model, a language model behind a URL."""

    def judge(self, prompt: Prompt, response_text: str) -> list[tuple[float, float]]:
        """Give (weight > 0, value in [0, 1]) of each criterion.

        An exception leaves the response unscored.
        """
        ...


def score(criteria: list[tuple[float, float]]) -> float:
    """sum(w v) / sum(w) of (weight, value) pairs.

    ValueError: no criteria, a weight that is not positive, or a value outside [0, 1].
    """
    if not criteria or any(not weight > 0 or not 0 <= value <= 1 for weight, value in criteria):
        raise ValueError("a judge must give one or more (weight > 0, value in [0, 1])")
    return sum(weight * value for weight, value in criteria) / sum(weight for weight, _ in criteria)


class RuleJudge:
    """Judges by the rules of `prompt.rubric`, or of `write_rubric` where the row has none."""

    def judge(self, prompt: Prompt, response_text: str) -> list[tuple[float, float]]:
        """(weight, value) of each criterion, in order. UserError for a criterion that is no rule."""
        return [(weight, value) for weight, value, _ in self.explain(prompt, response_text)]

    def explain(self, prompt: Prompt, response_text: str) -> list[tuple[float, float, str]]:
        """(weight, value, name of the rule) of each criterion."""
        text = response_text[:MAX_CHARACTERS]
        rows = prompt.rubric or write_rubric(prompt)
        return [
            (weight, float(rule(text, value)), name)
            for name, rule, value, weight in map(lambda row: _criterion(prompt, row), rows)
        ]


def write_rubric(prompt: Prompt) -> list[dict[str, Any]]:
    """Write 4 to 12 weighted criteria from the answer and the solution of a row.

    The answer is first and heaviest, then form, then the steps of the solution.
    """
    answer = prompt.answer.strip()
    rubric: list[dict[str, Any]] = [
        {"rule": "ends_with_answer", "value": answer, "weight": 4.0},
        {"rule": "contains", "value": answer, "weight": 2.0},
        {"rule": "no_repetition", "value": 3, "weight": 1.0},
        {"rule": "max_words", "value": max(50, 4 * len((prompt.solution or "").split())), "weight": 1.0},
    ]
    # intermediate results, in their order
    steps = dict.fromkeys(NUMBER.findall(prompt.solution or ""))
    steps.pop(answer, None)
    return rubric + [{"rule": "contains", "value": number, "weight": 0.5} for number in list(steps)[:8]]


# ---- rules: (text, value) -> whether the text meets the criterion ----


def contains(text: str, value: str) -> bool:
    """The text holds `value`, in any case, and not as part of a longer word or number."""
    value = value.strip()
    return re.search(rf"(?<![\w.]){re.escape(value)}(?!\w|\.\d)", text, re.IGNORECASE) is not None


def lacks(text: str, value: str) -> bool:
    """The text does not contain `value`."""
    return not contains(text, value)


def matches(text: str, value: str) -> bool:
    """The regular expression `value` is found. Patterns of rows are trusted."""
    return re.search(value, text, re.MULTILINE) is not None


def max_words(text: str, value: float) -> bool:
    """The text has at most `value` words."""
    return len(text.split()) <= value


def min_words(text: str, value: float) -> bool:
    """The text has at least `value` words."""
    return len(text.split()) >= value


def ends_with_answer(text: str, value: str) -> bool:
    """The last line with text ends with `value`; a box, emphasis and a full stop around it are dropped."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = re.sub(r"\\boxed\{(.*)\}", r"\1", lines[-1]) if lines else ""
    last = last.replace("$", "").strip(" .*`")
    value = value.strip()
    return last.endswith(value) and not re.search(r"[\w.]$", last[: len(last) - len(value)])


def no_repetition(text: str, value: float) -> bool:
    """No sentence of five words or more occurs more than `value` times."""
    sentences = [" ".join(part.split()).lower() for part in SENTENCE_END.split(text)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 4]
    counts: dict[str, int] = {}
    for sentence in long:
        counts[sentence] = counts.get(sentence, 0) + 1
    return max(counts.values(), default=0) <= value


TEXT_RULES: dict[str, Callable[[str, str], bool]] = {
    "contains": contains,
    "lacks": lacks,
    "matches": matches,
    "ends_with_answer": ends_with_answer,
}
NUMBER_RULES: dict[str, Callable[[str, float], bool]] = {
    "max_words": max_words,
    "min_words": min_words,
    "no_repetition": no_repetition,
}


def _criterion(prompt: Prompt, row: dict[str, Any]) -> tuple[str, Callable[[str, Any], bool], Any, float]:
    """(name, rule, value, weight) of one row of a rubric; UserError naming the prompt and the fault."""
    name, value, weight = row.get("rule"), row.get("value"), row.get("weight", 1.0)
    where = f"row {prompt.id}: rubric"
    if name not in TEXT_RULES and name not in NUMBER_RULES:
        raise UserError(f"{where}: {name!r} is no rule; use one of {', '.join([*TEXT_RULES, *NUMBER_RULES])}")
    if not _is_number(weight) or not 0 < weight < float("inf"):
        raise UserError(f"{where}: {name} has the weight {weight!r}; give a number greater than 0")
    if name in NUMBER_RULES and not _is_number(value):
        raise UserError(f"{where}: {name} has the value {value!r}; give a number")
    if name in TEXT_RULES and not (isinstance(value, str) and value.strip()):
        raise UserError(f"{where}: {name} has the value {value!r}; give a text")
    if name == "matches":
        try:
            re.compile(str(value))
        except re.error as error:
            raise UserError(f"{where}: {value!r} is no regular expression ({error}); correct it") from error
    rule = TEXT_RULES.get(name) or NUMBER_RULES[name]
    return name, rule, value, float(weight)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rubric(prompt: Prompt) -> None:
    """Raise UserError for the first bad criterion of a row."""
    for row in prompt.rubric or []:
        _criterion(prompt, row)


# ---- the verifier ----


def read_gold_rubric(prompt: Prompt, settings: RewardSettings) -> Prompt:
    """The row itself: criteria, answer and solution. UserError for a bad criterion."""
    check_rubric(prompt)
    return prompt


def gold_text(prompt: Prompt) -> str:
    """What judging needs of a row, as JSON for a worker."""
    return json.dumps([prompt.id, prompt.answer, prompt.solution, prompt.rubric])


def judge_rubric(answer: str, gold: str) -> list[tuple[float, float, str]]:
    """(weight, value, rule) of each criterion of a response. `gold`: a row as `gold_text` writes it."""
    row, reference, solution, rubric = json.loads(gold)
    return RuleJudge().explain(Prompt(row, [], reference, solution, rubric=rubric), answer)


def conclude_rubric(request: WorkerRequest, reply: WorkerReply, settings: RewardSettings) -> Judgement:
    """The judgement of judged criteria: reply.result is a list of (weight, value, name)."""
    if not reply.verdict.counts:
        return Judgement(reply.verdict, reply.detail)
    criteria = reply.result
    try:
        total = score([(weight, value) for weight, value, _ in criteria])
    except (ValueError, TypeError) as error:
        return Judgement(Verdict.ERROR, f"judge: {error}")
    if total >= settings.rubric_threshold:
        return Judgement(Verdict.RIGHT, score=total)
    missed = [name for _, value, name in sorted(criteria, key=lambda row: -row[0]) if value < 1 and name]
    named = ", ".join(dict.fromkeys(missed[:MAX_SHOWN]))
    among = f" (among them: {named})" if named else ""
    feedback = f"The response does not meet enough of the criteria{among}."
    return Judgement(Verdict.WRONG, feedback=feedback, score=total)


RUBRIC: Verifier[Prompt] = Verifier(
    read_answer=str.strip,
    read_gold=read_gold_rubric,
    compare=needs_check,
    no_answer=Judgement(Verdict.WRONG, feedback="No answer was found after the thinking.", score=0.0),
    check=WorkerCheck(judge_rubric, gold_text=gold_text, conclude=conclude_rubric, accepts_judge=True),
    can_vote=False,
)
