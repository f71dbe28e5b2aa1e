"""What a user is told about a run that does not fit: the first key to change, or enough nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megasd.cluster.planner.engine_memory import cache_holds_a_sample, engine, kv_tokens
from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.labels import MEMORY_CAUSES, MEMORY_PHASES
from megasd.cluster.planner.layouts import (
    ENGINE_TP,
    LayoutPlan,
    RefusedLayout,
    candidates,
    divisors,
    engine_splits,
    fitting,
    has_room,
    illegal,
    search,
)
from megasd.cluster.planner.memory import estimate_memory

# Numbers of actor nodes that are tried for a model that does not fit.
BIGGER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Fix:
    """One config key and its new value. with_it: other keys that have to change with it."""

    key: str
    old: Any
    new: Any
    with_it: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        also = "".join(f", {key}={_text(value)}" for key, value in self.with_it)
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)}{also}"

    def apply(self, job: PlannedRun) -> PlannedRun:
        """The run with the change."""
        return job.change(
            **{key.replace(".", "__"): value for key, value in ((self.key, self.new), *self.with_it)}
        )


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_fix(own: LayoutPlan) -> Fix | None:
    """The cheapest single change that makes the run fit; None if no single change does."""
    for fix in fixes(own.job):
        changed = fix.apply(own.job)
        if illegal(changed) is None and has_room(changed, estimate_memory(changed)):
            return fix
    return None


def fixes(job: PlannedRun) -> Iterator[Fix]:
    """Changes in the order in which they are tried, cheapest first.

    First come changes that cost nothing, then a smaller engine, smaller microbatches, recomputing,
    and at last more ranks a model (tensor parallel, experts, pipeline, context).
    """
    actor, engine = job.config.actor, job.config.rollout.engine
    if job.colocated and not engine.release_memory:
        yield Fix("rollout.engine.release_memory", False, True)
    if not actor.use_distributed_optimizer and job.dp > 1:
        yield Fix("actor.use_distributed_optimizer", False, True)
    if job.tp > 1 and not actor.sequence_parallel:
        yield Fix("actor.sequence_parallel", False, True)
    if job.samples_itself:
        yield from _engine_fixes(job)
    teacher, term = job.active_teacher, job.config.algorithm.distill
    if (
        teacher is not None
        and teacher.transport == "hidden"
        and term is not None
        and term.support == "teacher"
    ):
        # The same loss, with hundreds of bytes a token in place of thousands.
        yield Fix("algorithm.teacher.transport", "hidden", "record")
    yield from _microbatch_fixes(job)
    if actor.loss_memory_mib > 256:
        yield Fix("actor.loss_memory_mib", actor.loss_memory_mib, 256)
    if actor.recompute_granularity != "full":
        yield Fix(
            "actor.recompute_granularity",
            actor.recompute_granularity,
            "full",
            (("actor.recompute_num_layers", 1),),
        )
    yield from _split_fixes(job)


def _microbatch_fixes(job: PlannedRun) -> Iterator[Fix]:
    """Smaller microbatches, the largest of them first."""
    actor = job.config.actor
    if actor.max_tokens_per_microbatch is None:
        for size in sorted(
            (n for n in divisors(actor.micro_batch_size) if n < actor.micro_batch_size), reverse=True
        ):
            yield Fix("actor.micro_batch_size", actor.micro_batch_size, size)
    else:
        tokens = actor.max_tokens_per_microbatch
        while tokens > job.longest:
            tokens = max(tokens // 2, job.longest)
            yield Fix("actor.max_tokens_per_microbatch", actor.max_tokens_per_microbatch, tokens)


def _engine_fixes(job: PlannedRun) -> Iterator[Fix]:
    """A KV cache that holds a sample, a smaller KV cache, and engines on more GPUs."""
    engine, longest = (
        job.config.rollout.engine,
        job.config.rollout.max_prompt_tokens + job.config.rollout.max_response_tokens,
    )
    if engine.mem_fraction_static is not None and not cache_holds_a_sample(job):
        for tenths in range(1, 10):
            if tenths / 10 > engine.mem_fraction_static:
                yield Fix("rollout.engine.mem_fraction_static", engine.mem_fraction_static, tenths / 10)
    tokens = engine.max_total_tokens
    # A KV cache of fewer than eight sequences would starve the engine.
    while tokens // 2 >= 8 * longest:
        tokens //= 2
        yield Fix("rollout.engine.max_total_tokens", engine.max_total_tokens, tokens)
    for tp in ENGINE_TP:
        node = job.config.cluster.gpus_per_node
        fills = job.engine_gpus or tp * engine.num_engines <= node
        if tp > engine.tensor_parallel_size and node % tp == 0 and engine_splits(job, tp):
            number = () if fills else (("rollout.engine.num_engines", node // tp),)
            served = (("rollout.engine.served", job.engine_gpus // tp),) if job.engine_gpus else ()
            yield Fix("rollout.engine.tensor_parallel_size", engine.tensor_parallel_size, tp, number + served)


def _split_fixes(job: PlannedRun) -> Iterator[Fix]:
    """More ranks a model, the smallest step of each kind first."""
    node, model = job.config.cluster.gpus_per_node, job.model
    for tp in divisors(math.gcd(node, model.heads)):
        if tp > job.tp:
            yield Fix("actor.tensor_model_parallel_size", job.tp, tp, (("actor.sequence_parallel", True),))
    for ep in divisors(model.experts) if model.experts else ():
        if job.ep < ep <= node:
            yield Fix("actor.expert_model_parallel_size", job.ep, ep)
    for pp in divisors(model.layers):
        if pp > job.pp:
            yield Fix("actor.pipeline_model_parallel_size", job.pp, pp)
    for cp in (2, 4, 8):
        if cp > job.cp:
            yield Fix("actor.context_parallel_size", job.cp, cp)


def refusal(own: LayoutPlan | RefusedLayout, *, labelled: bool = False) -> str:
    """One line about a run that does not fit: what is too large, and the first key to change.

    labelled: name phases and causes of memory by their labels (labels.py), not by their keys.
    """
    if isinstance(own, RefusedLayout):
        return own.reason
    job, lead = own.job, _lead(own, labelled)
    fix = first_fix(own)
    if fix is not None:
        return f"{lead}; change {fix}"
    best = next(iter(search(job)), None) if _any_fits(job) else None
    if best is not None:
        return (
            f"{lead}; no single key does it, together these do:"
            f" {', '.join(map(str, differences(job, best.job)))}"
        )
    nodes = enough_nodes(job)
    if nodes is not None:
        return (
            f"{lead}; no layout of {job.gpus} GPUs fits: change cluster.actor_nodes:"
            f" {job.config.cluster.actor_nodes} -> {nodes}"
        )
    return (
        f"{lead}; no layout fits on {BIGGER[-1]} nodes either: change cluster.gpu to one with more memory, or"
        " take shorter sequences"
    )


def _lead(own: LayoutPlan, labelled: bool) -> str:
    """What is too large, and by how much."""
    job, found = own.job, own.memory
    if found.fits and not cache_holds_a_sample(job):
        longest = job.config.rollout.max_prompt_tokens + job.config.rollout.max_response_tokens
        return (
            f"does not fit: an engine's cache holds {kv_tokens(job)} tokens, and a sample takes up to"
            f" {longest}"
        )
    if found.fits:
        size = job.config.rollout.engine.tensor_parallel_size
        return (
            f"does not fit: an engine on {size} GPUs of its own needs {_gib(sum(engine(job).values()))} of"
            f" {_gib(found.limit)}"
        )
    causes = sorted(found.phases[found.worst].items(), key=lambda item: -item[1])[:2]
    phase = MEMORY_PHASES[found.worst].text if labelled else found.worst
    most = " and ".join(
        f"{MEMORY_CAUSES[cause].text if labelled else cause} {_gib(value)}" for cause, value in causes
    )
    return (
        f"does not fit: {phase} needs {_gib(found.peak)} of {_gib(found.limit)} on pipeline stage"
        f" {found.stage} ({most})"
    )


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


def differences(job: PlannedRun, other: PlannedRun) -> list[Fix]:
    """The changes that turn the run `job` into the layout `other`, keys of the actor first."""
    keys = (
        "actor.tensor_model_parallel_size",
        "actor.sequence_parallel",
        "actor.pipeline_model_parallel_size",
        "actor.context_parallel_size",
        "actor.expert_model_parallel_size",
        "actor.recompute_granularity",
        "actor.recompute_method",
        "actor.recompute_num_layers",
        "actor.micro_batch_size",
        "actor.max_tokens_per_microbatch",
        "actor.use_distributed_optimizer",
        "actor.tp_comm_overlap",
        "rollout.engine.tensor_parallel_size",
        "rollout.engine.num_engines",
        "rollout.engine.served",
        "rollout.engine.release_memory",
    )
    pairs = [(key, _value(job, key), _value(other, key)) for key in keys]
    return [Fix(key, old, new) for key, old, new in pairs if old != new]


def _value(job: PlannedRun, key: str) -> Any:
    found: Any = job.config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def enough_nodes(job: PlannedRun) -> int | None:
    """The smallest number of actor nodes, out of BIGGER, on which some layout fits."""
    for nodes in BIGGER:
        if nodes * job.config.cluster.gpus_per_node > job.gpus:
            more = replace(
                job.change(cluster__actor_nodes=nodes), gpus=nodes * job.config.cluster.gpus_per_node
            )
            if _any_fits(more):
                return nodes
    return None


def _any_fits(job: PlannedRun) -> bool:
    return next(fitting(candidates(job, lean=True)), None) is not None
