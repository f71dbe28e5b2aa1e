"""Verifiers: from a response's text and the gold answer to a verdict; 1 or 0, or no verdict at all when the check itself failed.

All read the text after the last </think>; a response that never closes its <think> has no answer and is wrong.

    math             the last \\boxed{...}, compared by math-verify. No box, or one that is cut off: wrong.
    exact_match      the whole text, stripped, equals the gold answer, stripped.
    multiple_choice  the text after the last <answer>, up to </answer>, stripped, equals the gold letter (SDPO's rule). Without the tag: the
                     last capital A-H or J that stands alone ("(C)", "**C**", "C."; not in "C-H", "He", "A's"; I is a pronoun). A task with
                     more options, or with an article "A" after its answer, should ask for the tag.

math-verify runs in worker processes that are killed at a deadline, because sympy can hang, and in C, where no signal reaches it. The two
others are one linear pass over a string: they cannot hang, so they run here, which saves a round trip a sample.
"""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from megasd.config import RewardConfig
from megasd.data.verify_worker import GRACE
from megasd.types import Group, Sample, UserError, Verdict

VERIFIERS = ("math", "exact_match", "multiple_choice")
MAX_ANSWER_CHARACTERS = 4096  # a longer "final answer" is none; also keeps a request below the 64 KiB of a pipe, so a send cannot block
START_TIMEOUT = 120.0  # seconds; sympy imports slowly on a busy machine
MAX_FAILED_STARTS = 3  # in a row
MAX_LOGGED = 5  # failed checks logged a call; all of them carry their detail in the sample
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
LETTER = re.compile(r"(?<![\w'’-])([A-HJ])(?![\w'’-])")

logger = logging.getLogger(__name__)


def extract_answer(verifier: str, text: str) -> str | None:
    """The final answer of a response as the verifier reads it, stripped; None when there is none. Also the vote of maj@k."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if verifier == "math":
        return last_boxed(text)
    if verifier == "exact_match":
        return text.strip()
    if verifier == "multiple_choice":
        start = text.rfind("<answer>")
        if start >= 0:
            return ANSWER_TAG.match(text, start)[1].strip()
        letters = LETTER.findall(text)
        return letters[-1] if letters else None
    raise UserError(f"reward.verifier: {verifier!r} is not one of {', '.join(VERIFIERS)}")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces matched; None without one or when it never closes (an earlier box does not stand in)."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = position = start + len("\\boxed{")
    depth = 1
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are no braces
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[begin:position].strip()
        position += 1
    return None


@dataclass
class _Job:
    """One comparison, for every sample that gave this answer to this gold answer."""

    answer: str
    gold: str
    samples: list[Sample]
    attempts: int = 0


class RewardPool:
    """Scores groups in place.

        with RewardPool(RewardConfig(verifier="math", workers=2, timeout=6.0)) as rewards:
            rewards.score(groups)    # {"right": 11.0, "wrong": 4.0, "error": 0.0, "timeout": 1.0, "restarts": 1.0}

    `worker_command` replaces the worker program; tests give one whose check hangs on request. Not thread-safe.
    """

    def __init__(self, config: RewardConfig, *, worker_command: Sequence[str] | None = None) -> None:
        if config.verifier not in VERIFIERS:
            raise UserError(f"reward.verifier: {config.verifier!r} is not one of {', '.join(VERIFIERS)}")
        if config.workers < 1:
            raise UserError(f"reward.workers={config.workers}: must be at least 1")
        if config.timeout <= 0:
            raise UserError(f"reward.timeout={config.timeout}: must be more than 0 seconds")
        self.config = config
        self._command = list(worker_command or (sys.executable, "-X", "utf8", "-m", "megasd.data.verify_worker")) + [str(config.timeout)]
        self._workers: list[_Worker] = []  # started by the first check that needs one
        self._restarts = 0

    def score(self, groups: list[Group]) -> dict[str, float]:
        """Set verdict and detail of every sample. Returns the number of samples by verdict, and of worker restarts.

        ERROR (the check raised, or its worker died twice) and TIMEOUT leave the pass rates; each is logged with its row.
        """
        restarts_before = self._restarts
        jobs: dict[tuple[str, str], _Job] = {}
        for group in groups:
            gold = self._gold(group)
            for sample in group.samples:
                self._score_or_queue(sample, gold, jobs)
        try:
            self._run(list(jobs.values()))
        except BaseException:
            self.close()  # an interrupt leaves no half-asked question behind for the next call
            raise
        failed = [sample for group in groups for sample in group.samples if not sample.verdict.counts]
        for sample in failed[:MAX_LOGGED]:
            logger.warning("row %s, sample %d: verifier %s: %s", sample.prompt_id, sample.index, sample.verdict.value, sample.detail)
        if len(failed) > MAX_LOGGED:
            logger.warning("%d more checks failed; see the details in the rollout log", len(failed) - MAX_LOGGED)
        counts = Counter(sample.verdict.value for group in groups for sample in group.samples)
        return {verdict.value: float(counts[verdict.value]) for verdict in Verdict} | {"restarts": float(self._restarts - restarts_before)}

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gold(self, group: Group) -> str:
        answer = group.prompt.answer.strip()
        return last_boxed(answer) or answer if self.config.verifier == "math" else answer

    def _score_or_queue(self, sample: Sample, gold: str, jobs: dict[tuple[str, str], _Job]) -> None:
        answer = extract_answer(self.config.verifier, sample.text)
        sample.detail = ""
        if answer == gold:
            sample.verdict = Verdict.RIGHT
        elif self.config.verifier != "math" or not answer:
            sample.verdict = Verdict.WRONG
        elif len(gold) > MAX_ANSWER_CHARACTERS:
            sample.verdict, sample.detail = Verdict.ERROR, f"the gold answer has more than {MAX_ANSWER_CHARACTERS} characters"
        elif len(answer) > MAX_ANSWER_CHARACTERS:
            sample.verdict, sample.detail = Verdict.WRONG, f"the answer has more than {MAX_ANSWER_CHARACTERS} characters"
        else:
            jobs.setdefault((answer, gold), _Job(answer, gold, [])).samples.append(sample)

    def _run(self, jobs: list[_Job]) -> None:
        """Feed the jobs to the workers, one at a time each, until every job has its verdict."""
        queue = deque(jobs)
        failed_starts = 0
        while len(self._workers) < min(self.config.workers, len(jobs)):
            self._workers.append(_Worker(self._command))
        while queue or any(worker.job for worker in self._workers):
            for worker in self._workers:
                if worker.ready and worker.job is None and queue:
                    worker.send(queue.popleft(), self.config.timeout + GRACE)
            for worker, reply in self._wait():
                if reply is None:  # dead, or past its deadline and killed
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts >= MAX_FAILED_STARTS:
                        raise UserError(f"verifier workers do not start: {worker.obituary}; is math-verify installed beside megasd?")
                    self._settle_death(worker, queue)
                    self._workers[self._workers.index(worker)] = _Worker(self._command)
                    self._restarts += 1
                elif not worker.ready:
                    worker.ready, worker.deadline, failed_starts = True, None, 0
                else:
                    _finish(worker.job, Verdict(reply["verdict"]), reply["detail"])
                    worker.job = worker.deadline = None

    def _settle_death(self, worker: _Worker, queue: deque[_Job]) -> None:
        job = worker.job
        if job is None:
            return
        if worker.timed_out:
            _finish(job, Verdict.TIMEOUT, f"no verdict within {self.config.timeout:g} s; the worker was killed")
        elif job.attempts < 2:
            queue.appendleft(job)
        else:
            _finish(job, Verdict.ERROR, f"the worker died twice: {worker.obituary}")

    def _wait(self) -> list[tuple[_Worker, dict | None]]:
        """Sleep until a worker says something, dies or meets its deadline; (worker, reply), reply None for the dead."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
            events = selector.select(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            outcomes = [(key.data, reply) for key, _ in events for reply in key.data.receive()]
        heard = {id(worker) for worker, _ in outcomes}
        now = time.monotonic()
        for worker in self._workers:
            if id(worker) not in heard and worker.deadline is not None and now >= worker.deadline:
                worker.timed_out = True
                worker.kill()
                outcomes.append((worker, None))
        return outcomes


class _Worker:
    """A worker process and what it is doing."""

    def __init__(self, command: list[str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # a file, not a pipe: nobody has to drain it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True, bufsize=0
        )
        self.ready = False
        self.job: _Job | None = None
        self.deadline: float | None = time.monotonic() + START_TIMEOUT  # of the start or of the job (monotonic seconds); None when idle
        self.timed_out = False
        self.obituary = ""
        self._buffer = b""

    def send(self, job: _Job, seconds: float) -> None:
        """Hand over a job. A worker that has died meanwhile is found by the next receive(), with the job still its own."""
        job.attempts += 1
        self.job, self.deadline = job, time.monotonic() + seconds
        line = json.dumps({"answer": job.answer, "gold": job.gold}, ensure_ascii=False) + "\n"
        try:
            self.process.stdin.write(line.encode("utf-8", "replace"))
        except BrokenPipeError:
            logger.info("a verifier worker died while it was idle")

    def receive(self) -> list[dict | None]:
        """Whole lines that have arrived; [None] when the worker is dead, [] for half a line."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            self.kill()
            return [None]
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End the process and read what it last said. May be called twice."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        if not self._stderr.closed:
            self._stderr.seek(0)
            said = self._stderr.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self.obituary = f"{ended}; {said[-1] if said else 'it printed nothing'}"
            self._stderr.close()


def _finish(job: _Job, verdict: Verdict, detail: str) -> None:
    for sample in job.samples:
        sample.verdict, sample.detail = (
            verdict,
            detail if verdict.counts else f"{detail}; answer {job.answer[:200]!r}, gold {job.gold[:200]!r}",
        )
