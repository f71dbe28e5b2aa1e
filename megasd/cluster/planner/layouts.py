"""Parallel layouts of a job: which are possible, which fit, how fast; and the first key to change
where the job's own does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.memory import MemoryEstimate, engine_fits, estimate_memory
from megasd.cluster.planner.time import Time, step_time
from megasd.config.schema import ConfigError, samples_per_step
from megasd.config.validate import validate_values
from megasd.config.validate_model import check_model_values, check_teacher_values

ENGINE_TP = (1, 2, 4, 8)
# tokens that a smaller cache is rounded to
KV_STEP = 8192


@dataclass(frozen=True)
class LayoutPlan:
    """A job with what it takes. `refused`: why it cannot run at all, whatever the memory."""

    job: PlannedRun
    memory: MemoryEstimate | None = None
    time: Time | None = None
    refused: str | None = None

    @property
    def fits(self) -> bool:
        return self.refused is None and self.memory.fits and engine_fits(self.job)


def plan_layout(job: PlannedRun) -> LayoutPlan:
    why = illegal(job)
    return LayoutPlan(job, refused=why) if why else LayoutPlan(job, estimate_memory(job), step_time(job))


def illegal(job: PlannedRun) -> str | None:
    """Why the job cannot run on these GPUs, whatever the memory, as a key with what is wrong; None:
    it can. What `megasd train` refuses without a look at files, then what the machines refuse.
    """
    # the GPUs are the plan's matter
    config = job.change(run__num_processes=0).config
    teacher = config.algorithm.teacher
    try:
        validate_values(config, job.gpus)
        check_model_values(config, dict(job.model.hf), Path(config.model.path))
        if job.teacher is not None:
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
    """Whether SGLang can give each of `tp` ranks as many heads, key heads (or one of them to
    several), and columns of the MLP.
    """
    model = job.model
    return not (model.heads % tp or model.width % tp or (model.groups % tp and tp % model.groups))


def search(job: PlannedRun) -> list[LayoutPlan]:
    """Every layout of the job's GPUs that fits, fastest first; of those within 2 percent the one
    with fewest stages and context ranks.
    """
    found = [replace(one, time=step_time(one.job)) for one in fitting(candidates(job))]
    return sorted(
        found,
        key=lambda one: (int(math.log(one.time.seconds, 1.02)), one.job.pp * one.job.cp, one.time.seconds),
    )


def fitting(jobs: Iterable[PlannedRun]) -> Iterator[LayoutPlan]:
    """Those that fit and that nothing refuses; their time is left out."""
    plans = (LayoutPlan(job, estimate_memory(job)) for job in jobs)
    return (one for one in plans if one.fits and illegal(one.job) is None)


def candidates(job: PlannedRun, *, lean: bool = False) -> Iterator[PlannedRun]:
    """Jobs to look at, some of which `illegal` refuses. lean: those alone that take least memory,
    the smallest microbatch and full recomputing.
    """
    actor, model = job.config.actor, job.model
    for tp in divisors(math.gcd(job.config.cluster.gpus_per_node, model.heads)):
        for pp in divisors(model.layers):
            for cp in (1, 2, 4, 8):
                for ep in divisors(model.experts) if model.experts else (1,):
                    if (
                        job.gpus % (tp * pp * cp)
                        or job.gpus % (ep * pp)
                        or (ep > 1 and ep > job.config.cluster.gpus_per_node)
                    ):
                        continue
                    split = job.change(
                        actor__tensor_model_parallel_size=tp,
                        actor__pipeline_model_parallel_size=pp,
                        actor__context_parallel_size=cp,
                        actor__expert_model_parallel_size=ep,
                        actor__sequence_parallel=tp > 1,
                        actor__tp_comm_overlap=actor.tp_comm_overlap and tp > 1,
                        actor__use_distributed_optimizer=True,
                    )
                    if samples_per_step(job.config) % split.dp == 0:
                        for sized in islice(_sizes(split), 1 if lean else None):
                            for one in _recomputing(sized, lean=lean):
                                yield from _engines(one)


def _recomputing(job: PlannedRun, *, lean: bool) -> Iterator[PlannedRun]:
    """None, every layer, and what the config has: selective recomputing of core attention frees
    next to nothing beside flash attention, so it is looked at only if asked for.
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
    """Microbatches: of 1, 2, 4, 8 samples, or as many of the longest sequences' tokens."""
    if job.config.actor.max_tokens_per_microbatch is None:
        for size in (1, 2, 4, 8):
            if job.samples % size == 0:
                yield job.change(actor__micro_batch_size=size)
    else:
        for count in (1, 2, 4):
            yield job.change(actor__max_tokens_per_microbatch=count * job.longest)


def _engines(job: PlannedRun) -> Iterator[PlannedRun]:
    """Engine sizes that fill the node, or the engines' own nodes; an engine's cache as the config has it."""
    if not job.samples_itself:
        yield job
        return
    rollout, node = job.config.rollout, job.config.cluster.gpus_per_node
    # An engine that samples beside the training, or keeps the start model, cannot give its memory away.
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
    return [k for k in range(1, n + 1) if n % k == 0]
