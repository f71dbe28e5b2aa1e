"""Which weights each of a run's engines holds, and how they get others. Their life is life.py's,
what they are asked for generate.py's.

An engine is asked for samples only while it holds `version` whole: it is paused before the first
byte of a live update and goes on after the last, and one that was left in between (a push that
failed) stays paused, stamped "partial-<version>".
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megasd.config.schema import RolloutConfig
from megasd.engine.client import EngineClient, EngineError, Unreachable
from megasd.engine.pool import EnginePool, _together
from megasd.weights.safetensors_headers import check_same_tensors, tensor_shapes

InFlight = Literal["retract", "abort", "drain"]


class PoolWeights(EnginePool):
    """The engines behind a synchronous facade. Used by rank 0; `open_update` .. `close_update` by
    one thread at a time.
    """

    def __init__(
        self, config: RolloutConfig, *, model_path: str, device: str, dtype: str, run_dir: Path, seed: int
    ) -> None:
        self.shapes = tensor_shapes(model_path)
        hf_config = json.loads((Path(model_path) / "config.json").read_text())
        self._tied = bool(hf_config.get("tie_word_embeddings", False))
        super().__init__(
            config, model_path=model_path, device=device, dtype=dtype, run_dir=run_dir, seed=seed
        )
        # requests of a live update
        self._sending: list[asyncio.Task[None]] = []

    # ---- weights from a directory ----------------------------------------------------------------

    def push(self, directory: str, version: int) -> None:
        """Have every engine load `directory` (safetensors; it must stay until the next push) and
        stamp `version`; checked in /model_info.

        UserError naming the tensor, before anything is sent, if names or shapes differ from those
        of model_path.
        """
        check_same_tensors(directory, self.shapes, tied=self._tied)
        before = self._directory, self.version
        self._directory, self.version = str(directory), version
        try:
            self._call(self._push())
        except BaseException:
            self._directory, self.version = before
            raise

    async def _push(self) -> None:
        await self._settle()
        await _together([self._push_to(engine) for engine in self.engines])
        if not any(engine.up for engine in self.engines):
            raise self._no_engine("after a push")

    async def _push_to(self, engine: EngineClient) -> None:
        for attempt in range(self.config.max_retries + 1):
            if not engine.alive:
                return
            incarnation = engine.incarnation
            try:
                await engine.leave_update()
                return await engine.load_weights(self._directory, self.version)
            except Unreachable as error:
                if attempt == self.config.max_retries:
                    raise EngineError(
                        f"push of version {self.version} failed {attempt + 1} times: {error}"
                    ) from error
                # a restarted engine has loaded the weights already; once more does no harm
                await self._revive(engine, incarnation)
                await self._back_off(attempt)

    # ---- weights sent live -----------------------------------------------------------------------

    def open_update(self, version: int, in_flight: InFlight, *, lacking: bool = False) -> list[EngineClient]:
        """Pause the engines and open SGLang's update session on each; returns those that take part,
        in the order of `update`'s bodies.

        What runs in them is taken back and goes on afterwards with its context computed anew
        ("retract"), is given up and asked again ("abort"), or is waited for ("drain"). `lacking`:
        only engines that do not hold `version`. EngineError when another push is open.
        """
        if not lacking:
            self._call(self._settle())
        self._updating = [e for e in self.engines if e.alive and not (lacking and e.held == version)]
        if not self._updating:
            raise self._no_engine("for a push")
        self._call(self._open_update(version, in_flight))
        return self._updating

    async def _open_update(self, version: int, in_flight: InFlight) -> None:
        if in_flight == "drain":
            self._open = False
            while any(engine.in_flight for engine in self._updating):
                await asyncio.sleep(0.01)
        mode = "abort" if in_flight == "abort" else "retract"
        await _together([engine.enter_update(version, mode) for engine in self._updating])

    def update(self, path: str, bodies: Sequence[dict[str, Any]]) -> concurrent.futures.Future[None]:
        """POST one body to each engine of the open update; the future fails with EngineError
        (refused) or Unreachable.
        """

        engines = self._updating

        # the first failure is told at once: in a broadcast the other engines wait for the one that
        # failed
        async def send() -> None:
            tasks = [
                asyncio.ensure_future(e.update_weights(path, body))
                for e, body in zip(engines, bodies, strict=True)
            ]
            self._sending = [task for task in self._sending if not task.done()] + tasks
            await asyncio.gather(*tasks)

        return self._submit(send())

    def close_update(self, version: int) -> None:
        """End the session, see that each engine names `version`, let it go on. The engines hold
        `version` from here on.
        """

        async def close() -> None:
            # first: an engine that goes on early samples with it
            self._directory, self.version = None, version
            await _together([engine.leave_update(version) for engine in self._updating])

        self._call(close())
        self._open, self._updating = True, []

    def hold(self, version: int) -> bool:
        """Whether every living engine holds this version whole, and says so itself. One request an engine."""

        async def ask() -> list[bool]:
            return await asyncio.gather(*(engine.holds(version) for engine in self.engines if engine.alive))

        try:
            return all(self._call(ask()))
        except (EngineError, Unreachable):
            return False

    def leave_group(self, name: str) -> None:
        """Engines that are left drop a process group; they have 10 s for it."""

        body = {"group_name": name}
        leaving = [e.update_weights("/destroy_weights_update_group", body) for e in self.engines if e.alive]
        self._call(asyncio.wait_for(_together(leaving), timeout=10))

    def restamp(self, version: int) -> None:
        """The weights of `version` are those that the engines hold already: only the stamp changes."""

        async def stamp() -> None:
            for engine in self.engines:
                if engine.up:
                    await engine.stamp(str(version))
                    engine.held = version

        self._call(stamp())
        self._directory, self.version = None, version

    def abandon_update(self) -> None:
        """A live update that failed for good: engines that it had begun to write stay paused until
        the next one.
        """
        self._open, self._updating = True, []

    def release(self) -> None:
        """Have idle engines of ours, started here or served, free the memory of weights and KV
        cache (colocation on a GPU).

        They sample again after a push.
        """
        self._call(self._release())

    async def _release(self) -> None:
        await self._settle()
        await _together([engine.release() for engine in self.engines if engine.restartable and engine.alive])

    def distrust(self) -> None:
        """The engines were found to hold something else than was sent: they are not asked for
        samples before the next push.
        """
        for engine in self.engines:
            engine.held, engine.distrusted = None, True

    def heal(self) -> None:
        """After a failed live update: restart dead engines of ours, set dead URLs aside. They hold
        no whole version until the next push.
        """

        async def heal() -> None:
            if self._sending:
                await asyncio.wait(self._sending, timeout=30)
            for engine in self.engines:
                if engine.alive:
                    await self._revive(engine, engine.incarnation)

        self._open, self._updating = True, []
        self._call(heal())

    def checksums(self, skip: Sequence[str] = ()) -> dict[str, list[dict[str, str]]]:
        """Per engine (URL), per tensor-parallel rank: engine parameter -> checksum; names that
        contain an entry of `skip` are left out.
        """

        async def ask() -> dict[str, list[dict[str, str]]]:
            living = [engine for engine in self.engines if engine.alive]
            answers = await asyncio.gather(*(engine.checksums(skip) for engine in living))
            return {engine.url: ranks for engine, ranks in zip(living, answers, strict=True)}

        return self._call(ask())
