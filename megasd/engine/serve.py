"""Run engines on this machine for a run on other machines, for `megasd serve`.

The run has the setting rollout.engine.served. engine/remote.py says how run and engines find each
other.

The command starts as many engines as fit, announces each when it answers, and restarts an engine
that died or hangs. It closes all engines and ends when the run ends, when the run has given no sign
of life for PATIENCE seconds, or on SIGTERM. It ignores SIGUSR1, which preempts the run: the engines
end when the run has saved and ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megasd.config.schema import LOOPBACK, Config, EngineConfig, engine_dtype
from megasd.engine.auth import VARIABLE, engine_key
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError
from megasd.engine.remote import (
    CLOSED,
    POLL,
    TRAINER,
    engine_name,
    job_token,
    read_announcement,
    write_announcement,
)
from megasd.types import UserError

# Seconds without a sign of life after which the run counts as gone. A shared file system may show a
# new file a minute late.
PATIENCE = 180.0
WILDCARDS = ("0.0.0.0", "::")


def make_engines(config: Config, *, host: str, count: int | None) -> list[EngineClient]:
    """Make this machine's engines, not started.

    count None: as many as the machine's GPUs hold, or 1 without GPUs.
    """
    if host not in LOOPBACK and engine_key() is None:
        raise UserError(
            f"--host {host}: SGLang lets in whoever reaches it; set {VARIABLE} here and where the run starts"
        )
    model_path = config.rollout.engine.model_path or config.model.path
    if not (Path(model_path) / "config.json").is_file():
        raise UserError(
            f"model.path={model_path}: holds no config.json on this machine; give a Hugging Face directory"
            " that it sees"
        )
    settings: EngineConfig = replace(config.rollout.engine, host=host, urls=[], served=0)
    size, gpus = settings.tensor_parallel_size, torch.cuda.device_count()
    count = count or max(1, gpus // size)
    if gpus and count * size > gpus:
        raise UserError(
            f"--engines {count}: with rollout.engine.tensor_parallel_size={size} they take {count * size} of"
            f" {gpus} GPUs; lower one"
        )
    node, logs = socket.gethostname(), Path(config.run.dir) / "engines"
    # Engines of different machines must not draw the same samples.
    seed = config.run.seed + zlib.crc32(node.encode())
    return [
        EngineClient(
            settings,
            index=index,
            model_path=model_path,
            device="cuda" if gpus else "cpu",
            dtype=engine_dtype(config),
            log_path=logs / f"{node}-{index}.log",
            seed=seed,
            need_text=bool(config.rollout.stop),
        )
        for index in range(count)
    ]


async def serve(engines: list[EngineClient], directory: Path) -> int:
    """Keep the engines up until the run ends, goes silent, or a signal comes.

    Returns the exit code.

    EngineError (StartError) when all engines are lost, when an engine has never answered, or when
    an engine is lost before the run is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    watch = Watch(directory)
    tasks = {asyncio.ensure_future(keep(engine, directory, print)): engine for engine in engines}
    lost: set[asyncio.Task[None]] = set()
    try:
        while not stop.is_set() and (reason := watch.ended()) is None:
            for task in [task for task in tasks if task.done() and task not in lost]:
                lost.add(task)
                if tasks[task].answers_as is None or watch.heard is None or len(lost) == len(tasks):
                    # Raise the error that the task failed with.
                    await task
                print(f"megasd: {task.exception()}; the others go on", flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), POLL)
        print(f"megasd: {'told to stop' if stop.is_set() else reason}; closing the engines", flush=True)
        return int(not stop.is_set() and watch.silent)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in engines:
            await engine.close()


async def keep(engine: EngineClient, directory: Path, say: Callable[..., None]) -> None:
    """Start an engine, announce it, and restart it whenever it dies, at most max_restarts times.

    Never returns; EngineError when the restarts are used up.
    """
    token, node = job_token(), socket.gethostname()
    reason: str | None = None
    for _ in range(engine.config.max_restarts + 1):
        engine.name = engine_name()
        engine.launch()
        await engine.wait_ready()
        port = engine.url.rpartition(":")[2]
        host = node if engine.config.host in WILDCARDS else engine.config.host
        paths = directory / f"{node}-{port}.json", directory / f"{engine.name}.condemned"
        try:
            write_announcement(
                paths[0], {"url": f"http://{host}:{port}", "name": engine.name, "token": token}
            )
            say(f"megasd: engine {engine.index} answers at http://{host}:{port}", flush=True)
            while (reason := died(engine, paths[1])) is None:
                await asyncio.sleep(POLL)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        say(f"megasd: engine {engine.index} died ({reason}); starting it again", flush=True)
        engine.kill()
    limit = f"rollout.engine.max_restarts={engine.config.max_restarts}"
    raise EngineError(
        f"engine {engine.index} died again after {limit}: {reason}; {engine.last_error()} (log:"
        f" {engine.log_path})"
    )


def died(engine: EngineClient, condemned: Path) -> str | None:
    """Why an engine must be restarted; None while it lives.

    `condemned`: the file by which the run says that the engine hangs.
    """
    if engine.exit_code() is not None:
        return f"exit status {engine.exit_code()}"
    found = read_announcement(condemned)
    return None if found is None else f"the run says: {found.get('reason')}"


class Watch:
    """Watches the run's files to see whether the run is still there.

    heard: when the run's sign of life last changed; None before the run has begun. silent: the sign
    of life stopped.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.token = directory, job_token()
        self.closed_before = read_announcement(directory / CLOSED)
        self.beat: str | None = None
        self.silent = False
        self.heard: float | None = None

    def ended(self) -> str | None:
        """Why the engines must be closed; None while the run is there, or has not begun."""
        closed = read_announcement(self.directory / CLOSED)
        trainer = read_announcement(self.directory / TRAINER)
        if (
            closed is not None
            and closed.get("token") == self.token
            and (self.token or closed != self.closed_before)
        ):
            return "the run has ended"
        if trainer is not None and trainer.get("token") == self.token and trainer.get("beat") != self.beat:
            # Without a token, a file that lay there at the start may belong to an earlier run.
            if self.beat is not None or self.token:
                self.heard = time.monotonic()
            self.beat = trainer.get("beat")
        if self.heard is not None and time.monotonic() - self.heard > PATIENCE:
            self.silent = True
            return f"the run has given no sign of life for {PATIENCE:g} s"
        return None
