"""The trainer: the parts of a run, and what the loop of train.py does with them.

Every rank has an actor. Rank 0 also has the questions, the engine, the verifiers and the files
(trainer/rank_zero.py). Parts are built in the order that wastes least time, and closed whatever
happens.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.actor.rank_batch import RankBatch
from megasd.algo.stages import at
from megasd.batch.batch import Batch
from megasd.config.schema import AlgorithmConfig, Config, engine_dtype
from megasd.config.validate_rollout import needs_engine
from megasd.preemption import PreemptionSignal
from megasd.trainer.rank_zero import Follower, Leader, Metrics, RankLink, RankZero
from megasd.trainer.run_dir import find_resume, mark_preempted
from megasd.types import Group, UserError
from megasd.weight_sync.sync import SyncError, WeightSync

# Tokens of the prompts that a push is verified with.
PROBE_TOKENS = 32
# The actor's metrics that have another name in the log; the rest is logged as train/<name>.
LOGGED_AS = {"informative_questions": "weight/informative_questions", "mean_question_weight": "weight/mean"}


class Trainer(contextlib.ExitStack):
    """A run: a context manager that every rank enters and closes.

    actor: this rank's model. step: optimizer steps that are done (of batches; a batch may take several
    updates). link: how rank 0 and the other ranks act together.

    It is one class of more than 250 lines on purpose: its public methods are the lines of the loop in
    their order, and what they share (step, pushed version, unlogged metrics) is the run's own state.
    """

    def __init__(self, config: Config, preemption: PreemptionSignal) -> None:
        """Build every part. UserError (on rank 0; other ranks end after it) for whatever cannot be used."""
        super().__init__()
        self.config, self.preemption, self.run_dir = config, preemption, Path(config.run.dir)
        self.started = time.perf_counter()
        self.step = 0
        # Held-out metrics of the start model; None on other ranks and without data.eval.
        self.before: Metrics | None = None
        self._pushed_version: int | None = None
        # Step of the newest checkpoint that this process wrote.
        self._saved_step: int | None = None
        self._first_step = 0
        self._timings: dict[str, float] = {}
        self._step_started = self.started
        # Metrics of a step that is learned and not logged yet.
        self._unlogged: Metrics | None = None
        # Rank 0's state before it drew the questions of a batch that is not learned yet.
        self._drawn_from: dict[str, object] | None = None
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        config = self.config
        device = init_distributed()
        self.link = RankLink(self.preemption, is_rank_zero=torch.distributed.get_rank() == 0)
        # Rank 0 decides what to resume from: files may not show on every node alike.
        resume = _as_path(self.link.broadcast(lambda: {"resume": _as_bytes(find_resume(config))})["resume"])
        self.ranks = self._build_ranks(resume)
        mesh = init_model_parallel(config.actor, device, config.run.seed)
        self.actor = Actor(config, mesh)
        if resume is not None:
            state = self.actor.load(resume)
            self.step, self.before = state["step"], state["before"]
            self.actor.gate.load_state_dict(state["gate"])
        self._first_step = self.step
        self.sync = self._build_sync(device)
        if self.sync is not None:
            self.link.push = self._push_to_lacking
            self.ranks.call(lambda zero: zero.orchestrator.sampler.pool.wait_ready(), None)
        # Also after a resume: the engine was started from model.path.
        self._push()
        is_fresh = resume is None
        self.ranks.call(lambda zero: zero.open_run_dir(self.step, is_fresh=is_fresh), None)
        found = self.ranks.broadcast(lambda zero: zero.orchestrator.estimate_pass_rates())
        self.actor.dataset_mean = float(found["dataset_mean"]) if "dataset_mean" in found else None
        self.callback(self._log_step, None)
        self.preemption.armed = True

    def _build_ranks(self, resume: Path | None) -> Leader | Follower:
        def build() -> RankZero:
            if self.config.rollout.engine.release_memory and not torch.cuda.is_available():
                raise UserError(
                    "rollout.engine.release_memory: an engine on a CPU has no memory to give back, and ends;"
                    " set it to false"
                )
            return self.enter_context(RankZero(self.config, resume))

        built = self.link.run(build)
        return Leader(self.link, built[0]) if built else Follower(self.link)

    def _build_sync(self, device: torch.device) -> WeightSync | None:
        """This rank's part of the weight sync with the engines; None where nothing samples."""
        config = self.config
        if not needs_engine(config):
            return None
        found = self.ranks.broadcast(lambda zero: {"probe": _probe(zero)})
        sampler = self.ranks.on_rank_zero(lambda zero: zero.orchestrator.sampler)
        return self.enter_context(
            WeightSync(
                self.actor,
                sampler[0] if sampler else None,
                config.sync,
                self.run_dir,
                model_path=config.model.path,
                probes=[found["probe"].tolist()],
                dtype=getattr(torch, engine_dtype(config)),
                device=device,
                local_engine=not config.rollout.engine.urls and not config.rollout.engine.served,
            )
        )

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The algorithm of the next step: stages and scheduled numbers resolved."""
        return at(self.config.algorithm, self.step, self.config.run.steps)

    # ---- what the loop calls, in its order ----

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Context manager: the block's wall time joins the step's metric seconds/<phase>."""
        start = time.perf_counter()
        yield
        self._timings[phase] = self._timings.get(phase, 0.0) + time.perf_counter() - start

    def evaluate_start_model(self) -> None:
        """Before the first step, evaluate on the held-out rows; a resumed run has these metrics already."""
        if self.step == 0:
            self.before = self._evaluate()
        self.ranks.on_rank_zero(lambda zero: zero.open_progress(self.step))

    def generate(self, step: int) -> list[Group]:
        """P questions with G verified answers each, on rank 0; an empty list on other ranks.

        Raises Preempted on every rank. Collective: one broadcast.
        """
        self._step_started = time.perf_counter()
        self._drawn_from = self._rank_zero_state()
        algorithm = self.algorithm
        return self.ranks.call(lambda zero: zero.generate(step, algorithm), [])

    def build_batch(self, groups: list[Group], step: int) -> list[RankBatch]:
        """This rank's part of each minibatch of the step.

        Rank 0 computes advantages, question weights and teacher contexts of the groups and sends the
        whole batch. With rollout.engine.release_memory the engine then gives its memory back; with
        rollout.overlap rank 0 begins to sample the next step's groups. Collectives: one broadcast or two.
        """
        algorithm = self.algorithm
        tensors = self.ranks.broadcast(lambda zero: zero.build_batch(groups, step, algorithm))
        self._release_engine_memory()
        self.ranks.on_rank_zero(lambda zero: zero.start_prefetch(step + 1))
        return self.actor.shard(Batch.from_tensors(tensors), algorithm)

    def after_update(self, step: int, metrics: Metrics) -> None:
        """The step is done. `metrics`, the actor's, are logged even if something fails from here on."""
        self.ranks.on_rank_zero(lambda zero: zero.orchestrator.state.after_step(metrics))
        self._drawn_from = None
        self.step = step + 1
        self._unlogged = {LOGGED_AS.get(name, f"train/{name}"): value for name, value in metrics.items()}

    def push_weights(self, version: int) -> None:
        """The actor's weights into the engines as `version`, if the next step samples from them.

        First, groups that are being prefetched come in; an engine that lost its weights gets the new
        ones there. A run that was preempted meanwhile raises Preempted before it pushes anything, since
        the engines may have received the same signal. Collectives: one broadcast, and those of the push.
        """
        if version != self.step:
            raise ValueError(f"weights of step {self.step} cannot be pushed as version {version}")
        with self.timed("wait"):
            self.ranks.call(lambda zero: zero.prefetcher.wait(), None)
        with self.timed("sync"):
            pushed = self._push() if self._next_step_samples else {}
        self._unlogged = (self._unlogged or {}) | pushed

    def after_step(self, step: int) -> None:
        """Write a checkpoint and evaluate when due, then log the step."""
        held_out = None
        is_last = self.step >= self.config.run.steps
        if _due(self.config.checkpoint.every, self.step) and not is_last:
            self._save()
        if _due(self.config.evaluation.every, self.step) and not is_last:
            held_out = self._evaluate()
        self._log_step(held_out)

    def finish(self) -> None:
        """Last checkpoint, last evaluation, export to Hugging Face, summary and table."""
        config = self.config
        is_due = config.checkpoint.save_at_end or _due(config.checkpoint.every, self.step)
        if is_due and self.step > self._first_step:
            self._save()
        after = self._evaluate()
        if config.run.export:
            self.actor.export_hf(self.run_dir / "hf")
        seconds = time.perf_counter() - self.started
        self.ranks.on_rank_zero(lambda zero: zero.summarise(self.before, after, seconds=seconds))

    def save_preempted(self) -> None:
        """Save the newest step, whether a checkpoint is due or not, and mark the run as preempted.

        Questions of a batch that is not learned yet are sampled again after the resume.
        """
        self._log_step(None)
        self.ranks.on_rank_zero(lambda zero: zero.prefetcher.cancel())
        if self._saved_step != self.step:
            self._save(self._drawn_from)

        def tell(zero: RankZero) -> None:
            number = self.preemption.received
            mark_preempted(self.run_dir, step=self.step, signal=number)
            text = f"megasd: preempted (signal {number}): saved step {self.step}; run.resume=auto goes on"
            print(text, file=sys.stderr)

        self.ranks.on_rank_zero(tell)

    # ---- parts of these ----

    @property
    def _next_step_samples(self) -> bool:
        """True where the next step reads the current weights from the engine.

        Otherwise only an evaluation reads them, and pushes them when it is due.
        """
        rollout = self.config.rollout
        return self.algorithm.source != "dataset" and rollout.replay_dir is None and not rollout.frozen_policy

    def _push(self) -> Metrics:
        """Push the weights of `step` into every engine, unless they are there or nothing reads them.

        Returns the metrics sync/* on rank 0, {} elsewhere and where nothing is pushed. Collective.
        """
        rollout = self.config.rollout
        if self.sync is None or self._pushed_version == self.step:
            return {}
        starts_at_url = bool(rollout.engine.urls) and self.step == 0
        if rollout.frozen_policy and self.step < self.config.run.steps and not starts_at_url:
            # The engine keeps the start model; only the evaluation after the last step reads other weights.
            return {}
        self._pushed_version = self.step
        if rollout.engine.release_memory:
            self.actor.free_cache()
        try:
            return self.sync.push(version=self.step)
        except SyncError:
            if not self.link.is_rank_zero:
                self.link.end_after_rank_zero()
            raise

    def _push_to_lacking(self) -> None:
        """This rank's part of a push to the engines that do not hold the weights of `step`."""
        if self.sync is not None:
            self.sync.push(version=self.step, lacking=True)

    def _release_engine_memory(self) -> None:
        """With rollout.engine.release_memory the engine's GPU memory is the trainer's until the next push."""
        sync = self.sync
        if sync is None or not self.config.rollout.engine.release_memory or self._pushed_version is None:
            return
        self.ranks.call(lambda zero: sync.release(), None)
        if not self.link.is_rank_zero:
            sync.release()
        # The next push is needed, whatever version it has.
        self._pushed_version = None

    def _evaluate(self) -> Metrics | None:
        """Held-out metrics of the weights of `step` on rank 0; None elsewhere and without data.eval."""
        if self.config.data.eval is None:
            return None
        self._push()
        step, elsewhere = self.step, Metrics()
        return self.ranks.call(lambda zero: zero.orchestrator.evaluate(step), elsewhere) or None

    def _rank_zero_state(self) -> dict[str, object]:
        """Rank 0's state for a checkpoint, {} on other ranks."""
        return next(iter(self.ranks.on_rank_zero(lambda zero: zero.state())), {})

    def _save(self, rank_zero_state: dict[str, object] | None = None) -> None:
        """Write a checkpoint of `step`. Collective.

        rank_zero_state: rank 0's state, where it is not the current one.
        """
        state = rank_zero_state or self._rank_zero_state()
        if self.link.is_rank_zero:
            state = state | {"before": self.before, "gate": self.actor.gate.state_dict()}
        self.actor.save(self.run_dir / "checkpoints", self.step, state)
        self._saved_step = self.step

    def _log_step(self, held_out: Metrics | None) -> None:
        """Log the step that was learned last, unless it has been logged. No collective."""
        metrics, self._unlogged = self._unlogged, None
        if metrics is None:
            return
        seconds = time.perf_counter() - self._step_started
        metrics |= {f"seconds/{phase}": value for phase, value in self._timings.items()}
        metrics["seconds/step"] = seconds
        self._timings.clear()
        logged, world_size = metrics, self.actor.mesh.world_size
        self.ranks.on_rank_zero(
            lambda zero: zero.log(self.step - 1, logged, held_out, world_size=world_size, seconds=seconds)
        )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _probe(zero: RankZero) -> Tensor:
    """int64 [at most PROBE_TOKENS]: the beginning of a training prompt."""
    return torch.tensor(next(iter(zero.orchestrator.questions.prompt_ids.values()))[:PROBE_TOKENS])


def _as_bytes(path: Path | None) -> Tensor:
    """uint8 tensor of a path's text; empty for None."""
    return torch.tensor(list(str(path or "").encode()), dtype=torch.uint8)


def _as_path(text: Tensor) -> Path | None:
    """The inverse of `_as_bytes`."""
    return Path(bytes(text.tolist()).decode()) if len(text) else None
