"""An asyncio event loop in a thread of its own, behind synchronous calls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class _Running(NamedTuple):
    """A loop and the thread that it runs in."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread


class EventLoopThread:
    """An event loop that runs from `start` to `stop`, so that connections outlive a call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._running: _Running | None = None

    @property
    def is_running(self) -> bool:
        """Whether the loop takes coroutines."""
        return self._running is not None

    def start(self) -> None:
        """Start the thread."""
        loop = asyncio.new_event_loop()
        self._running = _Running(loop, threading.Thread(target=loop.run_forever, name=self.name, daemon=True))
        self._running.thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the loop and return at once; RuntimeError if the loop is stopped."""
        if self._running is None:
            coroutine.close()
            raise RuntimeError("the engine pool has not been started, or is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._running.loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for its result."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `last` in the loop, then end the thread. Does nothing when the loop does not run."""
        running, self._running = self._running, None
        if running is None:
            return
        asyncio.run_coroutine_threadsafe(last(), running.loop).result()
        running.loop.call_soon_threadsafe(running.loop.stop)
        running.thread.join()
        running.loop.close()


async def finish_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run the coroutines together, each to its end, then raise the first error.

    What one engine does is not cut short by the failure of another engine.
    """
    for result in await asyncio.gather(*coroutines, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def cancel_on_error(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of coroutines that run together; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
