"""Verifiers: from a response's text and the gold answer to a verdict; 1 or 0, or no verdict at all
when the check itself failed.

All read the text after the last </think>; a response that never closes its <think> has no answer
and is wrong.

    math             the last \\boxed{...}, compared by math-verify. No box, or one that is cut off: wrong.
    exact_match      the whole text, stripped, equals the gold answer, stripped.
    multiple_choice  the text after the last <answer>, up to </answer>, stripped, equals the gold
                     letter (SDPO's rule). Without the tag: the
                     last capital A-H or J that stands alone ("(C)", "**C**", "C."; not in "C-H", "He", "A's"; I is a pronoun). A task with
                     more options, or with an article "A" after its answer, should ask for the tag.
    tool_use         the names and arguments of all tool calls (rewards/tool_use.py).
    code             the last fenced program passes all tests of the row, run in a sandbox (rewards/code.py).
    rubric           the weighted share of criteria met is the sample's score; right from
                     reward.rubric_threshold on (rewards/rubric.py).

math-verify and rubrics run in worker processes that are killed at a deadline, because sympy and
regular expressions can hang in C, where no signal reaches them; programs run in sandboxes that are
killed likewise. The others are one linear pass over a string: they cannot hang, so they run here,
which saves a round trip a sample.

`sample.feedback` says what is wrong with a wrong answer, in words for the model, and never what was
expected.
"""  # noqa: E501

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megasd.config.schema import RewardConfig
from megasd.rewards import code as code_task
from megasd.rewards import rubric, sandbox, tool_use
from megasd.rewards.worker_pool import VerifierTask, WorkerPool
from megasd.types import Group, Prompt, Sample, UserError, Verdict

VERIFIERS = ("math", "exact_match", "multiple_choice", "tool_use", "code", "rubric")
# a longer "final answer" is not checked: parsing LaTeX takes time that grows with its square
MAX_ANSWER_CHARACTERS = 4096
# failed checks logged a call; all of them carry their detail in the sample
MAX_LOGGED = 5
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
LETTER = re.compile(r"(?<![\w'’-])([A-HJ])(?![\w'’-])")
# feedback to a response without a final answer
NO_ANSWER = {
    "math": "No \\boxed{} answer was found.",
    "exact_match": "No answer was found after the thinking.",
    "multiple_choice": "No chosen option was found.",
    "tool_use": f"The tool call is wrong: {tool_use.NO_CALL}.",
    "code": "No complete fenced code block was found.",
    "rubric": "No answer was found after the thinking.",
}
WRONG_ANSWER = {
    "math": "The final answer is not equal to the reference.",
    "exact_match": "The answer is not the expected text.",
    "multiple_choice": "The chosen option is not the right one.",
}

logger = logging.getLogger(__name__)


def extract_answer(verifier: str, text: str) -> str | None:
    """The final answer of a response as the verifier reads it, stripped; None when there is none.
    Also the vote of maj@k.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if verifier == "math":
        return last_boxed(text)
    if verifier in ("exact_match", "rubric"):
        return text.strip()
    if verifier == "multiple_choice":
        start = text.rfind("<answer>")
        if start >= 0:
            return ANSWER_TAG.match(text, start)[1].strip()
        letters = LETTER.findall(text)
        return letters[-1] if letters else None
    if verifier == "tool_use":
        calls = tool_use.parse_calls(text)
        return None if calls is None else tool_use.canonical(calls)
    if verifier == "code":
        return code_task.last_code_block(text)
    raise UserError(f"reward.verifier: {verifier!r} is not one of {', '.join(VERIFIERS)}")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces matched; None without one or when it never closes
    (an earlier box does not stand in).
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


class RewardPool:
    """Scores groups in place.

        with RewardPool(RewardConfig(verifier="math", workers=2, timeout=6.0)) as rewards:
            # {"right": 11.0, "wrong": 4.0, "error": 0.0, "timeout": 1.0, "restarts": 1.0}
            rewards.score(groups)

    `worker_command` replaces the worker program; tests give one whose check hangs on request.
    `judge` replaces the rules of verifier=rubric; it runs in this process and keeps its own time.
    UserError: a config that cannot be, or verifier=code on a machine without a sandbox. Not
    thread-safe.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        worker_command: Sequence[str] | None = None,
        judge: rubric.Judge | None = None,
    ) -> None:
        if config.verifier not in VERIFIERS:
            raise UserError(f"reward.verifier: {config.verifier!r} is not one of {', '.join(VERIFIERS)}")
        if config.workers < 1:
            raise UserError(f"reward.workers={config.workers}: must be at least 1")
        if config.timeout <= 0:
            raise UserError(f"reward.timeout={config.timeout}: must be more than 0 seconds")
        if config.verifier == "code":
            sandbox.find_kind()
        self.config, self.judge = config, judge
        command = worker_command or (
            sys.executable,
            "-X",
            "utf8",
            "-m",
            "megasd.rewards.worker",
            config.verifier,
        )
        # started by the first check
        self.workers = WorkerPool([*command, str(config.timeout)], config.workers, config.timeout)
        queues = {"tool_use": self._compare_calls, "code": self._queue_program, "rubric": self._queue_rubric}
        self._look: Callable[[Sample, str, Any, _Jobs], None] = queues.get(config.verifier, self._compare)

    def check_rows(self, prompts: list[Prompt]) -> None:
        """UserError for the first row whose answer or rubric this verifier cannot read: before
        anything is sampled.
        """
        for prompt in prompts:
            self._gold(prompt)

    def score(self, groups: list[Group]) -> dict[str, float]:
        """Set verdict, detail, feedback and score of every sample. Returns the number of samples by
        verdict, and of worker restarts.

        ERROR (the check raised, or its worker died twice) and TIMEOUT leave the pass rates; each is
        logged with its row.
        """
        restarts_before = self.workers.restarts
        jobs: _Jobs = {}
        for group in groups:
            self._look_at(group, jobs)
        try:
            self._run(list(jobs.values()))
        except BaseException:
            # an interrupt leaves no half-asked question behind for the next call
            self.close()
            raise
        for job in jobs.values():
            self._finish(job)
        failed = [sample for group in groups for sample in group.samples if not sample.verdict.counts]
        for sample in failed[:MAX_LOGGED]:
            logger.warning(
                "row %s, sample %d: verifier %s: %s",
                sample.prompt_id,
                sample.index,
                sample.verdict.value,
                sample.detail,
            )
        if len(failed) > MAX_LOGGED:
            logger.warning(
                "%d more checks failed; see the details in the rollout log", len(failed) - MAX_LOGGED
            )
        counts = Counter(sample.verdict.value for group in groups for sample in group.samples)
        restarts = float(self.workers.restarts - restarts_before)
        return {verdict.value: float(counts[verdict.value]) for verdict in Verdict} | {"restarts": restarts}

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        self.workers.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gold(self, prompt: Prompt) -> Any:
        """What the verifier compares with, in its own form. UserError naming the row."""
        verifier, answer = self.config.verifier, prompt.answer.strip()
        if verifier == "math":
            return last_boxed(answer) or answer
        if verifier == "tool_use":
            return tool_use.parse_gold(answer, prompt.id)
        if verifier == "code":
            return code_task.parse_tests(answer, prompt.id, self.config.timeout)
        if verifier == "rubric":
            rubric.check_rubric(prompt)
            return prompt
        return answer

    def _look_at(self, group: Group, jobs: _Jobs) -> None:
        """Settle what needs no job, and put the rest into jobs."""
        try:
            gold, reason = self._gold(group.prompt), ""
        except UserError as error:
            # check_rows was not asked
            gold, reason = None, str(error)
        for sample in group.samples:
            sample.detail, sample.feedback, sample.score = "", "", None
            answer = None if reason else extract_answer(self.config.verifier, sample.text)
            if reason:
                sample.verdict, sample.detail = Verdict.ERROR, reason
            elif answer is None:
                sample.verdict, sample.feedback = Verdict.WRONG, NO_ANSWER[self.config.verifier]
                sample.score = 0.0 if self.config.verifier == "rubric" else None
            else:
                self._look(sample, answer, gold, jobs)

    def _compare(self, sample: Sample, answer: str, gold: str, jobs: _Jobs) -> None:
        if answer == gold:
            sample.verdict = Verdict.RIGHT
        elif self.config.verifier != "math" or not answer:
            sample.verdict, sample.feedback = Verdict.WRONG, WRONG_ANSWER[self.config.verifier]
        elif max(len(answer), len(gold)) > MAX_ANSWER_CHARACTERS:
            which = "gold answer" if len(gold) > MAX_ANSWER_CHARACTERS else "answer"
            sample.verdict, sample.detail = (
                Verdict.ERROR,
                f"the {which} has more than {MAX_ANSWER_CHARACTERS} characters",
            )
        else:
            jobs.setdefault((answer, gold), VerifierTask(answer, gold)).samples.append(sample)

    def _compare_calls(self, sample: Sample, answer: str, gold: tool_use.Calls, jobs: _Jobs) -> None:
        wrong = tool_use.compare_calls(tool_use.parse_calls(sample.text.rpartition("</think>")[2]), gold)
        sample.verdict = Verdict.WRONG if wrong else Verdict.RIGHT
        sample.feedback = f"The tool call is wrong: {wrong}." if wrong else ""

    def _queue_program(self, sample: Sample, answer: str, gold: code_task.Tests, jobs: _Jobs) -> None:
        job = jobs.setdefault((sample.prompt_id, answer), VerifierTask(answer, ""))
        job.result = gold
        job.samples.append(sample)

    def _queue_rubric(self, sample: Sample, answer: str, gold: Prompt, jobs: _Jobs) -> None:
        rows = json.dumps([gold.id, gold.answer, gold.solution, gold.rubric])
        job = jobs.setdefault((answer, rows), VerifierTask(answer, rows))
        job.result = gold
        job.samples.append(sample)

    def _run(self, jobs: list[VerifierTask]) -> None:
        if self.config.verifier == "code":
            # each waits for a sandbox
            with ThreadPoolExecutor(self.config.workers) as threads:
                try:
                    list(threads.map(self._run_program, jobs))
                finally:
                    threads.shutdown(cancel_futures=True)
        elif self.config.verifier == "rubric" and self.judge is not None:
            for job in jobs:
                self._ask_judge(job)
        else:
            self.workers.run(jobs)

    def _run_program(self, job: VerifierTask) -> None:
        limits = sandbox.Limits(memory_bytes=self.config.code_memory_mib << 20)
        try:
            verdict, detail, feedback = code_task.check_code(
                job.answer, job.result, total_seconds=self.config.code_seconds, limits=limits
            )
        except Exception as error:
            # the machine's: no file handles, no memory, no room in /tmp
            verdict, detail, feedback = Verdict.ERROR, f"{type(error).__name__}: {error}", ""
        job.settle(verdict, detail, feedback)

    def _ask_judge(self, job: VerifierTask) -> None:
        try:
            job.settle(Verdict.RIGHT, "", [(*pair, "") for pair in self.judge.judge(job.result, job.answer)])
        except Exception as error:
            # a judge may be anything, and a failed judgement is no wrong answer
            job.settle(Verdict.ERROR, f"judge: {type(error).__name__}: {error}")

    def _finish(self, job: VerifierTask) -> None:
        """The job's outcome, in each of its samples."""
        verdict, detail, score, feedback = job.verdict, job.detail, None, ""
        if self.config.verifier == "rubric" and verdict.counts:
            verdict, detail, score, feedback = self._grade(job.result)
        elif self.config.verifier == "code":
            feedback = job.result
        elif verdict is Verdict.WRONG:
            feedback = WRONG_ANSWER[self.config.verifier]
        if not verdict.counts and self.config.verifier == "math":
            detail = f"{detail}; answer {job.answer[:200]!r}, gold {job.gold[:200]!r}"
        for sample in job.samples:
            sample.verdict, sample.detail, sample.score, sample.feedback = (
                verdict,
                detail,
                score,
                feedback or "",
            )

    def _grade(self, criteria: list[tuple[float, float, str]]) -> tuple[Verdict, str, float | None, str]:
        """(verdict, detail, score, feedback) of judged criteria (weight, value, name)."""
        try:
            score = rubric.score([(weight, value) for weight, value, _ in criteria])
        except (ValueError, TypeError) as error:
            return Verdict.ERROR, f"judge: {error}", None, ""
        if score >= self.config.rubric_threshold:
            return Verdict.RIGHT, "", score, ""
        missed = [name for _, value, name in sorted(criteria, key=lambda row: -row[0]) if value < 1 and name]
        named = ", ".join(dict.fromkeys(missed[: rubric.MAX_SHOWN]))
        return (
            Verdict.WRONG,
            "",
            score,
            f"The response does not meet enough of the criteria{f' (among them: {named})' if named else ''}.",
        )


_Jobs = dict[tuple[str, str], VerifierTask]
