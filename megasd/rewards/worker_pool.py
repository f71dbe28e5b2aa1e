"""Worker processes for checks that may hang, in C too: fed one job at a time over pipes, killed at
a deadline, replaced when they die.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megasd.rewards.worker import GRACE
from megasd.types import Sample, UserError, Verdict

# seconds; sympy imports slowly on a busy machine
START_TIMEOUT = 120.0
# in a row
MAX_FAILED_STARTS = 3

logger = logging.getLogger(__name__)


@dataclass
class VerifierTask:
    """One check, for every sample that it speaks for. `settle` fills verdict, detail and result."""

    answer: str
    gold: str
    samples: list[Sample] = field(default_factory=list)
    attempts: int = 0
    verdict: Verdict | None = None
    detail: str = ""
    # what the check found out beside its verdict
    result: Any = None

    def settle(self, verdict: Verdict, detail: str, result: Any = None) -> None:
        self.verdict, self.detail, self.result = verdict, detail, result


class WorkerPool:
    """Up to `size` processes of `command`, started by the first jobs. `timeout`: seconds a check may take."""

    def __init__(self, command: list[str], size: int, timeout: float) -> None:
        self.command, self.size, self.timeout = command, size, timeout
        self.workers: list[Worker] = []
        self.restarts = 0

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def run(self, jobs: list[VerifierTask]) -> None:
        """Feed the jobs to the workers, one at a time each, until every job has its verdict.
        UserError when workers do not start.
        """
        queue = deque(jobs)
        failed_starts = 0
        while len(self.workers) < min(self.size, len(jobs)):
            self.workers.append(Worker(self.command))
        while queue or any(worker.job for worker in self.workers):
            for worker in self.workers:
                if worker.ready and worker.job is None and queue:
                    worker.send(queue.popleft(), self.timeout + GRACE)
            for worker, reply in self._wait():
                # dead, or past its deadline and killed
                if reply is None:
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts >= MAX_FAILED_STARTS:
                        raise UserError(
                            f"verifier workers do not start: {worker.obituary}; is math-verify installed"
                            " beside megasd?"
                        )
                    self._settle_death(worker, queue)
                    self.workers[self.workers.index(worker)] = Worker(self.command)
                    self.restarts += 1
                elif not worker.ready:
                    worker.ready, worker.deadline, failed_starts = True, None, 0
                else:
                    worker.job.settle(Verdict(reply["verdict"]), reply["detail"], reply["result"])
                    worker.job = worker.deadline = None

    def _settle_death(self, worker: Worker, queue: deque[VerifierTask]) -> None:
        job = worker.job
        if job is None:
            return
        if worker.timed_out:
            job.settle(Verdict.TIMEOUT, f"no verdict within {self.timeout:g} s; the worker was killed")
        elif job.attempts < 2:
            queue.appendleft(job)
        else:
            job.settle(Verdict.ERROR, f"the worker died twice: {worker.obituary}")

    def _wait(self) -> list[tuple[Worker, dict | None]]:
        """Sleep until a worker says something, dies or meets its deadline; (worker, reply), reply
        None for the dead.
        """
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            deadlines = [worker.deadline for worker in self.workers if worker.deadline is not None]
            events = selector.select(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            outcomes = [(key.data, reply) for key, _ in events for reply in key.data.receive()]
        heard = {id(worker) for worker, _ in outcomes}
        now = time.monotonic()
        for worker in self.workers:
            if id(worker) not in heard and worker.deadline is not None and now >= worker.deadline:
                worker.timed_out = True
                worker.kill()
                outcomes.append((worker, None))
        return outcomes


class Worker:
    """A worker process and what it is doing."""

    def __init__(self, command: list[str]) -> None:
        # a file, not a pipe: nobody has to drain it
        self._stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            bufsize=0,
        )
        self.ready = False
        self.job: VerifierTask | None = None
        # of the start or of the job (monotonic seconds); None when idle
        self.deadline: float | None = time.monotonic() + START_TIMEOUT
        self.timed_out = False
        self.obituary = ""
        self._buffer = b""

    def send(self, job: VerifierTask, seconds: float) -> None:
        """Hand over a job. A worker that has died meanwhile is found by the next receive(), with
        the job still its own.
        """
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
