"""One batch ahead (rollout.overlap=1): a thread of rank 0 samples and scores the next batch while
every rank learns this one.

    ahead.start(rollout, before, work)    # the engines hold version k, and batch k is about to be learned
    ...                                   # the optimizer's steps
    # main thread, the actor at version k + 1: returns when `work` has; raises what it raised
    ahead.wait(push)
    groups, figures = ahead.take()        # batch k + 1, of weights k

An engine that loses its weights meanwhile needs every rank to get others, so its wish waits for
`wait` and is served there, with version k + 1. A sample is thus of version k, of k + 1, or of both;
which, it says. What corrects for that is algorithm.tis_clip: the engine's log-prob of a token is of
the weights that sampled it, the trainer's of those before this batch's first step.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any

from megasd.config.schema import RolloutConfig
from megasd.engine.sampler import Sampler
from megasd.types import Group

PrefetchResult = tuple[list[Group], dict[str, float]]


class Prefetcher:
    """At most one batch at a time. `before`: the questions' iterator before the batch that is not
    learned yet; None when there is none.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self._rollout: Sampler | None = None
        self._inbox: queue.SimpleQueue[concurrent.futures.Future[None] | None] = queue.SimpleQueue()
        self._running: concurrent.futures.Future[PrefetchResult] | None = None

    def start(self, rollout: Sampler, before: dict[str, Any], work: Callable[[], PrefetchResult]) -> None:
        """Run `work`, which asks `rollout`, in a thread."""
        inbox: queue.SimpleQueue[concurrent.futures.Future[None] | None] = queue.SimpleQueue()
        running: concurrent.futures.Future[PrefetchResult] = concurrent.futures.Future()
        self.before, self._rollout, self._inbox, self._running = before, rollout, inbox, running

        # in the thread: an engine needs weights
        def ask() -> None:
            wish: concurrent.futures.Future[None] = concurrent.futures.Future()
            inbox.put(wish)
            wish.result()

        def run() -> None:
            try:
                running.set_result(work())
            except BaseException as error:
                running.set_exception(error)
            inbox.put(None)

        rollout.repush = ask
        threading.Thread(target=run, name="ahead", daemon=True).start()

    def wait(self, push: Callable[[], None]) -> None:
        """Until the batch has come in, if one was started; `push` gives engines the actor's
        weights, in the caller's thread.
        """
        if self._running is None:
            return
        while (wish := self._inbox.get()) is not None:
            try:
                push()
                wish.set_result(None)
            except Exception as error:
                # engines without weights might be waited for in vain
                wish.set_exception(error)
                self._rollout.cancel()
                raise
            except BaseException:
                wish.cancel()
                raise
        self._rollout.repush = None
        self._running.result()

    def take(self) -> PrefetchResult | None:
        """The batch that has come in, once; None when none was started."""
        if self._running is None:
            return None
        running, self._running, self.before = self._running, None, None
        return running.result()

    def cancel(self) -> None:
        """Give up what is under way, without waiting for it; a batch that has come in stays."""
        if self._running is None or self._running.done():
            return
        self._rollout.cancel()
        try:
            while (wish := self._inbox.get_nowait()) is not None:
                wish.cancel()
        except queue.Empty:
            pass


def staleness(groups: list[Group], step: int, config: RolloutConfig) -> dict[str, float]:
    """How old the sampled responses of a step's batch are, in steps. RuntimeError for one that is
    older than the config allows.

    Rows' own solutions, replays and samples of the start model (frozen_policy) have no age.
    """
    if config.frozen_policy or config.replay_dir is not None:
        return {}
    sampled = [sample for group in groups for sample in group.samples if sample.response_logps]
    ages = [step - sample.version for sample in sampled]
    for age, sample in zip(ages, sampled, strict=True):
        if age < 0 or (age > config.overlap and not config.allow_stale):
            raise RuntimeError(
                f"sample {sample.prompt_id}/{sample.index} of step {step} is of weight version"
                f" {sample.version}; with rollout.overlap={config.overlap} none may be older than"
                f" {step - config.overlap}"
            )
    return {
        "rollout/stale_samples": float(sum(age > 0 for age in ages)),
        "rollout/max_staleness": float(max(ages, default=0)),
        "rollout/mean_staleness": sum(ages) / max(len(ages), 1),
    }
