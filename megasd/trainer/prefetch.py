"""Samples one batch ahead (rollout.overlap=1).

A thread of rank 0 samples and scores the next batch while every rank learns this one.

    # The engines hold version k, and batch k is about to be learned.
    prefetcher.start(sampler, before, work)
    ...                                   # the optimizer's steps
    prefetcher.wait()                     # main thread, the actor at version k + 1; raises what `work` raised
    groups, metrics = prefetcher.take()   # batch k + 1, sampled from weights k

An engine that loses its weights meanwhile needs a push, in which every rank takes part. Its request
waits for `wait`, where the main thread pushes version k + 1. So a sample is of version k, of k + 1,
or of both, and says so. algorithm.tis_clip corrects for that: the engine's log-prob of a token is
of the weights that sampled it, the trainer's log-prob of the weights before this batch's first step.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megasd.config.schema import RolloutConfig
from megasd.engine.sampler import Sampler
from megasd.types import Group

PrefetchResult = tuple[list[Group], dict[str, float]]


@dataclass(frozen=True)
class _Batch:
    """A batch that is being sampled, or has been."""

    # state of the questions' iterator before this batch was drawn
    before: dict[str, Any]
    sampler: Sampler
    result: concurrent.futures.Future[PrefetchResult]


class Prefetcher:
    """Samples at most one batch ahead, in a thread."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None

    @property
    def before(self) -> dict[str, Any] | None:
        """The questions' iterator before the batch that nobody has taken yet; None when there is none."""
        return None if self._batch is None else self._batch.before

    def start(self, sampler: Sampler, before: dict[str, Any], work: Callable[[], PrefetchResult]) -> None:
        """Run `work`, which asks `sampler` for samples, in a thread."""
        batch = self._batch = _Batch(before, sampler, concurrent.futures.Future())
        sampler.pool.push_requests.open()

        def run() -> None:
            try:
                batch.result.set_result(work())
            except BaseException as error:
                batch.result.set_exception(error)

        threading.Thread(target=run, name="prefetch", daemon=True).start()

    def wait(self) -> None:
        """Wait until the batch that was started has come in; raises what its `work` raised.

        The calling thread serves requests for a push meanwhile (PushRequests.served_by). A push
        that fails ends the sampling and raises here: engines without weights might be waited for
        in vain.
        """
        if self._batch is None:
            return
        pool = self._batch.sampler.pool
        try:
            pool.push_requests.wait(self._batch.result, raise_failed_push=True)
        except Exception:
            pool.cancel()
            raise
        pool.push_requests.close()

    def take(self) -> PrefetchResult | None:
        """The batch that has come in, once; None when none was started."""
        if self._batch is None:
            return None
        batch, self._batch = self._batch, None
        return batch.result.result()

    def cancel(self) -> None:
        """Give up a batch that is being sampled, without waiting for it; a batch that has come in stays."""
        if self._batch is None or self._batch.result.done():
            return
        pool = self._batch.sampler.pool
        pool.cancel()
        pool.push_requests.close()


def staleness(groups: list[Group], step: int, config: RolloutConfig) -> dict[str, float]:
    """How old the sampled responses of a step's batch are, in steps.

    RuntimeError for a response that is older than the config allows.

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
