"""The pool of a run's engines: it starts, watches, revives and closes them.

Synchronous outside (rank 0 calls it), asyncio inside: one event loop in one thread for the whole
run, so that connections and engines outlive a call.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from megasd.config.schema import RolloutConfig
from megasd.engine.client import EngineClient
from megasd.engine.event_loop import EventLoopThread, finish_all
from megasd.engine.health import EngineHealth
from megasd.engine.remote import EngineRegistry, RemoteEngine
from megasd.engine.router import Router
from megasd.engine.target_weights import TargetWeights
from megasd.types import UserError

T = TypeVar("T")


class EnginePool:
    """The engines, their `health`, and the event loop that their coroutines run in.

    `target`: the weights that an engine must hold before it is asked for samples. A started engine
    loads target.model_path.
    """

    def __init__(
        self,
        config: RolloutConfig,
        target: TargetWeights,
        *,
        device: str,
        dtype: str,
        run_dir: Path,
        seed: int,
    ) -> None:
        self.config, self.target, self.device = config, target, device
        self.registry = EngineRegistry(run_dir) if config.engine.served else None
        common = dict(
            model_path=target.model_path, device=device, dtype=dtype, seed=seed, need_text=bool(config.stop)
        )
        self.engines = self._make_engines(run_dir, common)
        self.router = Router(config.engine, self.engines, **common) if config.engine.router else None
        self.push_requests = target.push_requests
        self.health = EngineHealth(config.engine, self.engines, self.router, target)
        self._loop = EventLoopThread("engines")
        # The pool has its own generator, so that the global generator is not disturbed.
        self._random = random.Random(seed)
        self._runs: set[concurrent.futures.Future[Any]] = set()

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

    # ---- start and end ---------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the engines' processes and return at once, to overlap their start with other work.

        `wait_ready` must follow.

        Engines given by URL must answer already: UserError if no SGLang server of this model
        answers there. UserError for more engines than GPUs.
        """
        if not self._loop.is_running:
            self._check_gpus()
            self._loop.start()
            atexit.register(self.close)

        async def launch() -> None:
            if self.registry is not None:
                self.registry.open()
            for engine in self.engines:
                if engine.restartable:
                    # Start it in the loop's thread: an engine dies with the thread that started it.
                    engine.launch()
                else:
                    # Check now, so that the user hears of a wrong URL before a model is built.
                    await engine.wait_ready()

        try:
            self.call(launch())
        except BaseException:
            self.close()
            raise

    def _check_gpus(self) -> None:
        config = self.config.engine
        if self.device != "cuda" or not self.engines[0].owned:
            return
        # Imported here, since a process that only talks to engines needs no torch.
        import torch

        wanted, found = config.num_engines * config.tensor_parallel_size, torch.cuda.device_count()
        if wanted > found:
            raise UserError(
                f"rollout.engine.num_engines={config.num_engines}: with"
                f" rollout.engine.tensor_parallel_size={config.tensor_parallel_size} they take {wanted} GPUs,"
                f" and this machine shows {found}; lower one"
            )

    def wait_ready(self) -> None:
        """Wait until every engine answers.

        StartError with the log's last error; UserError for a URL that does not answer, or an engine
        that nobody announced.
        """
        try:
            self.call(self._wait_ready())
        except BaseException:
            self.close()
            raise

    async def _wait_ready(self) -> None:
        await finish_all(self._greet(engine) for engine in self.engines)
        if self.router is not None:
            await self.router.wait_ready()

    async def _greet(self, engine: EngineClient) -> None:
        await engine.wait_ready()
        if not engine.owned:
            await self.target.greet(engine)

    def start(self) -> None:
        """Call `launch` and `wait_ready`; afterwards every engine serves the target weights."""
        self.launch()
        self.wait_ready()

    def close(self) -> None:
        """Kill the owned engines, tell `megasd serve` that the run has ended, and stop the loop.

        It may be called twice.
        """
        atexit.unregister(self.close)
        self._loop.stop(self._close)

    async def _close(self) -> None:
        self.cancel()
        # Stop this first, since it might start an engine again.
        await self.health.stop()
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

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the engines' loop and return at once."""
        return self._loop.submit(coroutine)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the engines' loop and wait for its result."""
        return self._loop.call(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine as `call` does, and serve requests for a push of weights meanwhile.

        An engine that is restarted meanwhile may need a push. If this thread may push, it pushes
        here (see PushRequests). `cancel` ends the wait.
        """
        future = self.submit(coroutine)
        self._runs.add(future)
        try:
            return self.push_requests.wait(future)
        except BaseException:
            future.cancel()
            raise
        finally:
            self._runs.discard(future)

    def cancel(self) -> None:
        """Break off every `run` of another thread: it raises CancelledError there."""
        for future in list(self._runs):
            future.cancel()

    async def back_off(self, attempt: int) -> None:
        """Wait before a request is sent again.

        The wait is 0.1 s, doubled with each attempt up to 5 s, with jitter.
        """
        await asyncio.sleep(min(0.1 * 2**attempt, 5.0) * self._random.uniform(0.5, 1.0))
