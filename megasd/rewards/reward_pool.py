"""RewardPool: judges all samples of a step, with workers and sandboxes for checks that may hang.

math-verify and rubrics run in worker processes that are killed at a deadline, because sympy and
regular expressions can hang in C, where no signal reaches them. Programs run in sandboxes that are
killed likewise. All other comparisons are one linear pass over a string: they cannot hang, so they
run in this process, which saves a round trip a sample.

How an answer is read and compared is in the rows of rewards/verifiers.py.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from megasd.rewards import sandbox
from megasd.rewards.answers import after_thinking
from megasd.rewards.rubric import Judge
from megasd.rewards.verifier_row import (
    Judgement,
    PendingCheck,
    RewardSettings,
    SandboxCheck,
    WorkerCheck,
    WorkerReply,
    WorkerRequest,
)
from megasd.rewards.verifiers import find_verifier
from megasd.rewards.worker_pool import WorkerPool
from megasd.types import Group, Prompt, Sample, UserError, Verdict

# Failed checks logged a call. The details of all failed checks are in their samples.
MAX_LOGGED = 5

logger = logging.getLogger(__name__)


class CheckRunner(Protocol):
    """Carries out the checks of one verifier."""

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        ...

    @property
    def num_workers(self) -> int:
        """Worker processes that exist now."""
        ...

    def key(self, check: PendingCheck[Any]) -> tuple[str, str]:
        """Checks with equal keys have the same outcome and are carried out once."""
        ...

    def run(self, checks: list[PendingCheck[Any]]) -> list[Judgement]:
        """One judgement for each check, in order."""
        ...

    def close(self) -> None:
        """End all worker processes."""
        ...


class RewardPool:
    """Scores groups in place.

        with RewardPool(RewardConfig(verifier="math", workers=2, timeout=6.0)) as rewards:
            # {"right": 11.0, "wrong": 4.0, "error": 0.0, "timeout": 1.0, "restarts": 1.0}
            rewards.score(groups)

    `worker_command` replaces the worker program; tests give a program whose check hangs on request.
    `judge` replaces the rules of verifier=rubric. It runs in this process and keeps its own time.
    UserError: a config that cannot be, or verifier=code on a machine without a sandbox. Not
    thread-safe.
    """

    def __init__(
        self,
        config: RewardSettings,
        *,
        worker_command: Sequence[str] | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.config = config
        self.verifier = find_verifier(config.verifier)
        if config.workers < 1:
            raise UserError(f"reward.workers={config.workers}: must be at least 1")
        if config.timeout <= 0:
            raise UserError(f"reward.timeout={config.timeout}: must be more than 0 seconds")
        self.runner = _make_runner(self.verifier.check, config, worker_command, judge)

    def check_rows(self, prompts: list[Prompt]) -> None:
        """Raise UserError for the first row whose answer or rubric this verifier cannot read.

        Called before anything is sampled.
        """
        for prompt in prompts:
            self.verifier.read_gold(prompt, self.config)

    def score(self, groups: list[Group]) -> dict[str, float]:
        """Set verdict, detail, feedback and score of every sample.

        Returns the number of samples by verdict, and of worker restarts. ERROR (the check raised, or
        its worker died twice) and TIMEOUT leave the pass rates; each is logged with its row.
        """
        restarts_before = self.runner.restarts
        waiting: dict[tuple[str, str], tuple[PendingCheck[Any], list[Sample]]] = {}
        for sample, outcome in self._compare(groups):
            if isinstance(outcome, Judgement):
                _write(sample, outcome)
            else:
                waiting.setdefault(self.runner.key(outcome), (outcome, []))[1].append(sample)
        try:
            judgements = self.runner.run([check for check, _ in waiting.values()])
        except BaseException:
            # After an interrupt, a worker may still hold a check of this call: end it, so that its
            # reply does not meet the next call.
            self.close()
            raise
        for (_, samples), judgement in zip(waiting.values(), judgements, strict=True):
            for sample in samples:
                _write(sample, judgement)
        verdicts = [(sample, sample.verdict) for group in groups for sample in group.samples]
        _log_failed([(sample, verdict) for sample, verdict in verdicts if verdict and not verdict.counts])
        counts = Counter(verdict for _, verdict in verdicts)
        restarts = float(self.runner.restarts - restarts_before)
        return {verdict.value: float(counts[verdict]) for verdict in Verdict} | {"restarts": restarts}

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        self.runner.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, groups: list[Group]) -> Iterable[tuple[Sample, Judgement | PendingCheck[Any]]]:
        """Each sample with its judgement, or with the check that must decide."""
        for group in groups:
            try:
                gold = self.verifier.read_gold(group.prompt, self.config)
            except UserError as error:
                # nobody called check_rows
                for sample in group.samples:
                    yield sample, Judgement(Verdict.ERROR, str(error))
                continue
            for sample in group.samples:
                text = after_thinking(sample.text)
                answer = None if text is None else self.verifier.read_answer(text)
                if answer is None:
                    yield sample, self.verifier.no_answer
                else:
                    judgement = self.verifier.compare(answer, gold)
                    if judgement is None:
                        yield sample, PendingCheck(group.prompt, answer, gold)
                    else:
                        yield sample, judgement


def _write(sample: Sample, judgement: Judgement) -> None:
    sample.verdict, sample.detail = judgement.verdict, judgement.detail
    sample.feedback, sample.score = judgement.feedback, judgement.score


def _log_failed(failed: list[tuple[Sample, Verdict]]) -> None:
    for sample, verdict in failed[:MAX_LOGGED]:
        logger.warning(
            "row %s, sample %d: verifier %s: %s", sample.prompt_id, sample.index, verdict.value, sample.detail
        )
    if len(failed) > MAX_LOGGED:
        logger.warning("%d more checks failed; see the details in the rollout log", len(failed) - MAX_LOGGED)


# ---- runners ----


def _make_runner(
    check: WorkerCheck[Any] | SandboxCheck[Any] | None,
    config: RewardSettings,
    worker_command: Sequence[str] | None,
    judge: Judge | None,
) -> CheckRunner:
    if check is None:
        return NoRunner()
    if isinstance(check, SandboxCheck):
        return SandboxRunner(check, config)
    if judge is not None and check.accepts_judge:
        return JudgeRunner(check, config, judge)
    return WorkerRunner(check, config, worker_command or worker_program(check))


class NoRunner:
    """For verifiers whose comparison judges every answer."""

    restarts = num_workers = 0

    def key(self, check: PendingCheck[Any]) -> tuple[str, str]:
        """Never called: no check is pending."""
        raise AssertionError("a verifier without a check must compare every answer")

    def run(self, checks: list[PendingCheck[Any]]) -> list[Judgement]:
        """Nothing to do."""
        return []

    def close(self) -> None:
        """Nothing to end."""


class WorkerRunner:
    """Runs checks in worker processes, which the first check starts."""

    def __init__(self, check: WorkerCheck[Any], config: RewardSettings, command: Sequence[str]) -> None:
        self.check, self.config = check, config
        self.workers = WorkerPool([*command, str(config.timeout)], config.workers, config.timeout)
        self.key = check.key

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self.workers.restarts

    @property
    def num_workers(self) -> int:
        """Worker processes that exist now."""
        return len(self.workers.workers)

    def run(self, checks: list[PendingCheck[Any]]) -> list[Judgement]:
        """One judgement for each check, in order. UserError when workers do not start."""
        requests = [WorkerRequest(check.answer, self.check.gold_text(check.gold)) for check in checks]
        replies = self.workers.run(requests)
        return [
            self.check.conclude(request, reply, self.config)
            for request, reply in zip(requests, replies, strict=True)
        ]

    def close(self) -> None:
        """End all worker processes."""
        self.workers.close()


class SandboxRunner:
    """Runs programs in sandboxes, config.workers at once. UserError: this machine offers no sandbox."""

    restarts = num_workers = 0

    def __init__(self, check: SandboxCheck[Any], config: RewardSettings) -> None:
        sandbox.find_kind()
        self.check, self.config = check, config
        self.key = check.key

    def run(self, checks: list[PendingCheck[Any]]) -> list[Judgement]:
        """One judgement for each program, in order."""
        # each thread waits for a sandbox
        with ThreadPoolExecutor(self.config.workers) as threads:
            try:
                return list(threads.map(self._run_program, checks))
            finally:
                threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Nothing to end: a sandbox lives no longer than its check."""

    def _run_program(self, check: PendingCheck[Any]) -> Judgement:
        try:
            return self.check.check(check.answer, check.gold, self.config)
        except Exception as error:
            # a fault of the machine: no file handles, no memory, no room in /tmp
            return Judgement(Verdict.ERROR, f"{type(error).__name__}: {error}")


class JudgeRunner:
    """Asks a Judge in this process."""

    restarts = num_workers = 0

    def __init__(self, check: WorkerCheck[Any], config: RewardSettings, judge: Judge) -> None:
        self.check, self.config, self.judge = check, config, judge
        self.key = check.key

    def run(self, checks: list[PendingCheck[Any]]) -> list[Judgement]:
        """One judgement for each response, in order."""
        return [
            self.check.conclude(
                WorkerRequest(check.answer, self.check.gold_text(check.gold)), self._ask(check), self.config
            )
            for check in checks
        ]

    def close(self) -> None:
        """Nothing to end."""

    def _ask(self, check: PendingCheck[Any]) -> WorkerReply:
        try:
            criteria = self.judge.judge(check.prompt, check.answer)
            return WorkerReply(Verdict.RIGHT, result=[(*pair, "") for pair in criteria])
        except Exception as error:
            # a judge may be anything, and a failed judgement is no wrong answer
            return WorkerReply(Verdict.ERROR, f"judge: {type(error).__name__}: {error}")


def worker_program(check: WorkerCheck[Any]) -> list[str]:
    """The command of a worker, but for its last argument, the timeout (rewards/worker.py)."""
    names = [_name(check.check)] if check.prepare is None else [_name(check.check), _name(check.prepare)]
    return [sys.executable, "-X", "utf8", "-m", "megasd.rewards.worker", *names]


def _name(function: Callable[..., object]) -> str:
    return f"{function.__module__}:{function.__qualname__}"
