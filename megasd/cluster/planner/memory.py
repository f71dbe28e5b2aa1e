"""Bytes of a rank by cause, at each of a step's phases; the worst pipeline stage.

    weights      parameters in the model's dtype (a distributed optimizer keeps them in its buffer, not twice)
    gradients    4 bytes a weight: Megatron's buffers with grad_reduce_in_fp32
    optimizer    bf16: 4 + 8 bytes a weight, main copy and Adam's moments; fp32: 8. Over DP x CP
                 with the distributed optimizer
                 (Rajbhandari et al. 1910.02054; Megatron's own table: 18, or 6 + 12 / d, bytes a weight)
    teacher      fp32 copy of the rank's weights, not cut over DP (actor/teacher.py); the separate
                 model in the actor's dtype
    teacher cast during the teacher's pass: its weights once more in the model's dtype, unless that is fp32; its output layer stays
    signal       what is kept of the teacher's pass until the student's (actor/teacher_signal.py):
                 of every response token of the rank's
                 share of all minibatches, on the last stage, a hidden state, or 8 K + 4 bytes; once, the teacher's output weight, where
                 that is no tensor of its own already
    activations  activations.py
    backward     gradients of activations
    loss         the chunk's logits within actor.loss_memory_mib, and beside them what is as long as
                 the microbatch
                 (ops/fused_linear_loss.py)
    batch        an update's microbatches, which all go to the GPU at once, and the per-token
                 streams of all minibatches
    sync         rank 0: two buckets, and what other ranks send for two; an engine's receive buffer (group)
    engine       SGLang's weights, KV cache (2 x layers x key heads x d words a token) and OVERHEAD
    NCCL, context, fragmentation    constants below

Three moments: training, the teacher's pass, and sampling (where engines share the GPU). With
rollout.engine.release_memory the engine's weights and cache are there only while it samples.
Everything is reckoned for the longest sequences that the config allows.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner import activations
from megasd.cluster.planner.engine_memory import cache_holds_a_sample, engine
from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import SHADOWED, PlannedRun
from megasd.config.variants import credit_traits

# Per communicator: NCCL_BUFFSIZE's default of 4 MiB (NCCL user guide, environment variables), two
# directions, 24 channels. An estimate.
NCCL_BYTES = 2 * 24 * 4 * 2**20
# a process's CUDA context, cuBLAS and cuDNN workspaces, loaded kernels. An assumption
CONTEXT = 1.5 * GIB
# what a released engine keeps: context and CUDA graphs. An assumption
ENGINE_RESIDUE = 2 * GIB
# of what the actor allocates: blocks of torch's allocator that fit nothing. An assumption
FRAGMENTATION = 0.05
# of the GPU that a plan leaves free
RESERVE = 0.02
PHASES = ("training", "teacher", "sampling")
# tensors [chunk, K + 1] of 4 bytes alive in a readout and the gradient of its loss, as measured on
# the CPU
READOUT_ROWS = 13


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by phase and cause, of the worst rank: a stage's first."""

    stage: int
    phases: dict[str, dict[str, int]]
    # bytes that may be used
    limit: int

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def estimate_memory(job: PlannedRun) -> MemoryEstimate:
    """Of the pipeline stage that needs most."""
    limit = int(job.gpu.memory * (1 - RESERVE))
    found = [
        MemoryEstimate(stage, _phases(job, stage), limit)
        for stage in sorted({0, 1, job.pp - 1} & set(range(job.pp)))
    ]
    return max(found, key=lambda memory: memory.peak)


def _phases(job: PlannedRun, stage: int) -> dict[str, dict[str, int]]:
    fixed = static(job, stage)
    signal = {"signal": signal_bytes(job, stage)}
    phases = {"training": fixed | signal | training_memory(job, stage)}
    if job.has_teacher:
        phases["teacher"] = fixed | signal | teacher_memory(job, stage)
    if shares_gpu(job, stage):
        phases["sampling"] = dict(fixed)
    released = job.config.rollout.engine.release_memory
    for phase, causes in phases.items():
        causes["fragmentation"] = FRAGMENTATION * sum(causes.values())
        causes["NCCL"], causes["context"] = communicators(job, stage) * NCCL_BYTES, CONTEXT
        if shares_gpu(job, stage):
            causes |= (
                engine(job) if phase == "sampling" or not released else {"engine overhead": ENGINE_RESIDUE}
            )
    # the CPU has none of these
    if job.gpu.local_spec:
        for causes in phases.values():
            for name in ("fragmentation", "NCCL", "context", "engine overhead"):
                causes.pop(name, None)
    return {
        phase: {name: int(value) for name, value in causes.items() if value}
        for phase, causes in phases.items()
    }


def shares_gpu(job: PlannedRun, stage: int) -> bool:
    """Whether an engine lies on a GPU of that stage: engines take the first node's GPUs in order,
    and so do stages, equally many each.
    """
    taken = min(
        job.config.cluster.gpus_per_node, job.engines * job.config.rollout.engine.tensor_parallel_size
    )
    return job.colocated and stage * (job.gpus // job.pp) < taken


# ---- what is always there ----


def static(job: PlannedRun, stage: int) -> dict[str, float]:
    """Of the actor, between steps."""
    actor, count = job.config.actor, job.model.rank(job.config.actor, stage)
    shared, experts = (job.dp * job.cp, job.expert_dp) if actor.use_distributed_optimizer else (1, 1)
    per_weight = 12 if actor.dtype == "bfloat16" else 8
    causes = {
        "weights": float(job.word * count.total),
        "gradients": 4.0 * count.total,
        "optimizer": per_weight * (count.dense / shared + count.expert / experts),
        "teacher": teacher_bytes(job, stage),
        "sync": sync_bytes(job, stage),
    }
    return causes | fp8_weights(job)


def fp8_weights(job: PlannedRun) -> dict[str, float]:
    """TransformerEngine's FP8 copies of the linear layers' weights, as they are and transposed: one
    byte each (Hopper multiplies FP8 in one layout only). With fp8_param_gather they take the place
    of the bf16 weights.
    """
    actor = job.config.actor
    if actor.fp8 is None:
        return {}
    kept = (
        actor.num_layers_at_start_in_bf16 + actor.num_layers_at_end_in_bf16
        if actor.first_last_layers_bf16
        else 0
    )
    layers = max(0.0, (job.model.layers - kept) / job.pp)
    linear = job.model.layer(actor).total * layers
    return {"fp8 copies": (0 if actor.fp8_param_gather else 2) * linear}


def teacher_bytes(job: PlannedRun, stage: int) -> float:
    teacher, actor = job.config.algorithm.teacher, job.config.actor
    if teacher is None:
        return 0.0
    if teacher.weights == "separate":
        return float(job.word * job.teacher_model.rank(actor, stage).total)
    return 4.0 * job.model.rank(actor, stage).total if teacher.weights in SHADOWED else 0.0


def sync_bytes(job: PlannedRun, stage: int) -> float:
    """On rank 0, the first of the first stage: two buckets, and what other ranks send in two places
    by sender, each as long as the sender's longest message there (weights/gather.py). Other ranks
    hold two of their own messages, which is less.
    """
    if not job.samples_itself or stage != 0:
        return 0.0
    mib = job.config.sync.bucket_mib or (24 if job.gpu.local_spec else 512)
    buckets = job.model.buckets(mib << 20, job.word, job.pp)
    largest, ranks = max(map(sum, buckets)), job.tp * job.ep
    received = 0.0
    for slot in (buckets[0::2], buckets[1::2]):
        messages = [max((bucket[k] for bucket in slot), default=0) / ranks for k in range(job.pp)]
        received += sum(messages) * ranks - messages[0]
    # Engines on the same GPUs map the actor's buffer; a group's engines receive into memory of their own.
    return 2 * largest + received + (largest if job.colocated and job.config.sync.transport == "group" else 0)


def communicators(job: PlannedRun, stage: int) -> int:
    """Process groups of more than one rank that carry GPU tensors, the world's among them."""
    tied = job.model.table.tied and job.pp > 1
    sizes = (job.gpus, job.tp, job.pp, job.cp, job.dp, job.dp * job.cp, job.ep, 2 if tied else 1)
    group = job.config.sync.transport == "group" and job.samples_itself and stage == 0
    return sum(size > 1 for size in sizes) + group


# ---- the steps ----


def batch_bytes(job: PlannedRun, longest: int) -> float:
    """Ids and positions, rows, places and flags of every microbatch of an update's share, and the
    streams of all response tokens.
    """
    algorithm, responses = job.config.algorithm, job.samples * job.config.rollout.max_response_tokens
    pg, repeats = algorithm.policy_gradient, algorithm.minibatches * algorithm.epochs > 1
    credit = pg is not None and pg.credit is not None
    # engine's log-prob and advantage, taught; of the teacher log-prob and entropy; the student's
    # own before the step
    streams = 9 + (8 if credit else 0) + (4 if repeats or (credit_traits(algorithm).needs_old_logp) else 0)
    tokens = job.samples * longest / job.cp
    return tokens * 16 + min(responses, tokens) * 17 + responses * streams * algorithm.minibatches


def signal_bytes(job: PlannedRun, stage: int) -> float:
    """Rows of every response token of all minibatches' shares, which are taught before the first
    update, whole on each context-parallel rank; slot_R on every stage; the output weight that all
    of them share, where it is a copy.
    """
    algorithm, rollout = job.config.algorithm, job.config.rollout
    if not job.has_teacher:
        return 0.0
    tokens, parts = job.samples * rollout.max_response_tokens, algorithm.minibatches
    slots = 8.0 * tokens * parts
    if stage != job.pp - 1:
        return slots
    teacher = algorithm.teacher
    several = teacher.weights == "trust_region"
    hidden = job.teacher_model.hidden * (2 if several else 1)
    # Side by side; cast from fp32; of a live teacher that is updated before it is read for the last time.
    copied = (
        several
        or (teacher.weights in SHADOWED and job.word < 4)
        or (teacher.weights == "live" and parts * algorithm.epochs > 1)
    )
    slots += job.model.vocabulary(job.config.actor) * hidden * job.word * copied
    if algorithm.distill is None and not several:
        return slots
    if algorithm.distill is not None and teacher.transport == "record":
        return slots + parts * (tokens + 1) * (
            8 * min(algorithm.distill.top_k, int(job.model.hf["vocab_size"])) + 4
        )
    return slots + parts * (tokens + 1) * hidden * job.word


def training_memory(job: PlannedRun, stage: int) -> dict[str, float]:
    tokens = job.tokens(job.longest)
    positions = tokens if job.config.actor.packing else -(-job.longest // job.cp)
    return {
        "batch": batch_bytes(job, job.longest),
        "activations": activations.held(job, stage, tokens, positions),
        "backward": activations.backward(job, tokens),
        "loss": sum(loss(job).values()) if stage == job.pp - 1 else 0.0,
    }


def teacher_memory(job: PlannedRun, stage: int) -> dict[str, float]:
    teacher = job.config.algorithm.teacher
    cast = job.word < 4 and teacher.weights in SHADOWED
    causes = {
        "batch": batch_bytes(job, job.longest_teacher),
        "teacher cast": float(job.word * job.model.rank(job.config.actor, stage).total) if cast else 0.0,
        "activations": activations.forward_only(job, job.tokens(job.longest_teacher)),
    }
    reads = teacher.transport == "record" or job.config.algorithm.distill is None
    if reads and stage == job.pp - 1:
        tokens = response_tokens(job, job.longest_teacher)
        causes["loss"] = sum(workspace(job, tokens, teacher_logits=False, gradient=False).values())
    return causes


def response_tokens(job: PlannedRun, longest: int) -> int:
    """Response tokens of the largest microbatch on a context-parallel rank: the last one, which
    holds the middle of every sequence, may hold nothing else.
    """
    return min(job.rows(longest) * job.config.rollout.max_response_tokens, job.tokens(longest))


def loss(job: PlannedRun) -> dict[str, float]:
    """What the student's loss holds: hidden states of the microbatch's response tokens as they
    enter it, their gradient and the teacher's rows, and the chunk's workspace.
    """
    algorithm, tokens = job.config.algorithm, response_tokens(job, job.longest)
    term = algorithm.distill if job.has_teacher else None
    record = term is not None and algorithm.teacher.transport == "record"
    hidden = job.teacher_model.hidden * (
        2 if term is not None and algorithm.teacher.weights == "trust_region" else 1
    )
    teacher = 0 if term is None else 8 * term.top_k + 4 if record else job.word * hidden
    own = job.word * job.model.hidden
    # The last layer's output is cut over ranks by sequence parallelism, and put together for the loss.
    entering = tokens * own + (job.tokens(job.longest) * own if job.sp > 1 else 0)
    return {"entering": float(entering), "rows": float(tokens * (own + teacher))} | workspace(
        job, tokens, teacher_logits=term is not None and not record, gradient=True
    )


def workspace(job: PlannedRun, tokens: int, *, teacher_logits: bool, gradient: bool) -> dict[str, float]:
    """Of a chunk of tokens: logits, their gradient where it is narrower, the gradient of the hidden
    states in fp32, the readout.
    """
    columns, narrow = job.model.vocabulary(job.config.actor), not job.gpu.local_spec and job.word == 2
    words = 4 * (1 + teacher_logits) + (job.word if narrow else 0)
    chunk = max(1, (job.config.actor.loss_memory_mib << 20) // (columns * words))
    chunk = min(chunk if chunk < 128 else chunk // 128 * 128, tokens)
    return {
        "logits": float(chunk * columns * (words if gradient else words - (job.word if narrow else 0))),
        "hidden": float(chunk * job.model.hidden * 4 * (gradient and narrow)),
        "readout": (
            local_readout(job, chunk, columns)
            if job.gpu.local_spec
            else 4.0 * READOUT_ROWS * chunk * (kept_ids(job) + 1)
        ),
    }


def kept_ids(job: PlannedRun) -> int:
    """Tokens of a support."""
    term = job.config.algorithm.distill
    if term is None or term.support == "full":
        return 0
    return min(term.top_k, int(job.model.hf["vocab_size"])) * (2 if term.support == "union" else 1)


def local_readout(job: PlannedRun, chunk: int, columns: int) -> float:
    """The same on a CPU, whose passes walk in blocks (ops/kernels_torch.py), and whose products of
    bfloat16 are made in fp32 (ops/fused_linear_loss.py): the largest of three moments.
    """
    term, k = job.config.algorithm.distill, kept_ids(job)
    full = term is not None and term.support == "full"
    count, elements = (9, 1 << 17) if full else (2, 1 << 19)
    rows = min(max(1, elements // columns), 512, chunk)
    select = rows * (k * 118 + 8 * columns // max(1, columns // (8 * k))) if k else 0
    walking = 4 * count * rows * columns + select + 4 * 3.7 * chunk * (k + 1)
    wide = min(columns, 8192) if job.word == 2 else 0
    return max(
        4.0 * READOUT_ROWS * chunk * (k + 1),
        walking,
        4.0 * wide * (chunk + job.model.hidden) + 4 * chunk * job.model.hidden,
    )


def engine_fits(job: PlannedRun) -> bool:
    """Whether the run's engines hold a sample, and those on GPUs of their own have room there."""
    if not job.samples_itself:
        return True
    return cache_holds_a_sample(job) and (
        job.colocated or sum(engine(job).values()) <= job.gpu.memory * (1 - RESERVE)
    )
