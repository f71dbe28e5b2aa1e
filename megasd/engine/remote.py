"""Engines that `megasd serve` starts on other machines.

They are announced by files in run.dir/engines, which both sides see, and the run takes them from
there.

    <host>-<port>.json   {"url", "name", "token"}: an engine that answers; a new name with every start
    <name>.condemned     the run writes it: the engine hangs, and `megasd serve` is to restart it
    trainer.json         {"token", "beat"}: rewritten every few seconds while the run lives
    closed               {"token", "beat"}: the run has ended

A requeued job finds the files of its earlier start. So only files with this start's token (job and
restart) count, and the run takes an engine only if the server at its URL gives the announced name.
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
from megasd.engine.client import EngineClient
from megasd.engine.errors import Refused, StartError, Unreachable
from megasd.types import UserError

# Seconds between two signs of life of the run.
BEAT = 5.0
# Seconds between two reads of the directory.
POLL = 0.5
TRAINER, CLOSED = "trainer.json", "closed"


@dataclass(frozen=True)
class Announcement:
    """An engine that answers at `url` and calls itself `name`."""

    url: str
    name: str
    token: str


def job_token() -> str:
    """A text that distinguishes this start of a job from an earlier start.

    It is MEGASD_JOB, or Slurm's job and restart; "" without both.
    """
    job = os.environ.get("SLURM_HET_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return os.environ.get("MEGASD_JOB") or (
        f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
    )


def engine_name() -> str:
    """A name that no other start of an engine has."""
    return f"megasd-{uuid.uuid4().hex[:12]}"


def write_announcement(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    writing.write_text(json.dumps(content) + "\n")
    os.replace(writing, path)


def read_announcement(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is not there, or holds no JSON object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class EngineRegistry:
    """The run's side of the directory. `open` and `close` belong to the engines' event loop.

    taken: the engines of this run by their announced names. condemned: names of engines that hang.
    """

    def __init__(self, run_dir: Path) -> None:
        self.directory, self.token = run_dir / "engines", job_token()
        self.taken: dict[str, RemoteEngine] = {}
        self.condemned: set[str] = set()
        self._beating: asyncio.Task[None] | None = None
        self._beat = uuid.uuid4().hex[:8]

    def open(self) -> None:
        """Write that the run lives, again every few seconds."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / CLOSED).unlink(missing_ok=True)
        self._sign()
        self._beating = asyncio.ensure_future(self._sign_again())

    def _sign(self) -> None:
        write_announcement(
            self.directory / TRAINER, {"token": self.token, "beat": f"{self._beat}-{time.time():.3f}"}
        )

    async def _sign_again(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            # The file system may be away for a moment.
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._sign)

    async def close(self) -> None:
        """Write that the run has ended."""
        if self._beating is None:
            return
        self._beating.cancel()
        self._beating = None
        with contextlib.suppress(OSError):
            write_announcement(self.directory / CLOSED, {"token": self.token, "beat": self._beat})

    def announced(self) -> list[Announcement]:
        """The engines announced for this start of the job, in the order of their files' names."""
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
        """Have `megasd serve` restart an engine that hangs."""
        self.condemned.add(name)
        with contextlib.suppress(OSError):
            write_announcement(self.directory / f"{name}.condemned", {"reason": reason})


class RemoteEngine(EngineClient):
    """An engine on another machine, which `megasd serve` starts.

    `launch` forgets the engine. `wait_ready` waits until an engine that is not taken is announced,
    and takes it if it answers.
    """

    def __init__(self, config: EngineConfig, registry: EngineRegistry, **kwargs: Any) -> None:
        super().__init__(config, url="", log_path=registry.directory, **kwargs)
        self.registry, self.restartable = registry, True

    def launch(self) -> None:
        """Forget the engine; `megasd serve` starts the next one."""
        for name in [name for name, engine in self.registry.taken.items() if engine is self]:
            del self.registry.taken[name]
        self.hung = False
        self.applied.forget_update()

    def kill(self) -> None:
        """Condemn an engine that hangs; this machine cannot kill it."""
        self.alive = False
        if self.hung and self.answers_as is not None:
            self.registry.condemn(self.answers_as, self.reason)

    def last_error(self) -> str:
        """A text which says that the engine's log is on the other machine."""
        return f"see the logs of megasd serve in {self.registry.directory}"

    async def wait_ready(self) -> None:
        """Take an announced engine that answers; StartError if none came within start_timeout."""
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
        """Why the announced engine cannot be taken; None when it can."""
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
