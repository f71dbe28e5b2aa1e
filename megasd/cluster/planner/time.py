"""Seconds of a step by phase, from a roofline model.

The seconds of a part are its operations over a peak rate, or its bytes over a bandwidth, times one
stated efficiency. A phase's parts are named by what they wait for: compute, HBM, NVLink, IB (the
network between nodes), disk, CPU (fixed costs), bubble (an idle pipeline stage). Parts of a phase
that cannot overlap are added. The largest part is the phase's cause.

    sampling   prefill: one prompt a question, since its samples share the cache / compute.
               decode: steps x max(weights + cache of the running requests / HBM, their operations /
               compute) + LAUNCH a step, and 2 all-reduces a layer under TP. Steps: the longest
               response, or what the cache and rollout.max_concurrency make of all tokens.
    teacher    Forwards over its contexts.
    student    Forward and backward (3 forwards), what the backward recomputes, the loss's matrix
               products (student, teacher, two gradients), other forwards that the algorithm needs.
               Then communication: TP (2 all-reduces a layer forward, as many backward; one of n
               bytes over t ranks moves 2 n (t - 1) / t), CP (keys and values of the other ranks a
               layer, twice backward, under attention), EP (two all-to-alls a layer each way), PP
               (the residual stream to the next stage, its gradient back), bubble (pp - 1) /
               microbatches of all that (2104.04473, section 2.2). FP8's rate holds for the linear
               layers that are in FP8: not for attention scores, the output layer, and the layers
               left in bf16, of which the busiest stage has most.
    gradients  Reduce-scatter in fp32 over DP x CP, and the gather of the parameters. If an overlap
               flag is on, EXPOSED of that collective.
    optimizer  Adam's bytes (30 a weight in bf16) over HBM, and the update of an EMA teacher.
    push       push.py

The step is the sum of the phases. If engines have GPUs of their own and rollout.overlap=1, sampling
runs next to the other phases, and the longer of the two counts. Verification, batch building,
evaluation and checkpoints are left out. NOTHING HERE WAS MEASURED ON A GPU: the seconds are good
for comparing layouts, not for promises. labels.py has the words that users see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megasd.cluster.planner import push
from megasd.cluster.planner.engine_memory import engine_weights, kv_token_bytes, kv_tokens
from megasd.cluster.planner.job import PlannedRun
from megasd.config.schema import TeacherConfig, samples_per_step
from megasd.config.variants import token_weight_traits
from megasd.models.flops import layers_flops, linear_weights, output_flops, recompute_flops, scores_flops

# Assumptions, each stated once.
# Part of the dense bf16 peak that matrix products of training and prefill reach, attention too.
COMPUTE = 0.6
# Part of the fp8 peak that is reached, scaling and casts included.
COMPUTE_FP8 = 0.45
# Part of the nominal bandwidth of HBM, NVLink and IB that is reached.
BANDWIDTH = push.EFFICIENCY
# Seconds of a decode step in addition to its bytes: CUDA graph launch, sampling, scheduler.
LAUNCH = 0.002
# Seconds of a small all-reduce within a node.
LATENCY = 15e-6
# Part of a collective's time that computing does not hide, if the two overlap.
EXPOSED = 0.25
# Computed tokens over true tokens in padded microbatches of sorted lengths. Packed ones: 1.
PADDING = 1.2
# Seconds that a colocated engine takes to release its memory and to take it back.
SLEEP = 1.0


@dataclass(frozen=True)
class Phase:
    """A phase of the step. parts: what the phase waits for -> seconds."""

    name: str
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def cause(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True)
class Time:
    """The time of a mean step, with the numbers that trainer/throughput.py logs.

    tokens_per_gpu: tokens of the student's sequences a second of the whole step and a GPU that
    trains. mfu: model FLOPs of teacher and student over the peak, in the seconds of training.
    """

    phases: list[Phase]
    seconds: float
    tokens_per_gpu: float
    mfu: float

    @property
    def bottleneck(self) -> Phase:
        """The phase that takes longest."""
        return max(self.phases, key=lambda phase: phase.seconds)


def step_time(job: PlannedRun) -> Time:
    """The time of a mean step, by phase."""
    phases = [
        *([sampling(job)] if job.samples_itself else []),
        *([teacher_phase(job, job.active_teacher)] if job.active_teacher is not None else []),
        student(job),
    ]
    phases += [gradients(job), optimizer(job)]
    if job.samples_itself:
        seconds, link = push.seconds(job)
        sleeping = {"CPU": SLEEP} if job.colocated and job.config.rollout.engine.release_memory else {}
        phases.append(Phase("push", {link: seconds} | sleeping))
    seconds = sum(phase.seconds for phase in phases)
    if job.engine_gpus and job.config.rollout.overlap:
        sampled = phases[0].seconds
        seconds = max(sampled, seconds - sampled)
    training = sum(
        phase.seconds for phase in phases if phase.name in ("teacher", "student", "gradients", "optimizer")
    )
    samples, peak = (
        samples_per_step(job.config),
        job.gpu.fp8 if job.config.actor.fp8 and job.gpu.fp8 else job.gpu.bf16,
    )
    return Time(
        phases,
        seconds,
        samples * _mean(job) / seconds / job.gpus,
        samples * _model_flops(job) / (training * job.gpus * peak),
    )


def _model_flops(job: PlannedRun) -> float:
    """FLOPs of a sample as trainer/throughput.py counts them.

    An update counts as three forwards of the student, a context as one forward of the teacher.
    """
    response, hf = int(job.mean_response), job.model.hf
    student = 3 * job.config.algorithm.epochs * (layers_flops(hf, _mean(job)) + output_flops(hf, response))
    teacher = job.teacher_model.hf
    return student + job.teacher_forwards * (
        layers_flops(teacher, _mean_teacher(job)) + output_flops(teacher, response)
    )


def _mean_teacher(job: PlannedRun) -> int:
    """Tokens of the teacher's mean sequence."""
    length = int(job.mean_prompt + job.context * job.mean_response + job.mean_response)
    return min(length, int(job.teacher_model.hf.get("max_position_embeddings") or length))


def _mean(job: PlannedRun) -> int:
    """Tokens of the student's mean sequence."""
    return int(job.mean_prompt + job.mean_response)


def _rate(job: PlannedRun) -> float:
    """FLOP/s of a training GPU in bf16."""
    return job.gpu.bf16 * COMPUTE


def _linear_rate(job: PlannedRun, layers: int) -> float:
    """FLOP/s of the linear layers, on the pipeline stage that has most layers in bf16.

    The model has `layers` layers. Without FP8 this is the bf16 rate.
    """
    actor = job.config.actor
    if actor.fp8 is None or job.gpu.fp8 is None:
        return _rate(job)
    ends = (
        (actor.num_layers_at_start_in_bf16, actor.num_layers_at_end_in_bf16)
        if actor.first_last_layers_bf16
        else (0, 0)
    )
    wide = min(1.0, (max(ends) if job.pp > 1 else sum(ends)) * job.pp / layers)
    return 1 / (wide / _rate(job) + (1 - wide) / (job.gpu.fp8 * COMPUTE_FP8))


def _forward(job: PlannedRun, hf: Mapping[str, Any], length: int) -> float:
    """Seconds that one GPU would take for the forward of all layers over one sequence."""
    scores = scores_flops(hf, length)
    return (layers_flops(hf, length) - scores) / _linear_rate(
        job, int(hf["num_hidden_layers"])
    ) + scores / _rate(job)


def _recompute(job: PlannedRun, length: int) -> float:
    """Seconds that one GPU would take for what the backward recomputes of one sequence."""
    actor, hf = job.config.actor, job.model.hf
    scores = (
        scores_flops(hf, length)
        if actor.recompute_granularity == "selective" and "core_attn" in actor.recompute_modules
        else 0.0
    )
    if actor.recompute_granularity == "full":
        return recompute_flops(hf, length, actor) / layers_flops(hf, length) * _forward(job, hf, length)
    return (recompute_flops(hf, length, actor) - scores) / _linear_rate(
        job, job.model.layers
    ) + scores / _rate(job)


# ---- sampling ----


def sampling(job: PlannedRun) -> Phase:
    """Prefill and decode of a step's samples, on the engines."""
    rollout, gpu, tp = job.config.rollout, job.gpu, job.config.rollout.engine.tensor_parallel_size
    engines, hf = max(1, job.engines), job.model.hf
    # From here on the numbers are those of one engine.
    samples = samples_per_step(job.config) / engines
    prompts = rollout.num_prompts / engines
    room = min(
        rollout.max_concurrency / engines, kv_tokens(job) / (job.mean_prompt + job.mean_response), samples
    )
    steps = max(float(rollout.max_response_tokens), samples * job.mean_response / max(room, 1e-9))
    # Mean number of requests in a decode step.
    running = samples * job.mean_response / steps
    cache = running * (job.mean_prompt + job.mean_response / 2) * kv_token_bytes(job)
    moved = (engine_weights(job) * _touched(job, running) + cache) / (gpu.hbm * BANDWIDTH)
    computed = (
        running
        * 2
        * (linear_weights(hf) * job.model.layers + job.model.hidden * int(hf["vocab_size"]))
        / tp
        / (gpu.bf16 * COMPUTE)
    )
    prefill = prompts * layers_flops(hf, max(1, int(job.mean_prompt))) / tp / (gpu.bf16 * COMPUTE)
    parts = {
        "compute": prefill + (steps * computed if computed > moved else 0.0),
        "HBM": steps * moved if moved >= computed else 0.0,
    }
    parts["CPU"] = steps * LAUNCH
    if tp > 1:
        volume = 2 * (tp - 1) / tp * running * job.model.hidden * job.word / (gpu.nvlink * BANDWIDTH)
        parts["NVLink"] = steps * 2 * job.model.layers * (LATENCY + volume)
    return Phase("sampling", parts)


def _touched(job: PlannedRun, running: float) -> float:
    """Part of the weights that a decode step reads.

    In a mixture of experts, a step reads only the experts that some request visits.
    """
    if not job.model.experts:
        return 1.0
    idle = (1 - int(job.model.hf["num_experts_per_tok"]) / job.model.experts) ** max(1.0, running)
    expert = job.model.experts * 3 * job.model.hidden * job.model.width * job.model.layers / job.model.weights
    return 1 - expert * idle


# ---- training ----


def teacher_phase(job: PlannedRun, teacher: TeacherConfig) -> Phase:
    """The teacher's forwards over the samples of a step, one for each context."""
    model = job.teacher_model
    length = _mean_teacher(job)
    samples = job.samples * job.config.algorithm.minibatches
    forward = samples * _forward(job, model.hf, length) * _padding(job) / (job.tp * job.cp * job.pp)
    reads = teacher.transport == "record"
    head = samples * output_flops(model.hf, int(job.mean_response)) / (job.tp * job.cp) * reads / _rate(job)
    parts = _with_links(job, forward + head, samples * length, forwards=1.0, backwards=0.0)
    return Phase("teacher", {name: seconds * job.teacher_forwards for name, seconds in parts.items()})


def student(job: PlannedRun) -> Phase:
    """Forwards and backwards of the student over the samples of a step, with the loss."""
    actor, algorithm, hf = job.config.actor, job.config.algorithm, job.model.hf
    samples, mean = job.samples * algorithm.minibatches, _mean(job)
    # Forwards without backward: pi_old, and the scan for token weights.
    extra = float(algorithm.minibatches * algorithm.epochs > 1)
    extra += token_weight_traits(algorithm).reads_divergence
    # Part of a forward's collectives that recomputing repeats.
    repeated = 0.0
    if actor.recompute_granularity == "full":
        repeated = recompute_flops(hf, mean, actor) / layers_flops(hf, mean)
    elif actor.recompute_granularity == "selective" and {"mlp", "moe"} & set(actor.recompute_modules):
        repeated = 0.5
    epochs, per_rank = algorithm.epochs, samples * _padding(job) / (job.tp * job.cp * job.pp)
    forward, again = per_rank * _forward(job, hf, mean), per_rank * _recompute(job, mean)
    head = samples * output_flops(hf, int(job.mean_response)) / (job.tp * job.cp) / _rate(job)
    teacher = job.active_teacher
    products = 3 + (teacher is not None and algorithm.distill is not None and teacher.transport == "hidden")
    compute = epochs * (forward * 3 + again + head * products) + extra * (forward + head)
    return Phase(
        "student",
        _with_links(
            job,
            compute,
            samples * mean,
            forwards=epochs + extra,
            backwards=float(epochs),
            recomputed=epochs * repeated,
        ),
    )


def _padding(job: PlannedRun) -> float:
    """Computed tokens over true tokens."""
    return 1.0 if job.config.actor.packing else PADDING


def _with_links(
    job: PlannedRun,
    compute: float,
    tokens: float,
    *,
    forwards: float,
    backwards: float,
    recomputed: float = 0.0,
) -> dict[str, float]:
    """Seconds of a rank of the busiest stage, by what it waits for: `compute` and communication.

    tokens: true tokens of a data-parallel rank. forwards, backwards: how often all tokens are gone
    through. recomputed: forwards that recomputing adds; they send nothing to other stages.
    """
    gpu, model = job.gpu, job.model
    parts = {"compute": compute, "NVLink": 0.0, "IB": 0.0}
    layers, local = model.layers / job.pp, tokens * _padding(job) / job.cp
    hidden = local * model.hidden * job.word
    between, forwards = forwards + backwards, forwards + recomputed
    if job.tp > 1:
        # Sequence parallelism gathers the inputs of linear layers once more in the backward.
        again = 0.5 * backwards if job.config.actor.sequence_parallel else 0.0
        volume = 2 * (job.tp - 1) / job.tp * hidden * layers * 2 * (forwards + backwards + again)
        parts["NVLink"] += (
            volume / (gpu.nvlink * BANDWIDTH) * (EXPOSED if job.config.actor.tp_comm_overlap else 1.0)
        )
    node = job.config.cluster.gpus_per_node
    if job.cp > 1:
        keys = 2 * local * (job.cp - 1) * max(1.0, model.groups / job.tp) * model.head_dim * job.word
        link = "NVLink" if job.tp * job.cp <= node else "IB"
        rate = gpu.nvlink if link == "NVLink" else gpu.network
        parts[link] += EXPOSED * keys * layers * (forwards + 2 * backwards) / (rate * BANDWIDTH)
    if job.ep > 1:
        visits = int(model.hf["num_experts_per_tok"]) * hidden / job.sp * (job.ep - 1) / job.ep
        link = "NVLink" if job.ep <= node else "IB"
        rate = gpu.nvlink if link == "NVLink" else gpu.network
        parts[link] += 2 * visits * layers * (forwards + backwards) / (rate * BANDWIDTH)
    if job.pp > 1:
        link, rate = ("NVLink", gpu.nvlink) if job.gpus <= node else ("IB", gpu.network)
        parts[link] += hidden / job.sp * between / (rate * BANDWIDTH)
        parts["bubble"] = sum(parts.values()) * (job.pp - 1) / job.microbatches
    return {name: seconds for name, seconds in parts.items() if seconds}


def gradients(job: PlannedRun) -> Phase:
    """Reduction of the gradients and gather of the parameters, on the stage with most weights."""
    actor, ranks = job.config.actor, job.dp * job.cp
    if ranks == 1:
        return Phase("gradients", {"NVLink": 0.0})
    weights = max(job.model.rank(actor, stage).total for stage in {0, job.pp - 1})
    within = job.tp * ranks <= job.config.cluster.gpus_per_node
    rate = (job.gpu.nvlink if within else job.gpu.network) * BANDWIDTH
    per_byte = (ranks - 1) / ranks * weights / rate
    reduce = (
        4
        * per_byte
        * (1 if actor.use_distributed_optimizer else 2)
        * (EXPOSED if actor.overlap_grad_reduce else 1.0)
    )
    gather = (
        job.word
        * per_byte
        * (EXPOSED if actor.overlap_param_gather else 1.0)
        * actor.use_distributed_optimizer
    )
    return Phase("gradients", {"NVLink" if within else "IB": (reduce + gather) * _updates(job)})


def optimizer(job: PlannedRun) -> Phase:
    """Adam's reads and writes, and the update of an EMA teacher, on the stage with most weights."""
    actor = job.config.actor
    count = max(
        (job.model.rank(actor, stage) for stage in {0, job.pp - 1}), key=lambda weights: weights.total
    )
    shared, experts = (job.dp * job.cp, job.expert_dp) if actor.use_distributed_optimizer else (1, 1)
    # Read gradient, main copy, moments (16); write main copy, moments (12) and the model's
    # parameter (2). fp32: 16 and 12.
    moved = (30 if job.word == 2 else 28) * (count.dense / shared + count.expert / experts) * _updates(job)
    teacher = job.config.algorithm.teacher
    if teacher is not None and teacher.weights == "ema":
        # The weights are read, cast to fp32, and mixed into the teacher's copy.
        moved += (job.word + 8 + 8) * count.total
    return Phase("optimizer", {"HBM": moved / (job.gpu.hbm * BANDWIDTH)})


def _updates(job: PlannedRun) -> int:
    """Optimizer steps in a step of the run."""
    return job.config.algorithm.minibatches * job.config.algorithm.epochs
