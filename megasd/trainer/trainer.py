"""The parts of a run, built in the order that wastes least time, and closed whatever happens.

Rank 0 holds the left half (prompts, engine, verifiers, files); every rank holds the actor. What
rank 0 decides reaches the others as tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from megasd.actor import checkpoint
from megasd.actor.actor import Actor
from megasd.actor.parallel import broadcast_tensors, init_distributed, init_model_parallel
from megasd.algo.stages import at
from megasd.batch.batch import Batch
from megasd.batch.build import build_batch
from megasd.config.load import to_yaml
from megasd.config.schema import AlgorithmConfig, Config, engine_dtype
from megasd.config.validate import needs_engine
from megasd.engine.sampler import Sampler
from megasd.preemption import PREEMPTED_MARKER, Preempted, PreemptionSignal
from megasd.rewards.verifiers import extract_answer
from megasd.trainer.metrics import MetricSink
from megasd.trainer.orchestrator import Orchestrator, model_length
from megasd.trainer.prefetch import Prefetcher, staleness
from megasd.trainer.progress import ProgressPrinter
from megasd.types import UserError
from megasd.weight_sync.sync import SyncError, WeightSync

# length of the probe prompts that a push is verified with
PROBE_TOKENS = 32
# what it sends beside a result: whether it was told to leave
LEAVES = "leaves"
# what rank 0 sends instead of a result when an engine needs the weights again
REPUSH = "repush"
# that a rank waits for rank 0 to end first
LEAVE_SECONDS = 30


class Trainer(contextlib.ExitStack):
    """Context manager; attributes `actor`, `sync`, `step` on every rank, the left half on rank 0
    (None elsewhere).
    """

    def __init__(self, config: Config, stop: PreemptionSignal) -> None:
        super().__init__()
        self.stop = stop
        try:
            self._build(config)
        except BaseException:
            self.close()
            raise

    def _build(self, config: Config) -> None:
        self.config, self.started, self.dir = config, time.perf_counter(), Path(config.run.dir)
        self.step, self.before, self.pushed = 0, None, None
        # step of the newest checkpoint of this process
        self.saved: int | None = None
        self.timings: Counter[str] = Counter()
        self.left: Orchestrator | None = None
        # rank 0's
        self.ahead = Prefetcher()
        self.sink = self.report = None
        device = init_distributed()
        self.is_first = torch.distributed.get_rank() == 0
        # files may not show on every node alike
        found = self.from_first(lambda: {"resume": _as_bytes(self._resume_path())})
        resume = _as_path(found["resume"])
        self.from_first(lambda: self._build_left_half(resume))
        mesh = init_model_parallel(config.actor, device, config.run.seed)
        self.actor = Actor(config, mesh)
        if resume is not None:
            state = self.actor.load(resume)
            self.step, self.before = state["step"], state["before"]
            self.actor.gate.load_state_dict(state["gate"])
        self.sync = self._build_sync(device)
        if self.sync is not None:
            self.from_first(self.rollout.pool.wait_ready if self.is_first else dict)
        # also after a resume: the engine was started from model.path
        self.push()
        self.from_first(lambda: self._open_run_dir(is_fresh=resume is None))
        found = self.from_first(lambda: self.left.estimate_pass_rates())
        self.actor.dataset_mean = float(found["dataset_mean"]) if "dataset_mean" in found else None
        # rank 0's half before it drew the questions of a batch that is not learned yet
        self._drawn: dict | None = None
        self.stop.armed = True

    def _build_left_half(self, resume: Path | None) -> None:
        if self.config.rollout.engine.release_memory and not torch.cuda.is_available():
            raise UserError(
                "rollout.engine.release_memory: an engine on a CPU has no memory to give back, and ends; set"
                " it to false"
            )
        self.left = self.enter_context(Orchestrator(self.config, resume))
        self.callback(self.ahead.cancel)

    @property
    def rollout(self) -> Sampler | None:
        return self.left.rollout if self.left is not None else None

    def _open_run_dir(self, *, is_fresh: bool) -> None:
        """Written only now, when nothing can be refused any more: a run that never began leaves no
        trace, nor spoils an older one.
        """
        if is_fresh and self.config.run.overwrite:
            for name in ("rollouts", "checkpoints", "tensorboard", "hf", "metrics.jsonl", "summary.json"):
                path = self.dir / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / PREEMPTED_MARKER).unlink(missing_ok=True)
        self.sink = self.enter_context(
            MetricSink(self.dir, self.config.run.tensorboard, first_step=self.step)
        )
        (self.dir / "config.yaml").write_text(to_yaml(self.config))

    def _build_sync(self, device: torch.device) -> WeightSync | None:
        """Weights go to the engine on every rank's account; None when nothing samples."""
        if not needs_engine(self.config):
            return None
        probe = self.from_first(
            lambda: {"probe": torch.tensor(next(iter(self.left.prompt_ids.values()))[:PROBE_TOKENS])}
        )["probe"].tolist()
        return self.enter_context(
            WeightSync(
                self.actor,
                self.rollout,
                self.config.sync,
                self.dir,
                model_path=self.config.model.path,
                probes=[probe],
                dtype=getattr(torch, engine_dtype(self.config)),
                device=device,
                local_engine=not self.config.rollout.engine.urls and not self.config.rollout.engine.served,
            )
        )

    def _resume_path(self) -> Path | None:
        resume = self.config.run.resume
        if resume == "auto":
            found = checkpoint.list_checkpoints(self.dir / "checkpoints")
            return found[-1] if found else None
        return None if resume == "none" else Path(resume)

    def from_first(self, work: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor]:
        """Rank 0 does `work`; every rank gets the tensors it returns. When it raises, the other
        ranks leave in silence after it.

        Raises Leave on every rank when rank 0 is told to leave, before the work or in it. An engine
        that dies and is restarted meanwhile may need the weights, which is every rank's work: see
        `_repush`.
        """
        tensors, failure, leaves = {}, None, False
        if self.is_first:
            with self._serving():
                try:
                    with self.stop.breakable():
                        tensors = work() or {}
                except Exception as error:
                    failure = error
                except Preempted:
                    leaves = True
        flags = {"failed": torch.tensor(failure is not None), LEAVES: torch.tensor(leaves)}
        found = broadcast_tensors(tensors | flags if self.is_first else None)
        while REPUSH in found:
            # rank 0 deals with it
            with contextlib.suppress(SyncError):
                self.sync.push(version=self.step, lacking=True)
            found = broadcast_tensors(None)
        if failure is not None:
            raise failure
        if found.pop("failed"):
            self.stop.armed = False
            _leave_after_first()
        if found.pop(LEAVES):
            raise Preempted
        return found

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        """While the other ranks wait in `from_first`, and only then, they can take part in a push."""
        if self.rollout is None:
            yield
            return
        with self.rollout.pool.push_requests.served_by(self._repush):
            yield

    def _repush(self) -> None:
        """Rank 0, in the middle of `from_first`: an engine came back with the start weights, and
        only the actor has the others.
        """
        with self.stop.held():
            broadcast_tensors({REPUSH: torch.tensor(True)})
            self.sync.push(version=self.step, lacking=True)

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The algorithm of the step to come: stages and scheduled numbers resolved."""
        return at(self.config.algorithm, self.step, self.config.run.steps)

    @property
    def samples(self) -> bool:
        """Whether the next step reads the current weights from the engine; else only an evaluation
        does, and pushes when it is due.
        """
        rollout = self.config.rollout
        return self.algorithm.source != "dataset" and rollout.replay_dir is None and not rollout.frozen_policy

    def push(self) -> dict[str, float]:
        """The actor's weights into the engine as version `step`; metrics on rank 0. Nothing to do
        where nothing samples, or twice.
        """
        if self.sync is None or self.pushed == self.step:
            return {}
        rollout = self.config.rollout
        if (
            rollout.frozen_policy
            and self.step < self.config.run.steps
            and not (rollout.engine.urls and self.step == 0)
        ):
            # the engine has the start model, and starts from it again; only the evaluation after
            # the last step asks for more
            return {}
        self.pushed = self.step
        if rollout.engine.release_memory:
            self.actor.free_cache()
        try:
            return self.sync.push(version=self.step)
        except SyncError:
            if not self.is_first:
                self.stop.armed = False
                _leave_after_first()
            raise

    # ---- what the loop calls ----

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[phase] += time.perf_counter() - start

    def next_batch(self, step: int) -> tuple[Batch, dict[str, float]]:
        """Rank 0 samples, scores and builds the batch of a step; every rank receives it. Metrics on
        rank 0.
        """
        metrics: dict[str, float] = {}
        self._drawn = self._left_state()

        def build() -> dict[str, Tensor]:
            left, algorithm = self.left, self.algorithm
            groups, figures = self.ahead.take() or left.groups(step, algorithm)
            figures |= staleness(groups, step, self.config.rollout)
            batch, more = build_batch(
                groups, algorithm, left.chat, left.memory,
                step=step, max_length=model_length(self.config), room=self.config.rollout.max_response_tokens,
                answer_of=lambda text: extract_answer(self.config.reward.verifier, text),
            )  # fmt: skip
            figures |= left.memory.observe(groups)
            metrics.update(figures | {f"train/{name}": value for name, value in more.items()})
            return batch.to_tensors()

        batch = Batch.from_tensors(self.from_first(build))
        if self.sync is not None and self.config.rollout.engine.release_memory and self.pushed is not None:
            self.from_first(self.sync.release if self.is_first else dict)
            if not self.is_first:
                self.sync.release()
            # whatever the version, the next push is needed
            self.pushed = None
        self._look_ahead(step + 1)
        return batch, metrics

    def _look_ahead(self, step: int) -> None:
        """Rank 0: begin to sample the batch of the step after this one, with the weights that this
        one starts from.
        """
        if self.config.rollout.overlap and self.is_first and step < self.config.run.steps:
            left, algorithm = self.left, at(self.config.algorithm, step, self.config.run.steps)
            self.ahead.start(left.rollout, left.prompts.state_dict(), lambda: left.groups(step, algorithm))

    def settle(self) -> None:
        """The batch ahead, if any, has come in; an engine that died meanwhile was given the weights of now.

        Told to leave while it learned, the run does so here: nothing is pushed first to engines
        that may have been told the same.
        """
        self.from_first(self.ahead.wait)

    def learned(self, metrics: dict[str, float]) -> None:
        """What the step says to the next ones (rank 0)."""
        if self.left is not None:
            self.left.memory.after_step(metrics)
        self._drawn = None

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Held-out figures on rank 0, None elsewhere or without data.eval; samples are kept in
        rollouts/eval-step-*.jsonl.
        """
        result: dict[str, float] = {}
        if self.config.data.eval is not None:
            self.push()
            self.from_first(lambda: result.update(self.left.evaluate(step)))
        return result or None

    def _left_state(self) -> dict:
        """What rank 0's half remembers, for a checkpoint; {} on other ranks. A batch ahead counts
        as not drawn.
        """
        if not self.is_first:
            return {}
        return {
            "prompts": self.ahead.before or self.left.prompts.state_dict(),
            "memory": self.left.memory.state_dict(),
        }

    def save(self, left_state: dict | None = None) -> None:
        """Checkpoint at the current step; every rank calls it. left_state: rank 0's, if not that of now."""
        state = (left_state or self._left_state()) | (
            {"before": self.before, "gate": self.actor.gate.state_dict()} if self.is_first else {}
        )
        self.actor.save(self.dir / "checkpoints", self.step, state)
        self.saved = self.step

    def leave(self) -> None:
        """Save as told, whether a checkpoint is due or not: a batch that was being sampled is
        sampled again from the same questions.
        """
        self.ahead.cancel()
        if self.saved != self.step:
            self.save(self._drawn)
        if self.is_first:
            (self.dir / PREEMPTED_MARKER).write_text(
                json.dumps({"step": self.step, "signal": self.stop.asked}) + "\n"
            )
            print(
                f"megasd: told to leave (signal {self.stop.asked}): saved step {self.step}; run.resume=auto"
                " goes on",
                file=sys.stderr,
            )

    def summary(self, after: dict[str, float] | None, steps: int) -> dict:
        """runs/<name>/summary.json: written when the run ends."""
        keep = ("mean_at_k", "maj_at_k", "pass_at_k", "unscored_samples")
        pick = lambda figures: None if figures is None else {k: figures[k] for k in keep}  # noqa: E731
        result = {
            "before": pick(self.before),
            "after": pick(after),
            "seconds": round(time.perf_counter() - self.started, 1),
            "steps": steps,
            "commit": _commit(),
        }
        writing = self.dir / ".summary.json"
        writing.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(writing, self.dir / "summary.json")
        return result

    def open_report(self) -> ProgressPrinter | None:
        if not self.is_first:
            return None
        report = ProgressPrinter(self.config.run.steps, self.step)
        self.callback(report.close)
        return report


def _leave_after_first() -> NoReturn:
    """End a rank other than 0 after a failure that rank 0 reports. torchrun ends every rank when
    the first has gone, and rank 0 must not be ended before it has said why and closed its engine.
    """
    time.sleep(LEAVE_SECONDS)
    raise SystemExit(1)


def _as_bytes(path: Path | None) -> Tensor:
    return torch.tensor(list(str(path or "").encode()), dtype=torch.uint8)


def _as_path(text: Tensor) -> Path | None:
    return Path(bytes(text.tolist()).decode()) if len(text) else None


def _commit() -> str | None:
    """Commit of the source tree, or None outside a repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
