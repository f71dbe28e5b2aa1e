"""The life of a run's engines: started, found dead, brought back with the right weights; and which
of them is asked next.

Synchronous outside (rank 0 calls it), asyncio inside: one event loop in one thread for the whole
run, so connections and the engines' life do not depend on a call. While an engine is brought back
the others go on, and its requests go to them.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megasd.config.schema import RolloutConfig
from megasd.engine.client import EngineClient, EngineError, Unreachable
from megasd.engine.remote import EngineRegistry, RemoteEngine
from megasd.engine.router import Router
from megasd.types import UserError

T = TypeVar("T")
# a push of weights that an engine waits for
PushRequest = concurrent.futures.Future[None]


class EnginePool:
    """The engines, their weights' version, and the loop that their coroutines run in."""

    def __init__(
        self, config: RolloutConfig, *, model_path: str, device: str, dtype: str, run_dir: Path, seed: int
    ) -> None:
        self.config, self.model_path, self.device = config, model_path, device
        # of the weights that samples are asked of; 0 = model_path
        self.version = 0
        # where a restarted engine finds `version`; None = only the actor has it
        self._directory: str | None = model_path
        self.registry = EngineRegistry(Path(run_dir)) if config.engine.served else None
        common = dict(
            model_path=model_path, device=device, dtype=dtype, seed=seed, need_text=bool(config.stop)
        )
        self.engines = self._make_engines(Path(run_dir), common)
        self.router = Router(config.engine, self.engines, **common) if config.engine.router else None
        # gives a restarted engine the actor's weights; called in the caller's thread
        self.repush: Callable[[], None] | None = None
        self._counts: Counter[str] = Counter()
        # engines that are being brought back
        self._cares: dict[EngineClient, asyncio.Task[None]] = {}
        self._updating: list[EngineClient] = []
        # requests may be sent; an update that drains closes it
        self._open = True
        self._inbox: queue.SimpleQueue[PushRequest | None] | None = None
        self._calls: set[concurrent.futures.Future[Any]] = set()
        # jitter
        self._random = random.Random(seed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def _make_engines(self, run_dir: Path, common: dict[str, Any]) -> list[EngineClient]:
        config = self.config.engine
        if config.urls:
            return [
                EngineClient(config, url=url, log_path=run_dir / "engine.log", **common)
                for url in config.urls
            ]
        if self.registry is not None:
            return [RemoteEngine(config, self.registry, **common) for _ in range(config.served)]
        names = (
            ["engine.log"]
            if config.num_engines == 1
            else [f"engine-{index}.log" for index in range(config.num_engines)]
        )
        return [
            EngineClient(config, index=index, log_path=run_dir / name, **common)
            for index, name in enumerate(names)
        ]

    # ---- life ------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the engines' processes and return at once, to overlap their start with other work;
        `wait_ready` must follow.

        URLs are asked here already: UserError for one that no SGLang server of this model answers
        at, and for more engines than GPUs.
        """
        if self._loop is None:
            self._check_gpus()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
            self._thread.start()
            atexit.register(self.close)

        # in the loop's thread: an engine dies with the thread that started it
        async def launch() -> None:
            if self.registry is not None:
                self.registry.open()
            for engine in self.engines:
                if engine.restartable:
                    engine.launch()
                else:
                    # a URL that does not answer is told before a model is built
                    await engine.wait_ready()

        try:
            self._call(launch())
        except BaseException:
            self.close()
            raise

    def _check_gpus(self) -> None:
        config = self.config.engine
        if self.device != "cuda" or not self.engines[0].owned:
            return
        # here: what only talks to engines does without it
        import torch

        wanted, found = config.num_engines * config.tensor_parallel_size, torch.cuda.device_count()
        if wanted > found:
            raise UserError(
                f"rollout.engine.num_engines={config.num_engines}: with"
                f" rollout.engine.tensor_parallel_size={config.tensor_parallel_size} they take {wanted} GPUs,"
                f" and this machine shows {found}; lower one"
            )

    def wait_ready(self) -> None:
        """Until every engine answers. StartError with the log's last error, UserError for a URL or
        an engine that nobody announced.
        """
        try:
            self._call(self._wait_ready())
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the engines, or check the given URLs, and have them serve model_path as version 0."""
        self.launch()
        self.wait_ready()

    async def _wait_ready(self) -> None:
        await _together([self._greet(engine) for engine in self.engines])
        if self.router is not None:
            await self.router.wait_ready()

    async def _greet(self, engine: EngineClient) -> None:
        await engine.wait_ready()
        if engine.owned:
            return
        # it may hold another run's weights, or half of them
        try:
            await engine.leave_update()
            await engine.load_weights(self.model_path, 0)
        except (EngineError, Unreachable) as error:
            raise UserError(
                f"rollout.engine.urls: {engine.url} cannot load model.path {self.model_path}: {error}"
            ) from error

    def close(self) -> None:
        """Kill the owned engines, let served ones know, and stop the loop; may be called twice."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    async def _close(self) -> None:
        for future in list(self._calls):
            future.cancel()
        # first: it might start an engine anew
        for task in self._cares.values():
            task.cancel()
        await asyncio.gather(*self._cares.values(), return_exceptions=True)
        for engine in [*([self.router] if self.router is not None else []), *self.engines]:
            await engine.close()
        if self.registry is not None:
            await self.registry.close()

    def __enter__(self) -> EnginePool:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- calls from other threads ----------------------------------------------------------------

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
        """As `_call`, but a restarted engine that needs the actor's weights gets them here:
        `repush` is collective, hence this thread's.
        """
        if self.repush is None:
            return self._call(coroutine)
        inbox: queue.SimpleQueue[PushRequest | None] = queue.SimpleQueue()
        self._inbox = inbox
        future = self._submit(coroutine)
        self._calls.add(future)
        future.add_done_callback(lambda _: inbox.put(None))
        try:
            while (asked := inbox.get()) is not None:
                if not asked.set_running_or_notify_cancel():
                    continue
                try:
                    # one push serves all who asked
                    if any(engine.alive and engine.held != self.version for engine in self.engines):
                        self.repush()
                    asked.set_result(None)
                except Exception as error:
                    asked.set_exception(error)
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._calls.discard(future)
            self._inbox = None
            # the others were faster: it gets its weights with the next push, or call
            with contextlib.suppress(queue.Empty):
                while True:
                    late = inbox.get_nowait()
                    if late is not None:
                        late.cancel()

    def cancel(self) -> None:
        """Break off a `generate` that runs in another thread: it raises CancelledError there."""
        for future in list(self._calls):
            future.cancel()

    # ---- what went wrong -------------------------------------------------------------------------

    async def _recover(self, engine: EngineClient, incarnation: int) -> None:
        """After a failed request: have the engine seen to, beside this. Returns as soon as one can
        be asked; EngineError when none can.
        """
        task = self._cares.get(engine)
        if task is None or task.done():
            task = self._cares[engine] = asyncio.ensure_future(self._revive(engine, incarnation))
            # somebody has looked at it
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        while not task.done() and not set(self._living()) - {engine}:
            await asyncio.wait({task}, timeout=0.05)
        if (
            task.done()
            and not self._living()
            and not task.cancelled()
            and isinstance(task.exception(), EngineError)
        ):
            task.result()

    async def _settle(self) -> None:
        """Before a push: engines that are being brought back take part in it.

        All but one of another machine that nobody has announced again: while others live, the next
        call goes on looking for it.
        """
        for engine, task in self._cares.items():
            if (
                not task.done()
                and isinstance(engine, RemoteEngine)
                and not engine.alive
                and engine.lock.locked()
                and self._living()
            ):
                task.cancel()
        pending = [task for task in self._cares.values() if not task.done()]
        if pending:
            await asyncio.wait(pending)

    async def _revive(self, engine: EngineClient, incarnation: int) -> None:
        """After a failed request: restart a dead engine of ours, set a dead URL aside; give a
        living one the right weights.
        """
        async with engine.lock:
            if engine.incarnation != incarnation:
                # another request has seen to it
                return
            # whoever answers at its URL now is to be announced first
            gone = isinstance(engine, RemoteEngine) and not engine.alive
            reason = engine.reason if gone else await engine.why_dead()
            if reason is None:
                if engine.held is not None and await self._version_of(engine) != str(self.version):
                    await self._give_weights(engine)
                return
            engine.alive, engine.reason, engine.held = False, reason, None
            if not engine.restartable:
                engine.incarnation += 1
                return
            engine.kill()
            while True:
                if engine.restarts >= self.config.engine.max_restarts:
                    engine.lost = True
                    limit = f"rollout.engine.max_restarts={self.config.engine.max_restarts}"
                    raise EngineError(
                        f"the engine died again after {limit}: {reason}; {engine.last_error()} (log:"
                        f" {engine.log_path})"
                    )
                engine.restarts += 1
                self._counts["restarts"] += 1
                try:
                    engine.launch()
                    await engine.wait_ready()
                    if not engine.owned or self.version != 0 or self._directory != self.model_path:
                        # not before it has the weights
                        engine.held = None
                        await self._give_weights(engine)
                    if self.router is not None:
                        await self.router.enlist(engine)
                    return
                except (EngineError, Unreachable) as error:
                    reason = str(error)
                    engine.kill()
                except asyncio.CancelledError:
                    # by _settle: it was not found, and will be looked for again
                    engine.restarts -= 1
                    raise

    async def _give_weights(self, engine: EngineClient) -> None:
        """Bring an engine to `version`: from the directory, or by a push from the actor; without a
        thread to do that it stays without.
        """
        engine.held = None
        inbox = self._inbox
        if self._directory is not None:
            await engine.leave_update()
            await engine.load_weights(self._directory, self.version)
        elif inbox is not None and self.repush is not None:
            asked: PushRequest = concurrent.futures.Future()
            inbox.put(asked)
            # the call ended meanwhile
            if self._inbox is not inbox:
                asked.cancel()
            try:
                await asyncio.wrap_future(asked)
            except Exception as error:
                # the push failed; if because the engine died again, it is for the caller to restart
                # it
                if isinstance(error.__cause__, Unreachable):
                    raise Unreachable(str(error)) from error
                raise

    async def _version_of(self, engine: EngineClient) -> str:
        try:
            return await engine.weight_version()
        except Unreachable:
            return "unknown"

    async def _attend(self) -> None:
        """Before a call: bring back engines that an earlier call left for dead."""
        for engine in self.engines:
            if engine.alive:
                # a push will see to it
                away = engine.distrusted or engine.released or engine.paused or engine in self._updating
                if engine.held is None and not away and not engine.lock.locked():
                    # it came back when nobody could give it weights
                    async with engine.lock:
                        await self._give_weights(engine)
            elif engine.restartable:
                if not engine.lost or not self._living():
                    await self._recover(engine, engine.incarnation)
            else:
                # still away; the others go on
                with contextlib.suppress(UserError, Unreachable):
                    await engine.wait_ready()
                    await self._give_weights(engine)

    async def _correct_versions(self) -> None:
        """After a stale sample: an engine that somebody restarted behind its URL gets the weights again."""
        for engine in self.engines:
            async with engine.lock:
                if engine.up and await self._version_of(engine) not in ("unknown", str(self.version)):
                    # the next request finds out
                    with contextlib.suppress(Unreachable):
                        await self._give_weights(engine)

    def _no_engine(self, when: str) -> UserError:
        lost = "; ".join(f"{engine.url} ({engine.reason})" for engine in self.engines)
        if self.engines[0].restartable:
            return UserError(f"rollout.engine: no engine is left {when}: {lost}")
        return UserError(
            f"rollout.engine.urls: no engine is left {when}: {lost}; start it again, or take it out of the"
            " list"
        )

    # ---- who is asked ----------------------------------------------------------------------------

    def _living(self) -> list[EngineClient]:
        """Engines that may be asked now; one that is being looked after may be dead."""
        return [
            engine for engine in self.engines if engine.up and not engine.paused and not engine.lock.locked()
        ]

    async def _available(self) -> EngineClient:
        """The living engine with the fewest tokens asked of it, or the router; waits while none can
        be asked but one will.
        """
        while True:
            living = self._living()
            if living and self._open:
                return self.router or min(living, key=lambda engine: engine.busy)
            if not any((engine.restartable and not engine.lost) or engine.alive for engine in self.engines):
                raise self._no_engine("for a request")
            if not any(
                (engine.up and not engine.paused)
                or engine.lock.locked()
                or engine in self._updating
                or not (engine.alive or engine.lost)
                for engine in self.engines
            ):
                raise EngineError(
                    "the last push of weights failed and left no engine with a whole version; push again"
                    " first"
                )
            await asyncio.sleep(0.05)

    async def _back_off(self, attempt: int) -> None:
        await asyncio.sleep(min(0.1 * 2**attempt, 5.0) * self._random.uniform(0.5, 1.0))


async def _together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them at once, each to its end; then raise the first error. What one engine does must not
    be cut short by another's failure.
    """
    for result in await asyncio.gather(*coroutines, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
