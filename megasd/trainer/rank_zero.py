"""Rank 0 and the ranks that follow it.

Rank 0 alone has the questions, the engine, the verifiers and the files of a run (`RankZero`). Other
ranks wait while it works. Three small objects keep that in order:

    link = RankLink(preemption, is_rank_zero=...)  # a failure or preemption of rank 0 reaches all ranks
    ranks = Leader(link, rank_zero)                # on rank 0
    ranks = Follower(link)                         # on other ranks: the same calls, nothing to do

    tensors = ranks.broadcast(lambda zero: zero.build_batch(groups, step, algorithm))  # collective
    ranks.on_rank_zero(lambda zero: zero.log(...))                                     # no collective
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from megasd.actor.parallel import broadcast_tensors
from megasd.algo.stages import at
from megasd.config.schema import AlgorithmConfig, Config
from megasd.preemption import Preempted, PreemptionSignal
from megasd.trainer import throughput
from megasd.trainer.metrics import MetricSink
from megasd.trainer.orchestrator import Orchestrator
from megasd.trainer.prefetch import Prefetcher, staleness
from megasd.trainer.progress import ProgressPrinter, result_table
from megasd.trainer.run_dir import open_run_dir, write_summary
from megasd.types import Group
from megasd.weight_sync.sync import SyncError

T = TypeVar("T")
Tensors = dict[str, Tensor]
Metrics = dict[str, float]

# Names of the flags that rank 0 sends with a result: `work` raised, the run was preempted.
FAILED, PREEMPTED = "failed", "preempted"
# Rank 0 sends this name alone, in place of a result, when an engine needs the weights again.
PUSH_AGAIN = "push_again"
# Seconds that another rank waits for rank 0 to end first after a failure.
END_SECONDS = 30


class RankLink:
    """Rank 0 does a piece of work while the other ranks wait; failure and preemption reach every rank.

    An engine that dies and is restarted in the middle of such work may need the actor's weights,
    which is the work of all ranks: rank 0 then calls `push_again`, and the waiting ranks take part.
    `push` does one rank's part of that; it is set once the weights can be pushed.
    """

    def __init__(self, preemption: PreemptionSignal, *, is_rank_zero: bool) -> None:
        self.preemption, self.is_rank_zero = preemption, is_rank_zero
        self.push: Callable[[], object] = dict

    def broadcast(self, work: Callable[[], Tensors]) -> Tensors:
        """Rank 0 runs `work`; every rank returns the tensors that `work` made.

        Raises on rank 0 what `work` raised; every other rank then ends by SystemExit, after rank 0.
        Raises Preempted on every rank when rank 0 received a signal before or during the work.
        Collective: one broadcast, and one more for each push that an engine asks for meanwhile.
        """
        tensors: Tensors = {}
        failure, is_preempted = None, False
        if self.is_rank_zero:
            try:
                with self.preemption.interruptible():
                    tensors = work()
            except Exception as error:
                failure = error
            except Preempted:
                is_preempted = True
        flags = {FAILED: torch.tensor(failure is not None), PREEMPTED: torch.tensor(is_preempted)}
        found = broadcast_tensors(tensors | flags if self.is_rank_zero else None)
        while PUSH_AGAIN in found:
            # A failed push is rank 0's matter.
            with contextlib.suppress(SyncError):
                self.push()
            found = broadcast_tensors(None)
        if failure is not None:
            raise failure
        if found.pop(FAILED):
            self.end_after_rank_zero()
        if found.pop(PREEMPTED):
            raise Preempted
        return found

    def run(self, work: Callable[[], T]) -> list[T]:
        """As `broadcast`, for a result that stays on rank 0: a list of it there, an empty list elsewhere."""
        results: list[T] = []

        def keep() -> Tensors:
            results.append(work())
            return {}

        self.broadcast(keep)
        return results

    def push_again(self) -> None:
        """Rank 0, within `broadcast`: every rank pushes the weights of now to the engines that lack them."""
        with self.preemption.uninterruptible():
            broadcast_tensors({PUSH_AGAIN: torch.tensor(True)})
            self.push()

    def end_after_rank_zero(self) -> NoReturn:
        """End this rank, which is not rank 0, after a failure that rank 0 reports.

        torchrun ends every rank when the first has ended, and rank 0 must have the time to say what
        happened and to close its engine.
        """
        self.preemption.armed = False
        time.sleep(END_SECONDS)
        raise SystemExit(1)

    def wait_for_rank_zero(self) -> None:
        """Return once rank 0 calls this too. Collective: one broadcast."""
        broadcast_tensors({"closed": torch.tensor(True)} if self.is_rank_zero else None)


class RankZero(contextlib.ExitStack):
    """Everything that only rank 0 has.

    orchestrator: questions, engine and verifiers. prefetcher: the batch that is sampled in advance.
    Besides, the metric files and the printed progress.
    """

    def __init__(self, config: Config, resume: Path | None) -> None:
        """Start the engine (in the background) and check the data. UserError names what cannot be used."""
        super().__init__()
        self.config, self.run_dir = config, Path(config.run.dir)
        self.orchestrator = self.enter_context(Orchestrator(config, resume))
        self.prefetcher = Prefetcher()
        self.callback(self.prefetcher.cancel)
        # Metrics of the step that is under way; `log` writes them.
        self.step_metrics: Metrics = {}
        self._sink: MetricSink | None = None
        self._progress: ProgressPrinter | None = None

    @property
    def sink(self) -> MetricSink:
        """The metric files; RuntimeError before `open_run_dir`."""
        if self._sink is None:
            raise RuntimeError("the run directory has not been opened")
        return self._sink

    @property
    def progress(self) -> ProgressPrinter:
        """The printed progress; RuntimeError before `open_progress`."""
        if self._progress is None:
            raise RuntimeError("the progress has not been opened")
        return self._progress

    def open_run_dir(self, step: int, *, is_fresh: bool) -> None:
        """Create or clear run.dir and open its metric files; lines of `step` and later are dropped."""
        open_run_dir(self.config, is_fresh=is_fresh)
        sink = MetricSink(self.run_dir, self.config.run.tensorboard, first_step=step)
        self._sink = self.enter_context(sink)

    def open_progress(self, step: int) -> None:
        """Begin to print progress; `step` optimizer steps are done."""
        self._progress = ProgressPrinter(self.config.run.steps, step)
        self.callback(self._progress.close)

    def generate(self, step: int, algorithm: AlgorithmConfig) -> list[Group]:
        """The verified groups of a step: prefetched ones if there are any, else sampled now."""
        groups, metrics = self.prefetcher.take() or self.orchestrator.groups(step, algorithm)
        self.step_metrics = metrics | staleness(groups, step, self.config.rollout)
        return groups

    def build_batch(self, groups: list[Group], step: int, algorithm: AlgorithmConfig) -> Tensors:
        """The batch of a step as flat tensors (batch/batch.py); its metrics join those of the step."""
        batch, metrics = self.orchestrator.build_batch(groups, step, algorithm)
        self.step_metrics |= metrics
        return batch.to_tensors()

    def start_prefetch(self, step: int) -> None:
        """With rollout.overlap, begin to sample the batch of `step` in a thread, with the weights of now."""
        if self.config.rollout.overlap and step < self.config.run.steps:
            orchestrator = self.orchestrator
            algorithm = at(self.config.algorithm, step, self.config.run.steps)
            self.prefetcher.start(
                orchestrator.sampler,
                orchestrator.questions.prompts.state_dict(),
                lambda: orchestrator.groups(step, algorithm),
            )

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps of rank 0. The questions of a prefetched batch count as not drawn."""
        orchestrator = self.orchestrator
        return {
            "prompts": self.prefetcher.before or orchestrator.questions.prompts.state_dict(),
            "memory": orchestrator.state.state_dict(),
        }

    def log(
        self, step: int, metrics: Metrics, held_out: Metrics | None, *, world_size: int, seconds: float
    ) -> None:
        """Write the step's line of metrics.jsonl and print it. metrics: of update, push and phases."""
        metrics = self.step_metrics | metrics
        peak = throughput.peak_of(self.config.actor)
        metrics |= throughput.speed(metrics, seconds, world_size, peak)
        self.sink.log(step, metrics | {f"eval/{name}": value for name, value in (held_out or {}).items()})
        self.progress.step(step, metrics)
        if held_out:
            mean, maj = held_out["mean_at_k"], held_out["maj_at_k"]
            self.progress.line(f"held-out after step {step + 1}: mean@k {mean:.1%}, maj@k {maj:.1%}")

    def summarise(self, before: Metrics | None, after: Metrics | None, *, seconds: float) -> None:
        """Write summary.json and print the table of held-out metrics before and after."""
        steps = self.config.run.steps
        summary = write_summary(self.run_dir, before=before, after=after, steps=steps, seconds=seconds)
        self.progress.close()
        if after is not None and before is not None:
            print(result_table(before, after, self.config.evaluation.num_samples))
        print(f"{steps} steps, {summary['seconds']:.0f} s; everything is in {self.run_dir}")


class Leader:
    """Rank 0's end of the link: work is done here and its result sent."""

    def __init__(self, link: RankLink, zero: RankZero) -> None:
        self.link, self.zero = link, zero

    def broadcast(self, work: Callable[[RankZero], Tensors]) -> Tensors:
        """Every rank returns the tensors of rank 0's `work`. Collective: see RankLink.broadcast."""

        def serve() -> Tensors:
            with self._serving():
                return work(self.zero)

        return self.link.broadcast(serve)

    def call(self, work: Callable[[RankZero], T], elsewhere: T) -> T:
        """The result of `work` on rank 0, `elsewhere` on other ranks. Collective: see RankLink.broadcast."""
        results: list[T] = []

        def keep(zero: RankZero) -> Tensors:
            results.append(work(zero))
            return {}

        self.broadcast(keep)
        return results[0]

    def on_rank_zero(self, work: Callable[[RankZero], T]) -> list[T]:
        """A list with the result of `work` on rank 0, an empty list on other ranks. No collective."""
        return [work(self.zero)]

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        """While other ranks wait, and only then, they can take part in a push that an engine needs."""
        orchestrator = self.zero.orchestrator
        if not orchestrator.has_engine:
            yield
            return
        with orchestrator.sampler.pool.push_requests.served_by(self.link.push_again):
            yield


class Follower:
    """The end of the link on every rank but rank 0: the same calls as Leader, without any work."""

    def __init__(self, link: RankLink) -> None:
        self.link = link

    def broadcast(self, work: Callable[[RankZero], Tensors]) -> Tensors:
        """As Leader.broadcast."""
        return self.link.broadcast(dict)

    def call(self, work: Callable[[RankZero], T], elsewhere: T) -> T:
        """As Leader.call."""
        self.link.broadcast(dict)
        return elsewhere

    def on_rank_zero(self, work: Callable[[RankZero], T]) -> list[T]:
        """As Leader.on_rank_zero."""
        return []
