"""Watch the engines of a pool, bring dead engines back, and choose the engine of a request.

While an engine is brought back, its requests are sent to the other engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from megasd.config.schema import EngineConfig
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.remote import RemoteEngine
from megasd.engine.router import Router
from megasd.engine.target_weights import TargetWeights
from megasd.types import UserError


class EngineHealth:
    """The state of a pool's engines. All coroutines belong to the pool's event loop.

    An engine that comes back gets the weights of `target`. `updating`: the engines of an open live
    update. `accepts_requests`: False while such an update waits for running requests to end.
    """

    def __init__(
        self,
        config: EngineConfig,
        engines: list[EngineClient],
        router: Router | None,
        target: TargetWeights,
    ) -> None:
        self.config, self.engines, self.router, self.target = config, engines, router, target
        self.updating: list[EngineClient] = []
        self.accepts_requests = True
        # The restarts of all engines since the start of the run.
        self.num_restarts = 0
        # The engines that are being brought back, each with its task.
        self._revivals: dict[EngineClient, asyncio.Task[None]] = {}

    # ---- which engine is asked -------------------------------------------------------------------

    def living(self) -> list[EngineClient]:
        """Engines that may be asked for samples now."""
        # If the lock of an engine is taken, the engine is being revived and may be dead.
        return [
            engine
            for engine in self.engines
            if engine.up and not engine.applied.paused and not engine.lock.locked()
        ]

    async def available(self) -> EngineClient:
        """The living engine with the fewest tokens in flight, or the router in its place.

        Waits if no engine is available now but one is being brought back. UserError if all engines
        are lost; EngineError if a failed push left all engines without weights.
        """
        while True:
            living = self.living()
            if living and self.accepts_requests:
                return self.router or min(living, key=lambda engine: engine.busy)
            if not any((engine.restartable and not engine.lost) or engine.alive for engine in self.engines):
                raise self.no_engine("for a request")
            if not any(
                (engine.up and not engine.applied.paused)
                or engine.lock.locked()
                or engine in self.updating
                or not (engine.alive or engine.lost)
                for engine in self.engines
            ):
                raise EngineError(
                    "the last push of weights failed and left no engine with a whole version; push again"
                    " first"
                )
            await asyncio.sleep(0.05)

    def no_engine(self, when: str) -> UserError:
        """The error to raise if every engine is lost; it says why each engine is lost."""
        lost = "; ".join(f"{engine.url} ({engine.reason})" for engine in self.engines)
        if self.engines[0].restartable:
            return UserError(f"rollout.engine: no engine is left {when}: {lost}")
        return UserError(
            f"rollout.engine.urls: no engine is left {when}: {lost}; start it again, or take it out of the"
            " list"
        )

    # ---- bringing engines back -------------------------------------------------------------------

    async def recover_any(self, engine: EngineClient, incarnation: int) -> None:
        """After a failed request: revive the engine in the background.

        Returns when any engine can be asked. EngineError if no engine can.
        """
        task = self._revivals.get(engine)
        if task is None or task.done():
            task = self._revivals[engine] = asyncio.ensure_future(self.revive(engine, incarnation))
            # Read the exception; otherwise asyncio logs that nobody read it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        while not task.done() and not set(self.living()) - {engine}:
            await asyncio.wait({task}, timeout=0.05)
        if (
            task.done()
            and not self.living()
            and not task.cancelled()
            and isinstance(task.exception(), EngineError)
        ):
            task.result()

    async def revive(self, engine: EngineClient, incarnation: int) -> None:
        """After a failed request to this incarnation of an engine: repair the engine.

        A dead engine is restarted, or set aside if the run does not own it. A living engine that
        names another version gets the target weights. EngineError if the engine is dead for good.
        """
        async with engine.lock:
            if engine.incarnation != incarnation:
                # Another request has repaired the engine.
                return
            # Another server may answer at the URL of a remote engine: it must announce itself first.
            gone = isinstance(engine, RemoteEngine) and not engine.alive
            reason = engine.reason if gone else await engine.why_dead()
            if reason is None:
                if (
                    engine.applied.version is not None
                    and await self.target.read_version(engine) != self.target.version
                ):
                    await self.target.apply(engine)
                return
            engine.alive, engine.reason, engine.applied.version = False, reason, None
            if engine.restartable:
                engine.kill()
                await self._restart(engine, reason)
            else:
                engine.incarnation += 1

    async def _restart(self, engine: EngineClient, reason: str) -> None:
        """Start an engine again until it answers and holds the target weights.

        An engine is restarted at most max_restarts times in its life.
        """
        while True:
            if engine.restarts >= self.config.max_restarts:
                engine.lost = True
                limit = f"rollout.engine.max_restarts={self.config.max_restarts}"
                raise EngineError(
                    f"the engine died again after {limit}: {reason}; {engine.last_error()} (log:"
                    f" {engine.log_path})"
                )
            engine.restarts += 1
            self.num_restarts += 1
            try:
                engine.launch()
                await engine.wait_ready()
                if not (engine.owned and self.target.is_start_model):
                    # The engine is asked for samples only when it has the weights.
                    engine.applied.version = None
                    await self.target.apply(engine)
                if self.router is not None:
                    await self.router.enlist(engine)
                return
            except (EngineError, Unreachable) as error:
                reason = str(error)
                engine.kill()
            except asyncio.CancelledError:
                # `settle` gave the engine up because nobody announced it. The next call looks for
                # the engine again.
                engine.restarts -= 1
                raise

    async def settle(self) -> None:
        """Before a push: wait for the engines that are being brought back, so that they get it too.

        If some engine lives, engines on other machines are skipped until they announce themselves
        again.
        """
        for engine, task in self._revivals.items():
            if (
                not task.done()
                and isinstance(engine, RemoteEngine)
                and not engine.alive
                and engine.lock.locked()
                and self.living()
            ):
                task.cancel()
        pending = [task for task in self._revivals.values() if not task.done()]
        if pending:
            await asyncio.wait(pending)

    async def attend(self) -> None:
        """Before a call: bring back engines that an earlier call left dead or without weights."""
        for engine in self.engines:
            if engine.alive:
                # Such an engine gets its weights with the next push.
                waits = (
                    engine.applied.distrusted
                    or engine.applied.released
                    or engine.applied.paused
                    or engine in self.updating
                )
                if engine.applied.version is None and not waits and not engine.lock.locked():
                    # The engine came back when no thread could give it weights.
                    async with engine.lock:
                        await self.target.apply(engine)
            elif engine.restartable:
                if not engine.lost or not self.living():
                    await self.recover_any(engine, engine.incarnation)
            else:
                # If the engine is still away, the other engines go on.
                with contextlib.suppress(UserError, Unreachable):
                    await engine.wait_ready()
                    await self.target.apply(engine)

    async def correct_versions(self) -> None:
        """After a stale sample: give the target weights to every engine that lacks them.

        Somebody may have restarted an engine, or written other weights into it.
        """
        for engine in self.engines:
            async with engine.lock:
                if engine.up and await self.target.read_version(engine) not in (None, self.target.version):
                    # If the engine is dead, the next request finds out.
                    with contextlib.suppress(Unreachable):
                        await self.target.apply(engine)

    async def stop(self) -> None:
        """Give up engines that are being brought back, so that no engine is started from now on."""
        tasks: Sequence[asyncio.Task[None]] = list(self._revivals.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
