"""Engines that `megasd serve` starts on other machines: announced in run.dir/engines, which both
sides see, and taken from there.

    <host>-<port>.json   {"url", "name", "token"}: an engine that answers; a new name with every start
    <name>.condemned     written by the run: the engine hangs, and is to be restarted
    trainer.json         {"token", "beat"}: rewritten every few seconds while the run lives
    closed               {"token", "beat"}: the run has ended

A requeued job finds the files of its earlier start: only those of the same token (job and restart)
count, and an engine is taken only when the server that answers at its URL says the announced name
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasd.config.schema import EngineConfig
from megasd.engine.client import EngineClient, Refused, StartError, Unreachable
from megasd.types import UserError

# seconds between two signs of life of the run
BEAT = 5.0
# seconds between two looks at the directory
POLL = 0.5
TRAINER, CLOSED = "trainer.json", "closed"


@dataclass(frozen=True)
class Announcement:
    """An engine that answers at `url` and calls itself `name`."""

    url: str
    name: str
    token: str


def job_token() -> str:
    """What tells this start of a job from an earlier one: MEGASD_JOB, or Slurm's job and restart;
    "" elsewhere.
    """
    job = os.environ.get("SLURM_HET_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return os.environ.get("MEGASD_JOB") or (
        f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
    )


def engine_name() -> str:
    """A name that no other start of an engine has."""
    return f"megasd-{uuid.uuid4().hex[:12]}"


def write_announcement(path: Path, content: dict[str, Any]) -> None:
    """Whole, or not at all."""
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    writing.write_text(json.dumps(content) + "\n")
    os.replace(writing, path)


def read_announcement(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there, or not one of these."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class EngineRegistry:
    """The run's side of the directory. `open` and `close` belong to the engines' event loop."""

    def __init__(self, run_dir: Path) -> None:
        self.directory, self.token = run_dir / "engines", job_token()
        # engine by name
        self.taken: dict[str, RemoteEngine] = {}
        self.condemned: set[str] = set()
        self._beating: asyncio.Task[None] | None = None
        self._beat = uuid.uuid4().hex[:8]

    def open(self) -> None:
        """Say that the run is there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / CLOSED).unlink(missing_ok=True)
        self._sign()
        self._beating = asyncio.ensure_future(self._go_on())

    def _sign(self) -> None:
        write_announcement(
            self.directory / TRAINER, {"token": self.token, "beat": f"{self._beat}-{time.time():.3f}"}
        )

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            # a file system that is away for a moment
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._sign)

    async def close(self) -> None:
        """Say that it has ended."""
        if self._beating is None:
            return
        self._beating.cancel()
        self._beating = None
        with contextlib.suppress(OSError):
            write_announcement(self.directory / CLOSED, {"token": self.token, "beat": self._beat})

    def announced(self) -> list[Announcement]:
        """Engines announced for this start of the job, in the order of their files' names."""
        found = [
            read_announcement(path) for path in sorted(self.directory.glob("*.json")) if path.name != TRAINER
        ]
        names = ("url", "name", "token")
        entries = [
            Announcement(**{name: str(one.get(name, "")) for name in names})
            for one in found
            if one is not None
        ]
        return [one for one in entries if one.token == self.token and one.name not in self.condemned]

    def condemn(self, name: str, reason: str) -> None:
        """Ask for a restart of an engine that hangs."""
        self.condemned.add(name)
        with contextlib.suppress(OSError):
            write_announcement(self.directory / f"{name}.condemned", {"reason": reason})


class RemoteEngine(EngineClient):
    """An engine of another machine: `launch` forgets it, `wait_ready` waits until one that nobody
    has taken is announced and answers.
    """

    def __init__(self, config: EngineConfig, registry: EngineRegistry, **kwargs: Any) -> None:
        super().__init__(config, url="", log_path=registry.directory, **kwargs)
        self.registry, self.restartable = registry, True

    def launch(self) -> None:
        """As Engine's, for a process that another machine starts."""
        for name in [name for name, engine in self.registry.taken.items() if engine is self]:
            del self.registry.taken[name]
        self.hung = self.paused = self.updating = False
        self.released = set()

    def kill(self) -> None:
        """It cannot be killed from here; one that hangs is told of."""
        self.alive = False
        if self.hung and self.answers_as is not None:
            self.registry.condemn(self.answers_as, self.reason)

    def last_error(self) -> str:
        """Its log is on its machine."""
        return f"see the logs of megasd serve in {self.registry.directory}"

    async def wait_ready(self) -> None:
        """As Engine's; StartError when none came within start_timeout."""
        deadline, said = time.monotonic() + self.config.start_timeout, "no further engine was announced"
        while True:
            for found in self.registry.announced():
                if found.name in self.registry.taken:
                    continue
                self.registry.taken[found.name] = self
                reason = await self._try(found)
                if reason is None:
                    return
                del self.registry.taken[found.name]
                said = reason
            if time.monotonic() > deadline:
                raise StartError(
                    f"rollout.engine.served={self.config.served}: {said} in {self.registry.directory} within"
                    f" rollout.engine.start_timeout={self.config.start_timeout:g} s; run `megasd serve` with"
                    " this config on their nodes"
                )
            await asyncio.sleep(POLL)

    async def _try(self, found: Announcement) -> str | None:
        """Why the announced engine is none; None when it answers."""
        self.url = found.url
        try:
            await self._check_url()
            if self.answers_as == found.name:
                return None
            reason = f"another server answers at {found.url}"
        except (UserError, Unreachable, Refused) as error:
            reason = f"{found.url} was announced, but: {error}"
        self.alive = False
        return reason
