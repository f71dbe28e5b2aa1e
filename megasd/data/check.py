"""`megasd data check` without its printing: every row of a data file, every bad one named by file
and line, none of them stopping it.

    report = check("train.jsonl")
    # [Fault("train.jsonl", 17, "conflict", "same prompt as line 3, with another answer ...")]
    report.errors

Errors, at most one a row (a row with several faults shows the next when the first is mended):

    file json encoding blank size type     cannot be read as a row, or holds damaged text
    key columns missing empty messages     read as a row, and not as a prompt: names, types, texts, turns, pass_rate, rubric
    role field
    id duplicate conflict                  an id or a prompt that an earlier row has, a prompt with the same or with another answer
    leak                                   a question that the held-out file asks
    length template                        more prompt tokens than allowed; messages that the chat template refuses
    answer shown solution                  an answer that no verifier reads; one that the prompt gives away; one that the solution denies

Prompts are the same when their texts are, but for case, spacing, typographic variants and a final
mark. Questions are compared without system turn and without sentences that say how to answer. The
later of two rows is the one named. Warnings: nearly the same question (only punctuation, spacing or
words such as "please compute" differ); a solution that math-verify could not compare.

Rows are read one at a time; kept are 16-byte digests of prompts. Plain Python; answers are compared
in the verifier's own worker processes.
"""  # noqa: E501

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megasd.config.schema import RewardConfig
from megasd.data import check_answer, check_text
from megasd.data.columns import DROPS_REPEATS, MAPPINGS
from megasd.data.prompts import no_solution, read_prompts, used_id
from megasd.data.rows import DataError, Row, row_files, short
from megasd.data.same_text import FILLER, TOKEN, digest, prompt_digest, question_of
from megasd.types import Group, Message, Prompt, Sample, UserError, Verdict

VERIFIER_OF = {
    "dapo_math": "math", "math500": "math", "aime": "math",
    "sciknoweval": "multiple_choice", "toolalpaca": "tool_use", "livecodebench": "code",
}  # fmt: skip
# A habit of the file, such as solutions that end on the answer, is a rule when so many rows keep
# it, and at least so many of them
HABIT_SHARE, HABIT_ROWS = 0.95, 20
# an answer without any of these is words
MATHS = re.compile(r"[\d\\$^=<>|{}]")
# more than any tokenizer's on text; used where none is given
CHARACTERS_A_TOKEN = 8


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: the first thing found. `line` is its line or row number, from 1."""

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.message}"


def count_characters(messages: list[Message]) -> int:
    """Characters of all turns."""
    return sum(len(message["content"]) for message in messages)


@dataclass(frozen=True)
class CheckRules:
    """What a file is held against.

    `prompt_length` and `text_length` measure messages and a solution, in `unit`; a UserError of the
    former is an error of the row (kind template). `verifier`: what will read the answers; None:
    that of the mapping, and for auto what holds for all of them.
    """

    mapping: str = "auto"
    max_row_bytes: int = 262144
    require_solution: bool = False
    verifier: str | None = None
    # of the evaluation file, none of whose questions may occur
    held_out: CheckReport | None = None
    prompt_length: Callable[[list[Message]], int] = count_characters
    text_length: Callable[[str], int] = len
    # in unit
    max_prompt_length: int | None = None
    unit: str = "characters"


@dataclass
class CheckReport:
    """What a check found. `lengths` has a number for each prompt that reads and repeats none, in
    `unit`; `solution_lengths` likewise.
    """

    path: str
    unit: str
    rows: int = 0
    prompts: int = 0
    # by the rules of the mapping
    left_out: int = 0
    errors: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    solution_lengths: list[int] = field(default_factory=list)
    # the first good ones
    shown: list[Prompt] = field(default_factory=list)
    # digest -> row, for leaks into another file
    questions: dict[bytes, str] = field(default_factory=dict)


@dataclass
class _Seen:
    """What earlier rows held."""

    ids: dict[str, Row] = field(default_factory=dict)
    # row, answer, id
    prompts: dict[bytes, tuple[Row, str, str]] = field(default_factory=dict)
    nearly: dict[bytes, Row] = field(default_factory=dict)
    # row, answer, what its solution ends on
    doubts: list[tuple[Row, str, str]] = field(default_factory=list)
    # (name, "rows" that could keep one | "kept")
    habits: Counter[tuple[str, str]] = field(default_factory=Counter)
    # name of a habit -> row, kind, message
    breaches: dict[str, list[tuple[Row, str, str]]] = field(default_factory=dict)


def check_file(path: str | Path, rules: CheckRules | None = None, *, num_shown: int = 2) -> CheckReport:
    """Go through every row of a file or directory. `num_shown`: good prompts to keep. DataError: no
    such file or mapping.
    """
    rules = rules or CheckRules()
    report, seen = CheckReport(str(path), rules.unit), _Seen()
    files = row_files(path)
    last = Row(files[0][0], 0, None)
    try:
        for row, found in read_prompts(path, max_row_bytes=rules.max_row_bytes, mapping=rules.mapping):
            last = row
            report.rows += 1
            if isinstance(found, DataError):
                _add(report.errors, row, _finding(found, row))
                continue
            findings = [_judge(row, prompt, rules, seen, report) for prompt in found]
            good = [
                prompt
                for prompt, finding in zip(found, findings, strict=True)
                if prompt is not None and finding is None
            ]
            report.shown += good[: num_shown - len(report.shown)] if len(report.shown) < num_shown else []
            _add(report.errors, row, next((finding for finding in findings if finding), None))
    except DataError as error:
        if rules.mapping not in MAPPINGS:
            raise
        _add(report.errors, Row(last.path, last.number + 1, None), ("file", str(error)))
    if not report.rows and not report.errors:
        _add(report.errors, Row(last.path, 1, None), ("file", "no rows; write one JSON object per line"))
    _judge_habits(report, seen)
    _judge_doubts(report, seen)
    order = {str(file): i for i, (file, _) in enumerate(files)}
    for faults_found in (report.errors, report.warnings):
        faults_found.sort(key=lambda fault: (order[fault.file], fault.line))
    return report


def _judge(
    row: Row, prompt: Prompt | None, rules: CheckRules, seen: _Seen, report: CheckReport
) -> check_text.TextFinding:
    """The first thing that is wrong with a prompt that reads."""
    if prompt is None or (rules.mapping in DROPS_REPEATS and _is_known_repeat(prompt, seen)):
        report.left_out += 1
        return None
    report.prompts += 1
    finding = check_text.damaged_text(prompt) or check_text.odd_turns(prompt)
    if finding is None and rules.require_solution and prompt.solution is None:
        finding = _finding(no_solution(row), row)
    finding = (
        finding or _repeated(row, prompt, seen, report, rules.held_out) or _measured(prompt, rules, report)
    )
    if finding is not None:
        return finding
    verifier = rules.verifier or VERIFIER_OF.get(rules.mapping)
    labels = check_answer.options(prompt) or check_answer.listed_options(row.values)
    finding = check_answer.unreadable_answer(prompt, verifier, labels) or check_answer.shown_answer(prompt)
    return finding or _denied(row, prompt, verifier, labels, seen)


def _measured(prompt: Prompt, rules: CheckRules, report: CheckReport) -> check_text.TextFinding:
    """Notes the lengths of a prompt and its solution, and says when the prompt is too long."""
    try:
        length = rules.prompt_length(prompt.messages)
    except UserError as error:
        return "template", str(error)
    report.lengths.append(length)
    if prompt.solution is not None:
        report.solution_lengths.append(rules.text_length(prompt.solution))
    if rules.max_prompt_length is None or length <= rules.max_prompt_length:
        return None
    what = "raise rollout.max_prompt_tokens or drop the row"
    if rules.unit != "tokens":
        what = (
            f"rollout.max_prompt_tokens={rules.max_prompt_length // CHARACTERS_A_TOKEN} cannot hold them;"
            " count with --model DIR"
        )
    return "length", f"{length} prompt {rules.unit}, more than {rules.max_prompt_length}; {what}"


def _add(found: list[Fault], row: Row, finding: check_text.TextFinding) -> None:
    if finding is not None:
        found.append(Fault(str(row.path), row.number, *finding))


def _finding(error: DataError, row: Row) -> tuple[str, str]:
    return error.kind, str(error).removeprefix(f"{row.where}: ")


def _is_known_repeat(prompt: Prompt, seen: _Seen) -> bool:
    known = seen.prompts.get(prompt_digest(prompt.messages))
    return known is not None and known[1:] == (check_answer.normal(prompt.answer), prompt.id)


def _repeated(
    row: Row, prompt: Prompt, seen: _Seen, report: CheckReport, held_out: CheckReport | None
) -> check_text.TextFinding:
    """What this row has in common with an earlier one or with the held-out file; enters it among
    the earlier ones.
    """
    # without its values
    place = Row(row.path, row.number, None)
    asked = question_of(prompt.messages)
    question = digest(asked)
    report.questions.setdefault(question, row.where)
    known_id = seen.ids.setdefault(prompt.id, place)
    whole, answer = prompt_digest(prompt.messages), check_answer.normal(prompt.answer)
    known, known_answer, _ = seen.prompts.setdefault(whole, (place, answer, prompt.id))
    if held_out is not None and question in held_out.questions:
        return (
            "leak",
            (
                f"the same question as {held_out.questions[question]}, which is held out; take it out of one"
                " of the two files"
            ),
        )
    if known is not place:
        there = f"line {known.number}" if known.path == row.path else known.where
        same_id = ", and the same id" if known_id is not place else ""
        if answer == known_answer:
            return "duplicate", f"the same prompt as {there}{same_id}; drop one"
        return "conflict", f"the same prompt as {there}{same_id}, with another answer; keep the right one"
    if known_id is not place:
        return _finding(used_id(row, prompt.id, known_id), row)
    nearly = seen.nearly.setdefault(
        digest(" ".join(token for token in TOKEN.findall(asked) if token not in FILLER)), place
    )
    if nearly is not place:
        there = f"line {nearly.number}" if nearly.path == row.path else nearly.where
        _add(report.warnings, row, ("near", f"nearly the question of {there}; drop one if they are the same"))
    return None


def _denied(
    row: Row, prompt: Prompt, verifier: str | None, labels: list[str], seen: _Seen
) -> check_text.TextFinding:
    """A solution that ends on another answer than the row's. What cannot be told here is left to
    _judge_habits and _judge_doubts.
    """
    if labels and verifier in (None, "multiple_choice"):
        _note_habit(
            seen,
            row,
            "options",
            prompt.answer.strip() in labels,
            "answer",
            "is none of the options that its prompt lists, unlike the file's others",
        )
    elif verifier in (None, "math"):
        keeps = check_answer.number(prompt.answer) is not None or (
            None if MATHS.search(prompt.answer) else False
        )
        message = (
            f'"answer" is {short(prompt.answer)}, and nearly all others of the file are numbers; correct it'
        )
        _note_habit(seen, row, "numbers", keeps, "answer", message)
    if prompt.solution is None or verifier in ("code", "tool_use"):
        return None
    ends_on, broken = check_answer.stated_answer(prompt.solution)
    if broken:
        return "solution", f'"solution" {broken}; correct it'
    if ends_on is None:
        gold, last = check_answer.number(prompt.answer), check_answer.last_number(prompt.solution)
        if gold is not None and last is not None:
            message = (
                f'"solution" ends on {short(str(last))}, and "answer" is'
                f" {short(prompt.answer)}; correct one of them"
            )
            _note_habit(seen, row, "last number", gold == last, "solution", message)
        return None
    mine, other = check_answer.normal(prompt.answer), check_answer.normal(ends_on)
    if mine.casefold() == other.casefold():
        return None
    numbers = check_answer.number(mine), check_answer.number(other)
    letters = len(mine) == len(other) == 1 and mine.isalpha() and other.isalpha() and mine in labels
    if (None not in numbers and numbers[0] != numbers[1]) or letters:
        return (
            "solution",
            (
                f'"solution" ends on {short(ends_on)}, and "answer" is'
                f" {short(prompt.answer)}; correct one of them"
            ),
        )
    if None in numbers and not labels:
        seen.doubts.append((Row(row.path, row.number, None), prompt.answer, ends_on))
    return None


def _note_habit(seen: _Seen, row: Row, habit: str, keeps: bool | None, kind: str, message: str) -> None:
    """Whether the row keeps the habit; None: it does not, and is no fault for that."""
    seen.habits[habit, "rows"] += 1
    seen.habits[habit, "kept"] += bool(keeps)
    if keeps is False:
        seen.breaches.setdefault(habit, []).append((Row(row.path, row.number, None), kind, message))


def _judge_habits(report: CheckReport, seen: _Seen) -> None:
    """Rows that break what nearly all of the file does."""
    named = {(fault.file, fault.line) for fault in report.errors}
    for habit, breaches in seen.breaches.items():
        rows, kept = seen.habits[habit, "rows"], seen.habits[habit, "kept"]
        if rows >= HABIT_ROWS and kept >= HABIT_SHARE * rows:
            for row, kind, message in breaches:
                if (str(row.path), row.number) not in named:
                    named.add((str(row.path), row.number))
                    _add(report.errors, row, (kind, message))


def _judge_doubts(report: CheckReport, seen: _Seen) -> None:
    """Answers and ends of solutions that differ as texts, held against each other by math-verify."""
    if not seen.doubts:
        return
    from megasd.rewards.reward_pool import RewardPool

    groups = []
    for i, (_, answer, ends_on) in enumerate(seen.doubts):
        sample = Sample(str(i), 0, [], [], [], f"\\boxed{{{ends_on}}}", "stop", 0)
        groups.append(Group(Prompt(str(i), [], answer), [sample]))
    with RewardPool(RewardConfig(verifier="math", workers=2, timeout=3.0)) as pool:
        pool.score(groups)
    for (row, answer, ends_on), group in zip(seen.doubts, groups, strict=True):
        verdict = group.samples[0].verdict
        said = f'"solution" ends on {short(ends_on)}, and "answer" is {short(answer)}'
        if verdict is Verdict.WRONG:
            _add(report.errors, row, ("solution", f"{said}; correct one of them"))
        elif verdict is not Verdict.RIGHT:
            _add(report.warnings, row, ("solution", f"{said}; they could not be compared"))
