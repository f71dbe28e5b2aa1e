"""The engines of a run: their life, and which weights each of them holds. What they are asked for is generate.py's.

Synchronous outside (rank 0 calls it), asyncio inside: one event loop in one thread for the whole run, so connections and the engines' life
do not depend on a call. An engine is asked for samples only while it holds `version` whole: it is paused before the first byte of a live
update and goes on after the last, and one that was left in between (a push that failed) stays paused, stamped "partial-<version>".
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import json
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from megasd.config import RolloutConfig
from megasd.rollout.engine import Engine, EngineError, Unreachable
from megasd.types import UserError
from megasd.weights.headers import check_same_tensors, tensor_shapes

T = TypeVar("T")
InFlight = Literal["retract", "abort", "drain"]


class Fleet:
    """The engines behind a synchronous facade. Used by rank 0; `open_update` .. `close_update` by one thread at a time."""

    def __init__(self, config: RolloutConfig, *, model_path: str, device: str, dtype: str, run_dir: Path, seed: int) -> None:
        self.config, self.model_path = config, model_path
        self.version = 0  # of the weights that samples are asked of; 0 = model_path
        self._directory: str | None = model_path  # where a restarted engine finds `version`; None = only the actor has it
        self.shapes = tensor_shapes(model_path)
        hf_config = json.loads((Path(model_path) / "config.json").read_text())
        self._tied = bool(hf_config.get("tie_word_embeddings", False))
        common = dict(model_path=model_path, device=device, dtype=dtype, run_dir=Path(run_dir), seed=seed, need_text=bool(config.stop))
        urls: list[str | None] = list(config.engine.urls) or [None]
        self.engines = [Engine(config.engine, url=url, **common) for url in urls]
        self.repush: Callable[[], None] | None = None  # gives a restarted engine the actor's weights; called in the caller's thread
        self._counts: Counter[str] = Counter()
        self._restarts = 0
        self._updating: list[Engine] = []
        self._sending: list[asyncio.Task[None]] = []  # requests of a live update
        self._open = True  # requests may be sent; an update that drains closes it
        self._inbox: queue.SimpleQueue[concurrent.futures.Future[None] | None] | None = None
        self._random = random.Random(seed)  # jitter
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ---- life ----------------------------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the engine's process and return at once, to overlap its start with other work; `wait_ready` must follow.

        URLs are asked here already: UserError for one that no SGLang server of this model answers at.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
            self._thread.start()
            atexit.register(self.close)

        async def launch() -> None:  # in the loop's thread: an engine dies with the thread that started it
            for engine in self.engines:
                if engine.owned:
                    engine.launch()
                else:
                    await engine.wait_ready()  # a URL that does not answer is told before a model is built

        try:
            self._call(launch())
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Until every engine answers. StartError with the log's last error, UserError for a URL."""
        try:
            self._call(self._wait_ready())
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start an engine, or check the given URLs, and have them serve model_path as version 0."""
        self.launch()
        self.wait_ready()

    async def _wait_ready(self) -> None:
        for engine in self.engines:
            await engine.wait_ready()
            if not engine.owned:  # it may hold another run's weights, or half of them
                try:
                    await engine.leave_update()
                    await engine.load_weights(self.model_path, 0)
                except (EngineError, Unreachable) as error:
                    raise UserError(f"rollout.engine.urls: {engine.url} cannot load model.path {self.model_path}: {error}") from error

    def close(self) -> None:
        """Kill the owned engine and stop the loop; may be called twice."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        atexit.unregister(self.close)
        for engine in self.engines:
            asyncio.run_coroutine_threadsafe(engine.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("the rollout has not been started, or is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _call_and_serve(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """As `_call`, but a restarted engine that needs the actor's weights gets them here: `repush` is collective, hence this thread's."""
        if self.repush is None:
            return self._call(coroutine)
        inbox: queue.SimpleQueue[concurrent.futures.Future[None] | None] = queue.SimpleQueue()
        self._inbox = inbox
        future = self._submit(coroutine)
        future.add_done_callback(lambda _: inbox.put(None))
        try:
            while (asked := inbox.get()) is not None:
                if not asked.set_running_or_notify_cancel():
                    continue
                try:
                    if any(engine.alive and engine.held != self.version for engine in self.engines):  # one push serves all who asked
                        self.repush()
                    asked.set_result(None)
                except Exception as error:
                    asked.set_exception(error)
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._inbox = None

    # ---- weights from a directory --------------------------------------------------------------------------------------------------

    def push(self, directory: str, version: int) -> None:
        """Have every engine load `directory` (safetensors; it must stay until the next push) and stamp `version`; checked in /model_info.

        UserError naming the tensor, before anything is sent, if names or shapes differ from those of model_path.
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
        await _together([self._push_to(engine) for engine in self.engines])
        if not any(engine.up for engine in self.engines):
            raise self._no_engine("after a push")

    async def _push_to(self, engine: Engine) -> None:
        for attempt in range(self.config.max_retries + 1):
            if not engine.alive:
                return
            incarnation = engine.incarnation
            try:
                await engine.leave_update()
                return await engine.load_weights(self._directory, self.version)
            except Unreachable as error:
                if attempt == self.config.max_retries:
                    raise EngineError(f"push of version {self.version} failed {attempt + 1} times: {error}") from error
                await self._revive(engine, incarnation)  # a restarted engine has loaded the weights already; once more does no harm
                await self._back_off(attempt)

    # ---- weights sent live ---------------------------------------------------------------------------------------------------------

    def open_update(self, version: int, in_flight: InFlight, *, lacking: bool = False) -> list[Engine]:
        """Pause the engines and open SGLang's update session on each; returns those that take part, in the order of `update`'s bodies.

        What runs in them is taken back and goes on afterwards with its context computed anew ("retract"), is given up and asked again
        ("abort"), or is waited for ("drain"). `lacking`: only engines that do not hold `version`. EngineError when another push is open.
        """
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
        """POST one body to each engine of the open update; the future fails with EngineError (refused) or Unreachable."""

        engines = self._updating

        async def send() -> None:  # the first failure is told at once: in a broadcast the other engines wait for the one that failed
            tasks = [asyncio.ensure_future(e.update_weights(path, body)) for e, body in zip(engines, bodies, strict=True)]
            self._sending = [task for task in self._sending if not task.done()] + tasks
            await asyncio.gather(*tasks)

        return self._submit(send())

    def close_update(self, version: int) -> None:
        """End the session, see that each engine names `version`, let it go on. The engines hold `version` from here on."""

        async def close() -> None:
            self._directory, self.version = None, version  # first: an engine that goes on early samples with it
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
        """A live update that failed for good: engines that it had begun to write stay paused until the next one."""
        self._open, self._updating = True, []

    def release(self) -> None:
        """Have idle engines of ours free the memory of weights and KV cache (colocation on a GPU); they sample again after a push."""

        self._call(_together([engine.release() for engine in self.engines if engine.owned and engine.alive]))

    def distrust(self) -> None:
        """The engines were found to hold something else than was sent: they are not asked for samples before the next push."""
        for engine in self.engines:
            engine.held, engine.distrusted = None, True

    def heal(self) -> None:
        """After a failed live update: restart dead engines of ours, set dead URLs aside. They hold no whole version until the next push."""

        async def heal() -> None:
            if self._sending:
                await asyncio.wait(self._sending, timeout=30)
            for engine in self.engines:
                if engine.alive:
                    await self._revive(engine, engine.incarnation)

        self._open, self._updating = True, []
        self._call(heal())

    def checksums(self, skip: Sequence[str] = ()) -> dict[str, list[dict[str, str]]]:
        """Per engine (URL), per tensor-parallel rank: engine parameter -> checksum; names that contain an entry of `skip` are left out."""

        async def ask() -> dict[str, list[dict[str, str]]]:
            living = [engine for engine in self.engines if engine.alive]
            answers = await asyncio.gather(*(engine.checksums(skip) for engine in living))
            return {engine.url: ranks for engine, ranks in zip(living, answers, strict=True)}

        return self._call(ask())

    # ---- what went wrong -----------------------------------------------------------------------------------------------------------

    async def _revive(self, engine: Engine, incarnation: int) -> None:
        """After a failed request: restart a dead engine of ours, set a dead URL aside; give a living one the right weights."""
        async with engine.lock:
            if engine.incarnation != incarnation:
                return  # another request has seen to it
            reason = await engine.why_dead()
            if reason is None:
                if engine.held is not None and await self._version_of(engine) != str(self.version):
                    await self._give_weights(engine)
                return
            engine.alive, engine.reason, engine.held = False, reason, None
            if not engine.owned:
                engine.incarnation += 1
                return
            engine.kill()
            while True:
                if self._restarts >= self.config.engine.max_restarts:
                    limit = f"rollout.engine.max_restarts={self.config.engine.max_restarts}"
                    raise EngineError(f"the engine died again after {limit}: {reason}; {engine.last_error()} (log: {engine.log_path})")
                self._restarts += 1
                self._counts["restarts"] += 1
                engine.launch()
                try:
                    await engine.wait_ready()
                    if self.version != 0 or self._directory != self.model_path:
                        engine.held = None  # not before it has the weights
                        await self._give_weights(engine)
                    return
                except (EngineError, Unreachable) as error:
                    reason = str(error)
                    engine.kill()

    async def _give_weights(self, engine: Engine) -> None:
        """Bring an engine to `version`: from the directory, or by a push from the actor; without a thread to do that it stays without."""
        engine.held = None
        if self._directory is not None:
            await engine.leave_update()
            await engine.load_weights(self._directory, self.version)
        elif self._inbox is not None and self.repush is not None:
            asked: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._inbox.put(asked)
            try:
                await asyncio.wrap_future(asked)
            except Exception as error:  # the push failed; if because the engine died again, it is for the caller to restart it
                if isinstance(error.__cause__, Unreachable):
                    raise Unreachable(str(error)) from error
                raise

    async def _version_of(self, engine: Engine) -> str:
        try:
            return await engine.weight_version()
        except Unreachable:
            return "unknown"

    async def _attend(self) -> None:
        """Before a call: bring back engines that an earlier call left for dead."""
        for engine in self.engines:
            if engine.alive:
                away = engine.distrusted or engine.released or engine.paused or engine in self._updating  # a push will see to it
                if engine.held is None and not away:
                    async with engine.lock:  # it came back when nobody could give it weights
                        await self._give_weights(engine)
                continue
            if engine.owned:
                await self._revive(engine, engine.incarnation)
            else:
                with contextlib.suppress(UserError, Unreachable):  # still away; the others go on
                    await engine.wait_ready()
                    await self._give_weights(engine)

    async def _correct_versions(self) -> None:
        """After a stale sample: an engine that somebody restarted behind its URL gets the weights again."""
        for engine in self.engines:
            async with engine.lock:
                if engine.up and await self._version_of(engine) not in ("unknown", str(self.version)):
                    with contextlib.suppress(Unreachable):  # the next request finds out
                        await self._give_weights(engine)

    def _no_engine(self, when: str) -> UserError:
        lost = "; ".join(f"{engine.url} ({engine.reason})" for engine in self.engines)
        return UserError(f"rollout.engine.urls: no engine is left {when}: {lost}; start it again, or take it out of the list")

    async def _available(self) -> Engine:
        """The least busy living engine; waits while an owned one restarts."""
        while True:
            living = [engine for engine in self.engines if engine.up and not engine.paused]
            if living and self._open:
                return min(living, key=lambda engine: engine.in_flight)
            if not any(engine.owned or engine.alive for engine in self.engines):
                raise self._no_engine("for a request")
            if not any(
                (engine.up and not engine.paused) or engine.lock.locked() or engine in self._updating or not engine.alive
                for engine in self.engines
            ):
                raise EngineError("the last push of weights failed and left no engine with a whole version; push again first")
            await asyncio.sleep(0.05)

    async def _back_off(self, attempt: int) -> None:
        await asyncio.sleep(min(0.1 * 2**attempt, 5.0) * self._random.uniform(0.5, 1.0))


async def _together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them at once, each to its end; then raise the first error. What one engine does must not be cut short by another's failure."""
    for result in await asyncio.gather(*coroutines, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
