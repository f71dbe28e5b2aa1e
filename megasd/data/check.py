"""`megasd data check` without its printing: finds what is wrong with the rows of a data file.

    report = check_file("train.jsonl")
    # [Fault("train.jsonl", 17, "conflict", "same prompt as line 3, with another answer ...")]
    report.errors

Every row is checked, and every bad row is named by file and line. A row has at most one error: when
it is mended, the next error shows. The kinds of errors:

    file json encoding blank size type     the row cannot be read, or holds damaged text
    key columns missing empty messages     the row is no prompt: names, types, texts, turns,
    role field                             pass_rate, rubric
    id duplicate conflict                  an earlier row has the id; or the prompt, with the same or
                                           with another answer
    leak                                   the held-out file asks the same question
    length template                        the prompt has too many tokens; the chat template refuses it
    answer shown solution                  no verifier can read the answer; the prompt gives the answer
                                           away; the solution ends on another answer

data/same_text.py says when two prompts are the same. Of two rows, the later row is named. Warnings:
nearly the same question (only punctuation, spacing or words such as "please compute" differ), and a
solution that math-verify could not compare.

Rows are read one at a time. Digests of 16 bytes are kept of prompts. Plain Python; worker processes
of the verifier compare answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megasd.config.schema import RewardConfig
from megasd.data import check_answer, check_text
from megasd.data.check_text import TextFinding
from megasd.data.columns import MAPPINGS
from megasd.data.prompts import no_solution, read_prompts, used_id
from megasd.data.rows import DataError, Place, Row, row_files, short
from megasd.data.same_text import digest, nearly_digest, prompt_digest, question_of
from megasd.types import Group, Message, Prompt, Sample, UserError, Verdict

# A habit of the file, such as solutions that end on the answer, is a rule when this fraction of the
# rows keeps it, and at least this number of rows.
HABIT_FRACTION, HABIT_ROWS = 0.95, 20
# An answer without any of these characters is words.
MATHS = re.compile(r"[\d\\$^=<>|{}]")
# No tokenizer has so many characters a token on text. Used without a tokenizer.
CHARACTERS_A_TOKEN = 8


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong with a row. `line`: its line or row number, from 1."""

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
    """What the rows of a file must keep.

    `prompt_length` and `text_length` measure the messages and the solution of a row, in `unit`. A
    UserError of `prompt_length` is an error of the row (kind template). `verifier` reads the answers;
    None: the verifier of the mapping, or, for auto, only what holds for all verifiers.
    """

    mapping: str = "auto"
    max_row_bytes: int = 262144
    require_solution: bool = False
    verifier: str | None = None
    # report of the evaluation file, whose questions may not occur
    held_out: CheckReport | None = None
    prompt_length: Callable[[list[Message]], int] = count_characters
    text_length: Callable[[str], int] = len
    # in `unit`; None: no limit
    max_prompt_length: int | None = None
    unit: str = "characters"


@dataclass
class CheckReport:
    """What a check found."""

    path: str
    unit: str
    rows: int = 0
    prompts: int = 0
    # prompts that the rules of the mapping leave out
    left_out: int = 0
    errors: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    # in `unit`, of each prompt that reads and repeats no earlier prompt
    lengths: list[int] = field(default_factory=list)
    solution_lengths: list[int] = field(default_factory=list)
    # the first good prompts
    shown: list[Prompt] = field(default_factory=list)
    # digest of a question -> row, for leaks into another file
    questions: dict[bytes, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _KnownPrompt:
    """An earlier row with a prompt, and its answer in the spelling of check_answer.normal."""

    place: Place
    answer: str
    id: str


@dataclass(frozen=True)
class _Doubt:
    """An answer and the end of its solution, which differ as texts."""

    place: Place
    answer: str
    ends_on: str


def check_file(path: str | Path, rules: CheckRules | None = None, *, num_shown: int = 2) -> CheckReport:
    """Check every row of a file or directory. DataError: no such file or mapping.

    `num_shown`: how many good prompts the report keeps.
    """
    return _FileCheck(path, rules or CheckRules(), num_shown).run()


class _FileCheck:
    """One check of one file: the rules, the report, and what earlier rows held."""

    def __init__(self, path: str | Path, rules: CheckRules, num_shown: int) -> None:
        self.path, self.rules, self.num_shown = path, rules, num_shown
        self.report = CheckReport(str(path), rules.unit)
        # Of earlier rows: id -> row, digest of a prompt -> row, nearly_digest of a question -> row.
        self.ids: dict[str, Place] = {}
        self.known: dict[bytes, _KnownPrompt] = {}
        self.nearly: dict[bytes, Place] = {}
        self.doubts: list[_Doubt] = []
        # habit -> rows that could keep it; habit -> rows that keep it
        self.habit_rows: Counter[str] = Counter()
        self.habit_kept: Counter[str] = Counter()
        # habit -> the rows that break it, with what to say of them
        self.breaches: dict[str, list[tuple[Place, tuple[str, str]]]] = {}

    def run(self) -> CheckReport:
        """Check every row, then what can be told only of the whole file."""
        report, rules = self.report, self.rules
        files = row_files(self.path)
        last = Place(files[0][0], 0)
        try:
            rows = read_prompts(self.path, max_row_bytes=rules.max_row_bytes, mapping=rules.mapping)
            for row, found in rows:
                last = row.place
                report.rows += 1
                if isinstance(found, DataError):
                    _add(report.errors, row, _finding(found, row))
                else:
                    self._judge_row(row, found)
        except DataError as error:
            if rules.mapping not in MAPPINGS:
                raise
            _add(report.errors, Place(last.path, last.number + 1), ("file", str(error)))
        if not report.rows and not report.errors:
            _add(report.errors, Place(last.path, 1), ("file", "no rows; write one JSON object per line"))
        self._judge_habits()
        self._judge_doubts()
        order = {str(file): i for i, (file, _) in enumerate(files)}
        for faults in (report.errors, report.warnings):
            faults.sort(key=lambda fault: (order[fault.file], fault.line))
        return report

    def _judge_row(self, row: Row, prompts: list[Prompt | None]) -> None:
        """Report the first thing that is wrong with the prompts of a row; show good prompts."""
        report, findings = self.report, [self._judge(row, prompt) for prompt in prompts]
        good = [p for p, finding in zip(prompts, findings, strict=True) if p is not None and finding is None]
        report.shown += good[: max(0, self.num_shown - len(report.shown))]
        _add(report.errors, row, next((finding for finding in findings if finding), None))

    def _judge(self, row: Row, prompt: Prompt | None) -> TextFinding:
        """The first thing that is wrong with a prompt; None also for a prompt that is left out."""
        rules = self.rules
        if prompt is None or (MAPPINGS[rules.mapping].drops_repeats and self._is_known_repeat(prompt)):
            self.report.left_out += 1
            return None
        self.report.prompts += 1
        finding = check_text.damaged_text(prompt) or check_text.odd_turns(prompt)
        if finding is None and rules.require_solution and prompt.solution is None:
            finding = _finding(no_solution(row), row)
        finding = finding or self._repeated(row, prompt) or self._measured(prompt)
        if finding is not None:
            return finding
        verifier = rules.verifier or MAPPINGS[rules.mapping].verifier
        values = None if isinstance(row.values, DataError) else row.values
        labels = check_answer.options(prompt) or check_answer.listed_options(values)
        finding = check_answer.unreadable_answer(prompt, verifier, labels)
        finding = finding or check_answer.shown_answer(prompt)
        if finding is not None:
            return finding
        self._note_answer(row, prompt, verifier, labels)
        if prompt.solution is None or verifier in ("code", "tool_use"):
            return None
        return self._denied(row, prompt, prompt.solution, labels)

    def _measured(self, prompt: Prompt) -> TextFinding:
        """Note the lengths of a prompt and its solution; the finding of a prompt that is too long."""
        rules = self.rules
        try:
            length = rules.prompt_length(prompt.messages)
        except UserError as error:
            return "template", str(error)
        self.report.lengths.append(length)
        if prompt.solution is not None:
            self.report.solution_lengths.append(rules.text_length(prompt.solution))
        if rules.max_prompt_length is None or length <= rules.max_prompt_length:
            return None
        what = "raise rollout.max_prompt_tokens or drop the row"
        if rules.unit != "tokens":
            what = (
                f"rollout.max_prompt_tokens={rules.max_prompt_length // CHARACTERS_A_TOKEN} cannot hold them;"
                " count with --model DIR"
            )
        return "length", f"{length} prompt {rules.unit}, more than {rules.max_prompt_length}; {what}"

    def _is_known_repeat(self, prompt: Prompt) -> bool:
        known = self.known.get(prompt_digest(prompt.messages))
        answer = check_answer.normal(prompt.answer)
        return known is not None and (known.answer, known.id) == (answer, prompt.id)

    def _repeated(self, row: Row, prompt: Prompt) -> TextFinding:
        """What this row shares with an earlier row or with the held-out file.

        The row becomes one of the earlier rows.
        """
        place, report, held_out = row.place, self.report, self.rules.held_out
        text = question_of(prompt.messages)
        question = digest(text)
        report.questions.setdefault(question, row.where)
        known_id = self.ids.setdefault(prompt.id, place)
        mine = _KnownPrompt(place, check_answer.normal(prompt.answer), prompt.id)
        known = self.known.setdefault(prompt_digest(prompt.messages), mine)
        if held_out is not None and question in held_out.questions:
            there = held_out.questions[question]
            message = f"the same question as {there}, which is held out; take it out of one of the two files"
            return "leak", message
        if known is not mine:
            there = _there(known.place, row)
            same_id = ", and the same id" if known_id is not place else ""
            if mine.answer == known.answer:
                return "duplicate", f"the same prompt as {there}{same_id}; drop one"
            return "conflict", f"the same prompt as {there}{same_id}, with another answer; keep the right one"
        if known_id is not place:
            return _finding(used_id(row, prompt.id, known_id), row)
        nearly = self.nearly.setdefault(nearly_digest(text), place)
        if nearly is not place:
            message = f"nearly the question of {_there(nearly, row)}; drop one if they are the same"
            _add(report.warnings, row, ("near", message))
        return None

    def _note_answer(self, row: Row, prompt: Prompt, verifier: str | None, labels: list[str]) -> None:
        """Note whether the answer is an option, or a number, as nearly all answers of the file may be."""
        answer = prompt.answer
        if labels and verifier in (None, "multiple_choice"):
            message = "is none of the options that its prompt lists, unlike the file's others"
            self._note_habit(row, "options", answer.strip() in labels, ("answer", message))
        elif verifier in (None, "math"):
            is_number = check_answer.number(answer) is not None
            # An answer with mathematics in it is no number, and no fault for that.
            keeps = is_number or (None if MATHS.search(answer) else False)
            message = (
                f'"answer" is {short(answer)}, and nearly all others of the file are numbers; correct it'
            )
            self._note_habit(row, "numbers", keeps, ("answer", message))

    def _denied(self, row: Row, prompt: Prompt, solution: str, labels: list[str]) -> TextFinding:
        """The finding of a solution that ends on another answer than the answer of the row.

        _judge_habits and _judge_doubts decide what cannot be told here.
        """
        ends_on, broken = check_answer.stated_answer(solution)
        if broken:
            return "solution", f'"solution" {broken}; correct it'
        if ends_on is None:
            gold, last = check_answer.number(prompt.answer), check_answer.last_number(solution)
            if gold is not None and last is not None:
                finding = "solution", f"{_ends_on(str(last), prompt.answer)}; correct one of them"
                self._note_habit(row, "last number", gold == last, finding)
            return None
        mine, other = check_answer.normal(prompt.answer), check_answer.normal(ends_on)
        if mine.casefold() == other.casefold():
            return None
        numbers = check_answer.number(mine), check_answer.number(other)
        letters = len(mine) == len(other) == 1 and mine.isalpha() and other.isalpha() and mine in labels
        if (None not in numbers and numbers[0] != numbers[1]) or letters:
            return "solution", f"{_ends_on(ends_on, prompt.answer)}; correct one of them"
        if None in numbers and not labels:
            self.doubts.append(_Doubt(row.place, prompt.answer, ends_on))
        return None

    def _note_habit(self, row: Row, habit: str, keeps: bool | None, finding: tuple[str, str]) -> None:
        """Note whether the row keeps a habit; None: it does not keep the habit, and that is no fault."""
        self.habit_rows[habit] += 1
        self.habit_kept[habit] += bool(keeps)
        if keeps is False:
            self.breaches.setdefault(habit, []).append((row.place, finding))

    def _judge_habits(self) -> None:
        """Report rows that break a habit that nearly all rows of the file keep."""
        named = {(fault.file, fault.line) for fault in self.report.errors}
        for habit, breaches in self.breaches.items():
            rows, kept = self.habit_rows[habit], self.habit_kept[habit]
            if rows >= HABIT_ROWS and kept >= HABIT_FRACTION * rows:
                for place, finding in breaches:
                    if (str(place.path), place.number) not in named:
                        named.add((str(place.path), place.number))
                        _add(self.report.errors, place, finding)

    def _judge_doubts(self) -> None:
        """Let math-verify compare answers with ends of solutions that differ as texts."""
        if not self.doubts:
            return
        from megasd.rewards.reward_pool import RewardPool

        groups = []
        for i, doubt in enumerate(self.doubts):
            sample = Sample(str(i), 0, [], [], [], f"\\boxed{{{doubt.ends_on}}}", "stop", 0)
            groups.append(Group(Prompt(str(i), [], doubt.answer), [sample]))
        with RewardPool(RewardConfig(verifier="math", workers=2, timeout=3.0)) as pool:
            pool.score(groups)
        for doubt, group in zip(self.doubts, groups, strict=True):
            verdict = group.samples[0].verdict
            said = _ends_on(doubt.ends_on, doubt.answer)
            if verdict is Verdict.WRONG:
                _add(self.report.errors, doubt.place, ("solution", f"{said}; correct one of them"))
            elif verdict is not Verdict.RIGHT:
                _add(self.report.warnings, doubt.place, ("solution", f"{said}; they could not be compared"))


def _add(found: list[Fault], place: Place, finding: TextFinding) -> None:
    if finding is not None:
        found.append(Fault(str(place.path), place.number, *finding))


def _finding(error: DataError, row: Row) -> tuple[str, str]:
    return error.kind, str(error).removeprefix(f"{row.where}: ")


def _there(place: Place, row: Row) -> str:
    """How a message about `row` names another row."""
    return f"line {place.number}" if place.path == row.path else place.where


def _ends_on(end: str, answer: str) -> str:
    return f'"solution" ends on {short(end)}, and "answer" is {short(answer)}'
