"""The batch that is sampled while another is learned, with SGLang's control endpoints as a state
machine (control_server.py).

Proves: it runs beside the caller; an engine that loses its weights meanwhile is given the newer
ones when the caller waits, in the caller's thread, and its samples say so; what fails in it fails
where it is waited for; it can be given up; an older sample than the config allows is an error. Does
not prove what a run makes of it (tests/integration/test_placement.py).
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable

import pytest

from megasd.config.schema import RolloutConfig
from megasd.engine.errors import EngineError
from megasd.trainer.prefetch import Prefetcher, staleness
from megasd.types import Group, Prompt, Sample
from megasd.weight_sync.sync import SyncError
from tests.unit.engine.control_server import once
from tests.unit.engine.test_pool import Pushes, pushes  # noqa: F401


def ask(one: Pushes, prompts: int = 4) -> tuple[list[Group], dict[str, float]]:
    groups = one.rollout.generate(
        [Prompt(id=f"q{i}", messages=[], answer="") for i in range(prompts)],
        [[1, 2]] * prompts,
        str,
        step=0,
        num_samples=1,
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=3,
    )
    return groups, {"figure": 1.0}


def versions(groups: list[Group]) -> set[int]:
    return {sample.version for group in groups for sample in group.samples}


def never() -> None:
    raise AssertionError("no engine lost its weights")


def wait(one: Pushes, ahead: Prefetcher, push: Callable[[], None]) -> None:
    """As the trainer does it: this thread may push."""
    with one.rollout.pool.push_requests.served_by(push):
        ahead.wait()


def test_a_batch_comes_in_beside_the_caller(pushes: Callable[..., Pushes]) -> None:
    one, ahead = pushes(1), Prefetcher()
    assert ahead.take() is None and ahead.before is None
    # nothing was started
    wait(one, ahead, never)
    ahead.start(one.rollout, {"position": 3}, lambda: ask(one))
    assert ahead.before == {"position": 3}
    wait(one, ahead, never)
    one.sync.push(2)
    groups, figures = ahead.take()
    assert versions(groups) == {1} and figures == {"figure": 1.0}
    assert ahead.take() is None and ahead.before is None


def test_an_engine_that_lost_its_weights_gets_the_newer_ones_where_the_caller_waits(
    pushes: Callable[..., Pushes],
) -> None:
    one, ahead, seen = pushes(1), Prefetcher(), []
    one.servers[0].restart()
    one.servers[0].fail["/generate"] = once((500, {"message": "gone"}))
    ahead.start(one.rollout, {}, lambda: ask(one))
    # it wishes for weights before anybody waits
    while one.rollout.pool.push_requests._queue.empty():
        time.sleep(0.01)

    def push() -> None:
        seen.append(threading.current_thread())
        one.sync.push(2, lacking=True)

    wait(one, ahead, push)
    assert seen == [threading.current_thread()] and versions(ahead.take()[0]) == {2} and one.held == [2]
    # as the run does after the wait, whatever came before
    one.sync.push(2)
    assert one.held == [2]


def test_what_fails_in_it_fails_where_it_is_waited_for(pushes: Callable[..., Pushes]) -> None:
    one, ahead = pushes(1), Prefetcher()
    one.servers[0].fail["/generate"] = lambda body: (400, {"message": "the true reason"})
    ahead.start(one.rollout, {}, lambda: ask(one, 1))
    with pytest.raises(EngineError, match="the true reason"):
        wait(one, ahead, never)


def test_a_push_that_fails_ends_it(pushes: Callable[..., Pushes]) -> None:
    one, ahead = pushes(1), Prefetcher()
    one.servers[0].restart()
    one.servers[0].fail["/generate"] = once((500, {"message": "gone"}))
    ahead.start(one.rollout, {}, lambda: ask(one))

    def push() -> None:
        raise SyncError("out of memory")

    with pytest.raises(SyncError, match="out of memory"):
        wait(one, ahead, push)
    with pytest.raises((concurrent.futures.CancelledError, SyncError)):
        ahead._batch.result.result(timeout=120)


@pytest.mark.parametrize("lost", [False, True])
def test_it_can_be_given_up(pushes: Callable[..., Pushes], lost: bool) -> None:
    """While an engine answers nothing, or waits for weights that will not come."""
    one, ahead = pushes(1), Prefetcher()
    if lost:
        one.servers[0].restart()
        one.servers[0].fail["/generate"] = once((500, {"message": "gone"}))
    else:
        one.servers[0].paused = True
    ahead.start(one.rollout, {"position": 3}, lambda: ask(one))
    while one.rollout.pool.push_requests._queue.empty() if lost else one.servers[0].waiting == 0:
        time.sleep(0.01)
    ahead.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        # neither answer nor weights ever come
        ahead._batch.result.result(120)
    # these questions are asked again
    assert ahead.before == {"position": 3}


def test_staleness() -> None:
    def groups(*ages: int, logps: list[float] | None = None) -> list[Group]:
        samples = [
            Sample("q", i, [1], [2], [-1.0] if logps is None else logps, "", "stop", 7 - age)
            for i, age in enumerate(ages)
        ]
        return [Group(Prompt("q", [], ""), samples)]

    ahead, at_once = RolloutConfig(overlap=1), RolloutConfig()
    assert staleness(groups(0, 1, 1, 0), 7, ahead) == {
        "rollout/stale_samples": 2.0, "rollout/max_staleness": 1.0, "rollout/mean_staleness": 0.5,
    }  # fmt: skip
    assert staleness(groups(0, 0), 7, at_once)["rollout/max_staleness"] == 0
    for ages, config in (((2,), ahead), ((1,), at_once), ((-1,), ahead)):
        with pytest.raises(RuntimeError, match="sample q/0 of step 7 is of weight version"):
            staleness(groups(*ages), 7, config)
    assert staleness(groups(5), 7, RolloutConfig(allow_stale=True))["rollout/max_staleness"] == 5
    # a row's own solution
    assert staleness(groups(7, logps=[]), 7, at_once)["rollout/stale_samples"] == 0
    assert staleness(groups(7), 7, RolloutConfig(frozen_policy=True)) == {}
