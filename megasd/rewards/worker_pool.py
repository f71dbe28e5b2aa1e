"""Worker processes for checks that may hang, in Python or in C.

A worker reads one request at a time over a pipe. The pool kills it at a deadline, and replaces it
when it dies.
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from megasd.rewards.verifier_row import WorkerReply, WorkerRequest
from megasd.rewards.worker import GRACE
from megasd.types import UserError, Verdict

# seconds; sympy imports slowly on a busy machine
START_TIMEOUT = 120.0
# So many failed starts in a row are an error.
MAX_FAILED_STARTS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A request on its way to a worker: `index` is its place in the list, `attempt` counts from 1."""

    index: int
    request: WorkerRequest
    attempt: int = 1


class WorkerPool:
    """Up to `size` processes of `command`, which the first requests start.

    `timeout`: seconds a check may take.
    """

    def __init__(self, command: list[str], size: int, timeout: float) -> None:
        self.command, self.size, self.timeout = command, size, timeout
        self.workers: list[Worker] = []
        self.restarts = 0

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def run(self, requests: Sequence[WorkerRequest]) -> list[WorkerReply]:
        """One reply for each request, in order. UserError when workers do not start.

        Each worker has one request at a time. A request whose worker dies is sent a second time.
        """
        queue = deque(Job(index, request) for index, request in enumerate(requests))
        replies: dict[int, WorkerReply] = {}
        failed_starts = 0
        while len(self.workers) < min(self.size, len(requests)):
            self.workers.append(Worker(self.command))
        while len(replies) < len(requests):
            for worker in self.workers:
                if worker.ready and worker.job is None and queue:
                    worker.send(queue.popleft(), self.timeout + GRACE)
            for worker, message in self._wait():
                # dead, or past its deadline and killed
                if message is None:
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts >= MAX_FAILED_STARTS:
                        raise UserError(
                            f"verifier workers do not start: {worker.obituary}; is math-verify installed"
                            " next to megasd?"
                        )
                    job, reply = worker.job, self._reply_of_dead(worker)
                    if job is not None and reply is not None:
                        replies[job.index] = reply
                    elif job is not None:
                        queue.appendleft(Job(job.index, job.request, job.attempt + 1))
                    self.workers[self.workers.index(worker)] = Worker(self.command)
                    self.restarts += 1
                elif not worker.ready:
                    worker.set_ready()
                    failed_starts = 0
                else:
                    replies[worker.take_job().index] = WorkerReply(
                        Verdict(message["verdict"]), message["detail"], message["result"]
                    )
        return [replies[index] for index in range(len(requests))]

    def _reply_of_dead(self, worker: Worker) -> WorkerReply | None:
        """What the death of a worker says about its request; None when the request deserves another try."""
        if worker.timed_out:
            detail = f"no verdict within {self.timeout:g} s; the worker was killed"
            return WorkerReply(Verdict.TIMEOUT, detail)
        if worker.job is None or worker.job.attempt < 2:
            return None
        return WorkerReply(Verdict.ERROR, f"the worker died twice: {worker.obituary}")

    def _wait(self) -> list[tuple[Worker, dict[str, Any] | None]]:
        """Sleep until a worker says something, dies or meets its deadline.

        Returns (worker, message) pairs; the message of a dead worker is None.
        """
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
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
    """A worker process, and the request that it works on."""

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
        self.stdin, self.stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        self.ready = False
        # the request that it works on; None while it starts and while it is idle
        self.job: Job | None = None
        # when the start or the job must be done (monotonic seconds); None while it is idle
        self.deadline: float | None = time.monotonic() + START_TIMEOUT
        self.timed_out = False
        # how the process ended
        self.obituary = ""
        self._buffer = b""

    def set_ready(self) -> None:
        """Note that the process has started."""
        self.ready, self.deadline = True, None

    def send(self, job: Job, seconds: float) -> None:
        """Hand over a job, to be done in so many seconds.

        If the worker has died meanwhile, then the next receive() finds out, and `job` is still set.
        """
        self.job, self.deadline = job, time.monotonic() + seconds
        fields = {"answer": job.request.answer, "gold": job.request.gold}
        line = json.dumps(fields, ensure_ascii=False) + "\n"
        try:
            self.stdin.write(line.encode("utf-8", "replace"))
        except BrokenPipeError:
            logger.info("a verifier worker died while it was idle")

    def take_job(self) -> Job:
        """The job that is done; the worker is idle afterwards."""
        job = self.job
        if job is None:
            raise RuntimeError("a verifier worker replied without a request")
        self.job = self.deadline = None
        return job

    def receive(self) -> list[dict[str, Any] | None]:
        """Messages that have arrived: [None] when the worker is dead, [] for half a line."""
        data = os.read(self.stdout.fileno(), 65536)
        if not data:
            self.kill()
            return [None]
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End the process and read its last words. May be called twice."""
        self.process.kill()
        code = self.process.wait()
        self.stdin.close()
        self.stdout.close()
        if not self._stderr.closed:
            self._stderr.seek(0)
            said = self._stderr.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self.obituary = f"{ended}; {said[-1] if said else 'it printed nothing'}"
            self._stderr.close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process was started without this pipe")
    return stream
