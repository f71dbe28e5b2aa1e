"""Push new weights into the engines of a run, and know which weights the engines hold.

An engine is asked for samples only while it holds the target version whole. It is paused before the
first byte of a live update and goes on after the last byte. An engine whose update broke off stays
paused, stamped "partial-<version>", until the next push.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.event_loop import finish_all
from megasd.engine.pool import EnginePool
from megasd.weights.safetensors_headers import check_same_tensors, tensor_shapes

InFlight = Literal["retract", "abort", "drain"]


class PoolWeights:
    """Pushes of weights into the engines of a pool.

    Used by rank 0; `open_update` .. `close_update` by one thread at a time.

    shapes: name -> shape of every tensor of the start model.
    """

    def __init__(self, pool: EnginePool) -> None:
        self.pool, self.target = pool, pool.target
        self.shapes = tensor_shapes(self.model_path)
        hf_config = json.loads((Path(self.model_path) / "config.json").read_text())
        self._tied = bool(hf_config.get("tie_word_embeddings", False))
        # The running requests of a live update.
        self._sending: list[asyncio.Task[None]] = []

    @property
    def version(self) -> int:
        """The version of the weights that samples must come from; 0 is the start model."""
        return self.target.version

    @property
    def model_path(self) -> str:
        """The Hugging Face directory of the start model."""
        return self.target.model_path

    # ---- weights from a directory ----------------------------------------------------------------

    def push(self, directory: str, version: int) -> None:
        """Have every engine load `directory` and stamp `version`; /model_info must confirm it.

        The directory holds safetensors, and must stay until the next push.

        UserError naming the tensor, before anything is sent, if names or shapes differ from those
        of the start model.
        """
        check_same_tensors(directory, self.shapes, tied=self._tied)
        target = self.target
        before = target.directory, target.version
        target.directory, target.version = str(directory), version
        try:
            self.pool.call(self._push(str(directory), version))
        except BaseException:
            target.directory, target.version = before
            raise

    async def _push(self, directory: str, version: int) -> None:
        health = self.pool.health
        await health.settle()
        await finish_all(self._push_to(engine, directory, version) for engine in self.pool.engines)
        if not any(engine.up for engine in self.pool.engines):
            raise health.no_engine("after a push")

    async def _push_to(self, engine: EngineClient, directory: str, version: int) -> None:
        max_retries = self.pool.config.max_retries
        for attempt in range(max_retries + 1):
            if not engine.alive:
                return
            incarnation = engine.incarnation
            try:
                await engine.applied.leave_update()
                return await engine.applied.load(directory, version)
            except Unreachable as error:
                if attempt == max_retries:
                    raise EngineError(
                        f"push of version {version} failed {attempt + 1} times: {error}"
                    ) from error
                # A restarted engine has loaded the weights already. A second load does no harm.
                await self.pool.health.revive(engine, incarnation)
                await self.pool.back_off(attempt)

    # ---- weights sent live -----------------------------------------------------------------------

    def open_update(self, version: int, in_flight: InFlight, *, lacking: bool = False) -> list[EngineClient]:
        """Pause the engines and open SGLang's update session on each.

        Returns the engines that take part, in the order of `update`'s bodies.

        in_flight says what happens to running requests. "retract" takes them back, and they go on
        afterwards with their context computed again. "abort" gives them up, and they are sent
        again. "drain" waits for them. `lacking`: only engines that do not hold `version` take part.
        EngineError if another push is open.
        """
        health = self.pool.health
        if not lacking:
            self.pool.call(health.settle())
        health.updating = [
            engine
            for engine in self.pool.engines
            if engine.alive and not (lacking and engine.applied.version == version)
        ]
        if not health.updating:
            raise health.no_engine("for a push")
        self.pool.call(self._open_update(version, in_flight))
        return health.updating

    async def _open_update(self, version: int, in_flight: InFlight) -> None:
        health = self.pool.health
        if in_flight == "drain":
            health.accepts_requests = False
            while any(engine.in_flight for engine in health.updating):
                await asyncio.sleep(0.01)
        mode = "abort" if in_flight == "abort" else "retract"
        await finish_all(engine.applied.enter_update(version, mode) for engine in health.updating)

    def update(self, path: str, bodies: Sequence[dict[str, Any]]) -> concurrent.futures.Future[None]:
        """POST one body to each engine of the open update.

        The future fails with EngineError (refused) or Unreachable. It fails as soon as one engine
        fails, since in a broadcast the other engines wait for the failed engine.
        """
        engines = self.pool.health.updating

        async def send() -> None:
            tasks = [
                asyncio.ensure_future(engine.applied.update(path, body))
                for engine, body in zip(engines, bodies, strict=True)
            ]
            self._sending = [task for task in self._sending if not task.done()] + tasks
            await asyncio.gather(*tasks)

        return self.pool.submit(send())

    def close_update(self, version: int) -> None:
        """End the session, check that each engine names `version`, and let it go on.

        The target is `version` from here on.
        """

        async def close() -> None:
            # Set the target first, since an engine that goes on early samples with this version.
            self._set_live_target(version)
            await finish_all(engine.applied.leave_update(version) for engine in self.pool.health.updating)

        self.pool.call(close())
        self._end_update()

    def abandon_update(self) -> None:
        """Give up a live update that failed for good.

        Engines that the update began to write stay paused until the next push.
        """
        self._end_update()

    def heal(self) -> None:
        """After a failed live update: restart the run's dead engines, set dead URLs aside.

        These engines hold no whole version until the next push.
        """

        async def heal() -> None:
            if self._sending:
                await asyncio.wait(self._sending, timeout=30)
            for engine in self.pool.engines:
                if engine.alive:
                    await self.pool.health.revive(engine, engine.incarnation)

        self._end_update()
        self.pool.call(heal())

    def leave_group(self, name: str) -> None:
        """Have the living engines leave a process group, within 10 s."""
        body = {"group_name": name}
        leaving = [
            engine.applied.update("/destroy_weights_update_group", body)
            for engine in self.pool.engines
            if engine.alive
        ]
        self.pool.call(asyncio.wait_for(finish_all(leaving), timeout=10))

    def restamp(self, version: int) -> None:
        """Give another version to the weights that the engines hold; only the stamp is sent."""

        async def stamp() -> None:
            for engine in self.pool.engines:
                if engine.up:
                    await engine.applied.stamp(str(version))
                    engine.applied.version = version

        self.pool.call(stamp())
        self._set_live_target(version)

    def _set_live_target(self, version: int) -> None:
        """Set the target to weights that were sent live and that only the actor has."""
        self.target.directory, self.target.version = None, version

    def _end_update(self) -> None:
        self.pool.health.accepts_requests, self.pool.health.updating = True, []

    # ---- what the engines hold -------------------------------------------------------------------

    def hold(self, version: int) -> bool:
        """Whether every living engine holds this version whole and confirms it by its stamp.

        It takes one request per engine.
        """

        async def ask() -> list[bool]:
            living = [engine for engine in self.pool.engines if engine.alive]
            return await asyncio.gather(*(engine.applied.holds(version) for engine in living))

        try:
            return all(self.pool.call(ask()))
        except (EngineError, Unreachable):
            return False

    def checksums(self, skip: Sequence[str] = ()) -> dict[str, list[dict[str, str]]]:
        """Engine (URL) -> for each tensor-parallel rank: engine parameter -> checksum.

        Names that contain an entry of `skip` are left out.
        """

        async def ask() -> dict[str, list[dict[str, str]]]:
            living = [engine for engine in self.pool.engines if engine.alive]
            answers = await asyncio.gather(*(engine.applied.checksums(skip) for engine in living))
            return {engine.url: ranks for engine, ranks in zip(living, answers, strict=True)}

        return self.pool.call(ask())

    def distrust(self) -> None:
        """Ask no engine for samples before the next push: all hold other weights than were sent."""
        for engine in self.pool.engines:
            engine.applied.version, engine.applied.distrusted = None, True

    def release(self) -> None:
        """Have idle engines free the memory of weights and KV cache (colocation on a GPU).

        Servers given by URL are left alone. The engines sample again after a push.
        """

        async def release() -> None:
            await self.pool.health.settle()
            await finish_all(
                engine.applied.release()
                for engine in self.pool.engines
                if engine.restartable and engine.alive
            )

        self.pool.call(release())
