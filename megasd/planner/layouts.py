"""Parallel layouts of a job: which are possible, which fit, how fast; and the first key to change where the job's own does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from megasd.config import ConfigError, samples_per_step
from megasd.planner.job import Job
from megasd.planner.memory import GIB, Memory, engine, engine_fits, memory
from megasd.planner.time import Time, step_time

ENGINE_TP = (1, 2, 4, 8)
BIGGER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # actor nodes that are tried for a model that does not fit
KV_STEP = 8192  # tokens that a smaller cache is rounded to


@dataclass(frozen=True)
class Plan:
    """A job with what it takes. `refused`: why it cannot run at all, whatever the memory."""

    job: Job
    memory: Memory | None = None
    time: Time | None = None
    refused: str | None = None

    @property
    def fits(self) -> bool:
        return self.refused is None and self.memory.fits and (not self.job.engine_gpus or engine_fits(self.job))


def plan(job: Job) -> Plan:
    why = illegal(job)
    return Plan(job, refused=why) if why else Plan(job, memory(job), step_time(job))


def illegal(job: Job) -> str | None:
    """Why the model cannot be split so over these GPUs, as a key with what is wrong; None: it can."""
    actor, model = job.config.actor, job.model
    try:
        dp = job.dp
    except ConfigError as error:
        return str(error).replace("run.num_processes", "cluster.actor_nodes")
    node = job.config.cluster.gpus_per_node
    checks = [
        (job.tp <= node, f"actor.tensor_model_parallel_size={job.tp}: more than the {node} GPUs of a node"),
        (model.heads % job.tp == 0, f"actor.tensor_model_parallel_size={job.tp}: does not divide {model.heads} heads"),
        (
            model.groups % job.tp == 0 or job.tp % model.groups == 0,
            f"actor.tensor_model_parallel_size={job.tp}: neither divides nor is a multiple of {model.groups} key heads",
        ),
        (job.ep > 1 or model.width % job.tp == 0, f"actor.tensor_model_parallel_size={job.tp}: does not divide the MLP's {model.width}"),
        (model.layers % job.pp == 0, f"actor.pipeline_model_parallel_size={job.pp}: does not divide {model.layers} layers"),
        (job.ep == 1 or model.experts > 0, f"actor.expert_model_parallel_size={job.ep}: no mixture of experts; set it to 1"),
        (not model.experts or model.experts % job.ep == 0, f"actor.expert_model_parallel_size={job.ep}: does not divide {model.experts}"),
        (job.gpus % (job.ep * job.pp) == 0, f"actor.expert_model_parallel_size={job.ep}: EP x PP does not divide {job.gpus} GPUs"),
        (
            not model.experts or job.tp == 1 or actor.sequence_parallel,
            "actor.sequence_parallel: Megatron trains a mixture of experts under TP only with it; set it to true",
        ),
        (job.tp > 1 or not actor.sequence_parallel, "actor.sequence_parallel: needs tensor parallelism; set it to false"),
        (
            samples_per_step(job.config) % dp == 0,
            f"rollout.num_prompts: {samples_per_step(job.config)} samples a step cannot be shared by {dp} data-parallel ranks",
        ),
    ]
    return next((why for good, why in checks if not good), None)


def search(job: Job) -> list[Plan]:
    """Every layout of the job's GPUs that fits, fastest first; of those within 2 percent the one with fewest stages and context ranks."""
    found = [Plan(one, held, step_time(one)) for one in candidates(job) if (held := memory(one)).fits]
    found = [one for one in found if one.fits]
    return sorted(found, key=lambda one: (int(math.log(one.time.seconds, 1.02)), one.job.pp * one.job.cp, one.time.seconds))


def candidates(job: Job, *, lean: bool = False) -> Iterator[Job]:
    """Jobs to look at. lean: those alone that take least memory, the smallest microbatch and full recomputing."""
    actor, model = job.config.actor, job.model
    for tp in divisors(math.gcd(job.config.cluster.gpus_per_node, model.heads)):
        for pp in divisors(model.layers):
            for cp in (1, 2, 4, 8):
                for ep in divisors(model.experts) if model.experts else (1,):
                    if job.gpus % (tp * pp * cp) or job.gpus % (ep * pp) or (ep > 1 and ep > job.config.cluster.gpus_per_node):
                        continue
                    split = job.change(
                        actor__tensor_model_parallel_size=tp,
                        actor__pipeline_model_parallel_size=pp,
                        actor__context_parallel_size=cp,
                        actor__expert_model_parallel_size=ep,
                        actor__sequence_parallel=tp > 1,
                        actor__use_distributed_optimizer=True,
                    )
                    if illegal(split) is None:
                        for sized in islice(_sizes(split), 1 if lean else None):
                            # Selective recomputing of core attention frees next to nothing beside flash attention: only if asked for.
                            for again in ("full",) if lean else dict.fromkeys((None, actor.recompute_granularity, "full")):
                                yield from _engines(sized.change(actor__recompute_granularity=again))


def _sizes(job: Job) -> Iterator[Job]:
    """Microbatches: of 1, 2, 4, 8 samples, or as many of the longest sequences' tokens."""
    if job.config.actor.max_tokens_per_microbatch is None:
        for size in (1, 2, 4, 8):
            if job.samples % size == 0:
                yield job.change(actor__micro_batch_size=size)
    else:
        for count in (1, 2, 4):
            yield job.change(actor__max_tokens_per_microbatch=count * job.longest)


def _engines(job: Job) -> Iterator[Job]:
    """Engine sizes that fill the node, or the engines' own nodes; an engine's cache as the config has it."""
    if not job.samples_itself:
        yield job
        return
    for tp in ENGINE_TP:
        if tp > job.config.cluster.gpus_per_node or job.model.heads % tp:
            continue
        number = {} if job.engine_gpus else {"rollout__engine__num_engines": job.config.cluster.gpus_per_node // tp}
        yield job.change(rollout__engine__tensor_parallel_size=tp, rollout__engine__release_memory=job.colocated, **number)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# ---- refusal ----


@dataclass(frozen=True)
class Fix:
    """One key and its new value; more keys that have to follow it."""

    key: str
    old: Any
    new: Any
    with_it: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        also = "".join(f", {key}={_text(value)}" for key, value in self.with_it)
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)}{also}"

    def apply(self, job: Job) -> Job:
        return job.change(**{key.replace(".", "__"): value for key, value in ((self.key, self.new), *self.with_it)})


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_fix(own: Plan) -> Fix | None:
    """The first single change, in the order of what it costs, that makes the job fit. Of one kind the smallest step that does."""
    for fix in fixes(own.job):
        changed = fix.apply(own.job)
        if illegal(changed) is None and Plan(changed, memory(changed)).fits:
            return fix
    return None


def fixes(job: Job) -> Iterator[Fix]:
    """Changes in the order in which they are tried: those that cost nothing, a smaller engine, smaller microbatches, recomputing, then
    more ranks a model (tensor parallel, experts, pipeline, context), then more nodes."""
    config, actor, engine = job.config, job.config.actor, job.config.rollout.engine
    if job.colocated and not engine.release_memory:
        yield Fix("rollout.engine.release_memory", False, True)
    if not actor.use_distributed_optimizer and job.dp > 1:
        yield Fix("actor.use_distributed_optimizer", False, True)
    if job.tp > 1 and not actor.sequence_parallel:
        yield Fix("actor.sequence_parallel", False, True)
    if job.samples_itself:
        yield from _engine_fixes(job)
    teacher, term = config.algorithm.teacher, config.algorithm.distill
    if job.has_teacher and term is not None and term.support == "teacher" and teacher.transport == "hidden":
        yield Fix("algorithm.teacher.transport", "hidden", "record")  # the same loss, hundreds of bytes a token in place of thousands
    if actor.max_tokens_per_microbatch is None:
        for size in sorted((n for n in divisors(actor.micro_batch_size) if n < actor.micro_batch_size), reverse=True):
            yield Fix("actor.micro_batch_size", actor.micro_batch_size, size)
    else:
        tokens = actor.max_tokens_per_microbatch
        while tokens > job.longest:
            tokens = max(tokens // 2, job.longest)
            yield Fix("actor.max_tokens_per_microbatch", actor.max_tokens_per_microbatch, tokens)
    if actor.loss_memory_mib > 256:
        yield Fix("actor.loss_memory_mib", actor.loss_memory_mib, 256)
    if actor.recompute_granularity != "full":
        yield Fix("actor.recompute_granularity", actor.recompute_granularity, "full", (("actor.recompute_num_layers", 1),))
    yield from _splits(job)


def _engine_fixes(job: Job) -> Iterator[Fix]:
    engine, longest = job.config.rollout.engine, job.config.rollout.max_prompt_tokens + job.config.rollout.max_response_tokens
    tokens = engine.max_total_tokens
    while tokens // 2 >= 8 * longest:  # a cache of fewer sequences would starve the engine
        tokens //= 2
        yield Fix("rollout.engine.max_total_tokens", engine.max_total_tokens, tokens)
    for tp in ENGINE_TP:
        fills = job.engine_gpus or tp * engine.num_engines <= job.config.cluster.gpus_per_node
        if tp > engine.tensor_parallel_size and tp <= job.config.cluster.gpus_per_node:
            number = () if fills else (("rollout.engine.num_engines", job.config.cluster.gpus_per_node // tp),)
            served = (("rollout.engine.served", job.engine_gpus // tp),) if job.engine_gpus else ()
            yield Fix("rollout.engine.tensor_parallel_size", engine.tensor_parallel_size, tp, number + served)


def _splits(job: Job) -> Iterator[Fix]:
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


def refusal(own: Plan) -> str:
    """One line: what does not fit, and the first key to change."""
    job, lead = own.job, _lead(own)
    fix = first_fix(own)
    if fix is not None:
        return f"{lead}; change {fix}"
    best = next(iter(search(job)), None) if any(Plan(one, memory(one)).fits for one in candidates(job, lean=True)) else None
    if best is not None:
        return f"{lead}; no single key does it, together these do: {', '.join(map(str, differences(job, best.job)))}"
    nodes = enough_nodes(job)
    if nodes is not None:
        return f"{lead}; no layout of {job.gpus} GPUs fits: change cluster.actor_nodes: {job.config.cluster.actor_nodes} -> {nodes}"
    return f"{lead}; no layout fits on {BIGGER[-1]} nodes either: change cluster.gpu to one with more memory, or take shorter sequences"


def _lead(own: Plan) -> str:
    if own.refused:
        return own.refused
    job, found = own.job, own.memory
    if found.fits:
        size = job.config.rollout.engine.tensor_parallel_size
        return f"does not fit: an engine on {size} GPUs of its own needs {_gib(sum(engine(job).values()))} of {_gib(found.limit)}"
    causes = sorted(found.phases[found.worst].items(), key=lambda item: -item[1])[:2]
    most = " and ".join(f"{name} {_gib(value)}" for name, value in causes)
    return f"does not fit: {found.worst} needs {_gib(found.peak)} of {_gib(found.limit)} on pipeline stage {found.stage} ({most})"


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


def differences(job: Job, other: Job) -> list[Fix]:
    """Keys in which a found layout differs, the layout's first."""
    keys = (
        "actor.tensor_model_parallel_size", "actor.sequence_parallel", "actor.pipeline_model_parallel_size", "actor.context_parallel_size",
        "actor.expert_model_parallel_size", "actor.recompute_granularity", "actor.micro_batch_size", "actor.max_tokens_per_microbatch",
        "actor.use_distributed_optimizer", "rollout.engine.tensor_parallel_size", "rollout.engine.num_engines",
        "rollout.engine.release_memory",
    )  # fmt: skip
    pairs = [(key, _value(job, key), _value(other, key)) for key in keys]
    return [Fix(key, old, new) for key, old, new in pairs if old != new]


def _value(job: Job, key: str) -> Any:
    found: Any = job.config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def enough_nodes(job: Job) -> int | None:
    """The fewest of BIGGER actor nodes on which some layout fits."""
    for nodes in BIGGER:
        if nodes * job.config.cluster.gpus_per_node > job.gpus:
            more = replace(job.change(cluster__actor_nodes=nodes), gpus=nodes * job.config.cluster.gpus_per_node)
            if any(Plan(one, memory(one)).fits for one in candidates(more, lean=True)):
                return nodes
    return None
