"""How another thread asks the main thread for a push of weights.

An engine that crashed and came back holds the start model. When the current weights exist only in
the actor, the engine needs a push. A push is collective: every rank takes part, and on rank 0 the
main thread starts it. The engines' event loop and the prefetch thread can therefore only ask.

    with requests.served_by(push):       # main thread: from here on the other ranks can take part
        requests.wait(future)            # until `future` is done; meanwhile calls `push` when asked

    requests.submit(is_needed)           # any other thread: a future, done when the push is

A request is refused while nobody waits, since it might be waited for in vain. `open` and `close`
say that somebody will wait later: requests made in between are kept until then.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class PushRequest:
    """A request for a push.

    `is_needed` is called right before the push, since an earlier push may have served the request.
    """

    is_needed: Callable[[], bool]
    done: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


@dataclass(frozen=True)
class _Server:
    """The thread that may push, and the function that pushes."""

    thread: threading.Thread
    push: Callable[[], None]


class PushRequests:
    """Requests for a push, made by any thread and served by the one thread that may push."""

    def __init__(self) -> None:
        # A future in the queue ends the `wait` for it. The futures of abandoned waits are skipped.
        self._queue: queue.SimpleQueue[PushRequest | concurrent.futures.Future[Any]] = queue.SimpleQueue()
        self._server: _Server | None = None
        self._is_open = False
        # The lock makes `submit` and `close` exclude each other.
        self._lock = threading.Lock()

    # ---- any thread ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a thread waits for requests, or will wait."""
        return self._is_open

    def submit(self, is_needed: Callable[[], bool]) -> concurrent.futures.Future[None]:
        """Request a push and return at once.

        The future is done when the push is done, and raises the error of a failed push. It is
        cancelled if no thread waits for requests, or if the wait ends first.
        """
        request = PushRequest(is_needed)
        with self._lock:
            if self._is_open:
                self._queue.put(request)
            else:
                request.done.cancel()
        return request.done

    # ---- the thread that may push ----------------------------------------------------------------

    @contextlib.contextmanager
    def served_by(self, push: Callable[[], None]) -> Iterator[None]:
        """In this block the calling thread may push: `wait` calls `push` for requests."""
        before, self._server = self._server, _Server(threading.current_thread(), push)
        try:
            yield
        finally:
            self._server = before

    def open(self) -> None:
        """Keep the requests that come from here on for a later `wait`."""
        self._is_open = True

    def close(self) -> None:
        """Refuse requests from here on, and cancel the requests that were not served."""
        with self._lock:
            self._is_open = False
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, PushRequest):
                    item.done.cancel()

    def wait(self, future: concurrent.futures.Future[T], *, raise_failed_push: bool = False) -> T:
        """Wait for the result of `future`; in a block of `served_by`, serve requests meanwhile.

        A failed push fails the future of its request; with `raise_failed_push` it also raises here.
        """
        server = self._server
        if server is None or server.thread is not threading.current_thread():
            return future.result()
        opened_here = not self._is_open
        self.open()
        future.add_done_callback(self._queue.put)
        try:
            while (item := self._queue.get()) is not future:
                if isinstance(item, PushRequest):
                    self._serve(item, server.push, raise_failed_push)
            return future.result()
        finally:
            # Requests that come too late get their weights with the next push, or in the next call.
            if opened_here:
                self.close()

    @staticmethod
    def _serve(request: PushRequest, push: Callable[[], None], raise_failed_push: bool) -> None:
        if not request.done.set_running_or_notify_cancel():
            return
        try:
            if request.is_needed():
                push()
            request.done.set_result(None)
        except Exception as error:
            request.done.set_exception(error)
            if raise_failed_push:
                raise
        except BaseException:
            request.done.set_exception(concurrent.futures.CancelledError())
            raise
