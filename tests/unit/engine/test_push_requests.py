"""How another thread asks the thread that may push.

Proves: a request is served in the thread that waits, once for all whom one push serves; it is
refused while nobody waits and nobody will; requests that nobody served are cancelled; a failed push
fails its request, and the wait where that is wanted. Does not prove that a pool's engines get their
weights so (test_pool.py, trainer/test_prefetch.py).
"""

from __future__ import annotations

import concurrent.futures
import threading

import pytest

from megasd.engine.push_requests import PushRequests


class Work:
    """Work of another thread, which asks for pushes while the caller waits for it."""

    def __init__(self, requests: PushRequests, count: int = 1) -> None:
        self.requests, self.needed = requests, True
        self.result: concurrent.futures.Future[str] = concurrent.futures.Future()
        self.asked = [requests.submit(lambda: self.needed) for _ in range(count)]
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        concurrent.futures.wait(self.asked, timeout=60)
        self.result.set_result("done")


def test_one_push_in_the_waiting_thread_serves_all() -> None:
    requests, pushed = PushRequests(), []

    def push() -> None:
        pushed.append(threading.current_thread())
        work.needed = False

    requests.open()
    work = Work(requests, 3)
    with requests.served_by(push):
        assert requests.wait(work.result) == "done"
    assert pushed == [threading.current_thread()] and all(one.result(0) is None for one in work.asked)
    # whoever opened it closes it
    assert requests.is_open


def test_nobody_waits() -> None:
    requests = PushRequests()
    assert not requests.is_open and requests.submit(lambda: True).cancelled()
    requests.open()
    late = requests.submit(lambda: True)
    requests.close()
    assert late.cancelled() and not requests.is_open


def test_a_thread_that_may_not_push_only_waits() -> None:
    requests = PushRequests()
    requests.open()
    kept, done = requests.submit(lambda: True), concurrent.futures.Future()
    done.set_result(7)
    assert requests.wait(done) == 7 and not kept.done()


def test_a_failed_push_fails_its_request_and_the_wait_if_wanted() -> None:
    def push() -> None:
        raise RuntimeError("no push")

    requests = PushRequests()
    requests.open()
    work = Work(requests)
    with requests.served_by(push):
        assert requests.wait(work.result) == "done"
        with pytest.raises(RuntimeError, match="no push"):
            work.asked[0].result(0)
        again = Work(requests)
        with pytest.raises(RuntimeError, match="no push"):
            requests.wait(again.result, raise_failed_push=True)


def test_a_preempted_push_cancels_its_request() -> None:
    def push() -> None:
        raise KeyboardInterrupt

    requests = PushRequests()
    requests.open()
    work = Work(requests)
    with requests.served_by(push), pytest.raises(KeyboardInterrupt):
        requests.wait(work.result)
    with pytest.raises(concurrent.futures.CancelledError):
        work.asked[0].result(60)
