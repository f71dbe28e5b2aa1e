"""Parallel layouts of a run: which are possible, which fit in memory, and how fast they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.memory import MemoryEstimate, engine_fits, estimate_memory
from megasd.cluster.planner.time import Time, step_time
from megasd.config.schema import ConfigError, samples_per_step
from megasd.config.validate import validate_values
from megasd.config.validate_model import check_model_values, check_teacher_values

# Tensor-parallel sizes of an engine that are tried.
ENGINE_TP = (1, 2, 4, 8)


@dataclass(frozen=True)
class RefusedLayout:
    """A layout that cannot run, whatever the memory. reason: a config key and its mistake."""

    job: PlannedRun
    reason: str

    @property
    def fits(self) -> bool:
        """Always False."""
        return False


@dataclass(frozen=True)
class LayoutPlan:
    """A layout that can run, if it fits, with its memory and time."""

    job: PlannedRun
    memory: MemoryEstimate
    time: Time

    @property
    def fits(self) -> bool:
        """Whether actor and engines have room in memory."""
        return has_room(self.job, self.memory)


def plan_layout(job: PlannedRun) -> LayoutPlan | RefusedLayout:
    """Memory and time of the run in its own layout, or why that cannot run."""
    reason = illegal(job)
    return RefusedLayout(job, reason) if reason else LayoutPlan(job, estimate_memory(job), step_time(job))


def has_room(job: PlannedRun, memory: MemoryEstimate) -> bool:
    """Whether the actor, which needs `memory`, and the engines have room on their GPUs."""
    return memory.fits and engine_fits(job)


def illegal(job: PlannedRun) -> str | None:
    """Why the run cannot start on these GPUs, whatever the memory; None if it can.

    The text names a config key and its mistake. First comes what `megasd train` refuses without a
    look at model and data files, then what the machines cannot do.
    """
    # The plan says how many GPUs there are, not run.num_processes.
    config = job.change(run__num_processes=0).config
    teacher = config.algorithm.teacher
    try:
        validate_values(config, job.gpus)
        check_model_values(config, dict(job.model.hf), Path(config.model.path))
        if job.teacher is not None and teacher is not None and teacher.model_path is not None:
            check_teacher_values(config, dict(job.teacher.hf), Path(teacher.model_path))
    except ConfigError as error:
        return str(error).replace("run.num_processes", "cluster.actor_nodes")
    actor, node = config.actor, config.cluster.gpus_per_node
    if job.tp > node:
        return f"actor.tensor_model_parallel_size={job.tp}: more than the {node} GPUs of a node; lower it"
    if actor.fp8 is not None and job.gpu.fp8 is None:
        return f"actor.fp8={actor.fp8}: {job.gpu.name} has none; set it to null"
    if actor.packing and actor.dtype == "float32" and not job.gpu.local_spec:
        return (
            "actor.packing: TransformerEngine's attention takes packed sequences in bfloat16 alone; set"
            " actor.dtype"
        )
    return _illegal_engines(job) if job.samples_itself else None


def _illegal_engines(job: PlannedRun) -> str | None:
    """Why the engines cannot start on these GPUs, whatever the memory; None if they can."""
    engine, node = job.config.rollout.engine, job.config.cluster.gpus_per_node
    tp, key = (
        engine.tensor_parallel_size,
        f"rollout.engine.tensor_parallel_size={engine.tensor_parallel_size}",
    )
    if not engine_splits(job, tp):
        model = job.model
        return (
            f"{key}: SGLang cannot cut {model.heads} heads, {model.groups} key heads and an MLP of"
            f" {model.width} so; choose a divisor"
        )
    if node % tp:
        return f"{key}: does not divide the {node} GPUs of a node; choose a divisor"
    if not job.engine_gpus:
        fills = engine.num_engines * tp <= node
        return (
            None
            if fills
            else (
                f"rollout.engine.num_engines={engine.num_engines}: x TP {tp}, more than the {node} GPUs of a"
                " node; lower it"
            )
        )
    if engine.served != job.engines:
        return (
            f"rollout.engine.served={engine.served}: {job.engine_gpus} GPUs serve {job.engines} engines of TP"
            f" {tp}; set it to {job.engines}"
        )
    if engine.release_memory:
        return (
            "rollout.engine.release_memory: engines on nodes of their own share no GPU with the actor; set it"
            " to false"
        )
    return None


def engine_splits(job: PlannedRun, tp: int) -> bool:
    """Whether SGLang can cut the model over `tp` ranks.

    Every rank needs equally many heads, columns of the MLP, and key heads. Several ranks may hold
    the same key head.
    """
    model = job.model
    return not (model.heads % tp or model.width % tp or (model.groups % tp and tp % model.groups))


def search(job: PlannedRun) -> list[LayoutPlan]:
    """Every layout of the run's GPUs that fits, fastest first.

    Layouts that differ by less than 2 percent are ordered by pipeline stages x context ranks,
    fewest first.
    """
    found = [LayoutPlan(other, memory, step_time(other)) for other, memory in fitting(candidates(job))]
    return sorted(
        found,
        key=lambda plan: (
            int(math.log(plan.time.seconds, 1.02)),
            plan.job.pp * plan.job.cp,
            plan.time.seconds,
        ),
    )


def fitting(jobs: Iterable[PlannedRun]) -> Iterator[tuple[PlannedRun, MemoryEstimate]]:
    """The runs that fit in memory and that nothing refuses, each with its memory."""
    estimates = ((job, estimate_memory(job)) for job in jobs)
    return ((job, memory) for job, memory in estimates if has_room(job, memory) and illegal(job) is None)


def candidates(job: PlannedRun, *, lean: bool = False) -> Iterator[PlannedRun]:
    """The run in every layout worth a look, some of which `illegal` refuses.

    lean: only layouts that take least memory, with the smallest microbatch and full recomputing.
    """
    for split in _splits(job):
        if samples_per_step(job.config) % split.dp == 0:
            for sized in islice(_sizes(split), 1 if lean else None):
                for recomputed in _recomputing(sized, lean=lean):
                    yield from _engines(recomputed)


def _splits(job: PlannedRun) -> Iterator[PlannedRun]:
    """The run with the model cut over its GPUs in every possible way."""
    actor, model, node = job.config.actor, job.model, job.config.cluster.gpus_per_node
    sizes = itertools.product(
        divisors(math.gcd(node, model.heads)),
        divisors(model.layers),
        (1, 2, 4, 8),
        divisors(model.experts) if model.experts else (1,),
    )
    for tp, pp, cp, ep in sizes:
        if job.gpus % (tp * pp * cp) or job.gpus % (ep * pp) or (ep > 1 and ep > node):
            continue
        yield job.change(
            actor__tensor_model_parallel_size=tp,
            actor__pipeline_model_parallel_size=pp,
            actor__context_parallel_size=cp,
            actor__expert_model_parallel_size=ep,
            actor__sequence_parallel=tp > 1,
            actor__tp_comm_overlap=actor.tp_comm_overlap and tp > 1,
            actor__use_distributed_optimizer=True,
        )


def _recomputing(job: PlannedRun, *, lean: bool) -> Iterator[PlannedRun]:
    """The run without recomputing, with full recomputing, and with the config's own setting.

    Selective recomputing of core attention frees next to nothing with flash attention, so it is
    tried only if the config has it.
    """
    actor = job.config.actor
    own = (actor.recompute_granularity, actor.recompute_method, actor.recompute_num_layers)
    full = ("full", "uniform", 1)
    for granularity, method, count in (
        (full,) if lean and not actor.cuda_graph else dict.fromkeys(((None, "uniform", 1), own, full))
    ):
        yield job.change(
            actor__recompute_granularity=granularity,
            actor__recompute_method=method,
            actor__recompute_num_layers=count,
        )


def _sizes(job: PlannedRun) -> Iterator[PlannedRun]:
    """The run with microbatches of 1, 2, 4, 8 samples, or of the tokens of 1, 2, 4 sequences."""
    if job.config.actor.max_tokens_per_microbatch is None:
        for size in (1, 2, 4, 8):
            if job.samples % size == 0:
                yield job.change(actor__micro_batch_size=size)
    else:
        for count in (1, 2, 4):
            yield job.change(actor__max_tokens_per_microbatch=count * job.longest)


def _engines(job: PlannedRun) -> Iterator[PlannedRun]:
    """The run with engines of every size that fills a node; their KV cache is the config's."""
    if not job.samples_itself:
        yield job
        return
    rollout, node = job.config.rollout, job.config.cluster.gpus_per_node
    # An engine that samples while the actor trains, or that keeps the start model, cannot release
    # its memory.
    stays = rollout.overlap or rollout.frozen_policy
    release = rollout.engine.release_memory if stays else job.colocated
    for tp in ENGINE_TP:
        if node % tp == 0 and engine_splits(job, tp):
            yield job.change(
                rollout__engine__tensor_parallel_size=tp,
                rollout__engine__release_memory=release and job.colocated,
                rollout__engine__num_engines=1 if job.engine_gpus else node // tp,
                rollout__engine__served=job.engine_gpus // tp,
            )


def divisors(n: int) -> list[int]:
    """All divisors of n, smallest first."""
    return [k for k in range(1, n + 1) if n % k == 0]
