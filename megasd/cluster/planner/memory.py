"""Bytes of a rank by cause, in each phase of a step, on the pipeline stage that needs most.

    weights       Parameters in the model's dtype. A distributed optimizer keeps them in its own
                  buffer, not twice.
    gradients     4 bytes a weight: Megatron's buffers with grad_reduce_in_fp32.
    optimizer     bf16: 4 + 8 bytes a weight (main copy, Adam's two moments). fp32: 8 bytes. The
                  distributed optimizer divides them by DP x CP (Rajbhandari et al. 1910.02054;
                  Megatron's own table: 18, or 6 + 12 / d, bytes a weight).
    teacher       The teacher's own weights: an fp32 copy of the rank's weights, not cut over DP
                  (actor/teacher.py), or the separate model in the actor's dtype.
    teacher cast  During the teacher's forward: the teacher's weights once more in the model's
                  dtype, unless that is fp32. The copy of the output layer stays.
    signal        What is kept from the teacher's forward until the student's
                  (actor/teacher_signal.py). On the last stage: for every response token of the
                  rank's samples in all minibatches a hidden state, or 8 K + 4 bytes; and once the
                  teacher's output weight, if that is not a tensor of its own already.
    activations   activations.py
    backward      Gradients of activations.
    loss          The chunk's logits within actor.loss_memory_mib, and tensors as long as the
                  microbatch (ops/fused_linear_loss.py).
    batch         The microbatches of an update, which all go to the GPU at once, and the per-token
                  streams of all minibatches.
    sync          Rank 0: two buckets, and what other ranks send for two buckets. An engine's
                  receive buffer, if sync.transport=group and the engine shares the GPU.
    engine        SGLang's weights, KV cache (2 x layers x key heads x d words a token) and
                  overhead (engine_memory.py).
    NCCL, context, fragmentation    The constants below.

Three phases: training, the teacher's forward, and sampling (if engines share the GPU). With
rollout.engine.release_memory the engine's weights and cache are there only while it samples. Every
sequence is taken to be as long as the config allows. labels.py has the words that users see.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner import activations
from megasd.cluster.planner.engine_memory import cache_holds_a_sample, engine
from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import TEACHERS_WITH_FP32_COPY, PlannedRun
from megasd.config.schema import TeacherConfig
from megasd.config.variants import credit_traits

# Bytes of one communicator: NCCL_BUFFSIZE's default of 4 MiB (NCCL user guide, environment
# variables), two directions, 24 channels. An estimate.
NCCL_BYTES = 2 * 24 * 4 * 2**20
# Bytes of a process's CUDA context, of cuBLAS and cuDNN workspaces and of loaded kernels. An
# assumption.
CONTEXT = 1.5 * GIB
# Bytes that a released engine keeps: CUDA context and CUDA graphs. An assumption.
ENGINE_RESIDUE = 2 * GIB
# Part of the actor's bytes that is lost: free blocks of torch's allocator that fit no tensor. An
# assumption.
FRAGMENTATION = 0.05
# Part of the GPU's memory that a plan leaves free.
RESERVE = 0.02
# Tensors [chunk, K + 1] of 4 bytes that are alive at once while vocab-parallel log-probs and the
# gradient of the loss are computed. Measured on the CPU.
LOGPROB_TENSORS = 13


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the rank that needs most: the first rank of pipeline stage `stage`.

    phases: phase -> cause -> bytes. limit: bytes of the GPU that may be used.
    """

    stage: int
    phases: dict[str, dict[str, int]]
    limit: int

    def total(self, phase: str) -> int:
        """Bytes of a phase, all causes together."""
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return self.total(self.worst)

    @property
    def fits(self) -> bool:
        """Whether the rank stays within the GPU's memory in every phase."""
        return self.peak <= self.limit


def estimate_memory(job: PlannedRun) -> MemoryEstimate:
    """The memory of the pipeline stage that needs most."""
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
    if job.active_teacher is not None:
        phases["teacher"] = fixed | signal | teacher_memory(job, stage, job.active_teacher)
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
    # On a CPU there is no such thing as these four.
    if job.gpu.local_spec:
        for causes in phases.values():
            for name in ("fragmentation", "NCCL", "context", "engine overhead"):
                causes.pop(name, None)
    return {
        phase: {name: int(value) for name, value in causes.items() if value}
        for phase, causes in phases.items()
    }


def shares_gpu(job: PlannedRun, stage: int) -> bool:
    """Whether an engine shares a GPU with the pipeline stage.

    Engines take the GPUs of the first node in order. Stages take all GPUs in order, equally many
    each.
    """
    taken = min(
        job.config.cluster.gpus_per_node, job.engines * job.config.rollout.engine.tensor_parallel_size
    )
    return job.colocated and stage * (job.gpus // job.pp) < taken


# ---- what is always there ----


def static(job: PlannedRun, stage: int) -> dict[str, float]:
    """Bytes by cause that the actor holds between steps, on one rank of the stage."""
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
    """Bytes of TransformerEngine's FP8 copies of the linear layers' weights.

    Each weight is kept as it is and transposed, one byte each, since Hopper multiplies FP8 in one
    layout only. With fp8_param_gather the FP8 weights replace the bf16 weights, and nothing comes
    on top.
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
    """Bytes of the teacher's own weights on one rank of the stage; 0 if it uses the student's."""
    teacher, actor = job.config.algorithm.teacher, job.config.actor
    if teacher is None:
        return 0.0
    if teacher.weights == "separate":
        return float(job.word * job.teacher_model.rank(actor, stage).total)
    return 4.0 * job.model.rank(actor, stage).total if teacher.weights in TEACHERS_WITH_FP32_COPY else 0.0


def sync_bytes(job: PlannedRun, stage: int) -> float:
    """Bytes that a weight push holds on rank 0, the first rank of the first stage.

    Rank 0 holds two buckets. For each sender it holds two receive buffers, each as long as the
    longest message that the sender puts there (weights/gather.py). Other ranks hold two messages
    of their own, which is less and is counted as 0.
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
    # colocated: engines on the same GPUs map the actor's buffer. group: they receive into a buffer
    # of their own.
    return 2 * largest + received + (largest if job.colocated and job.config.sync.transport == "group" else 0)


def communicators(job: PlannedRun, stage: int) -> int:
    """Number of process groups of more than one rank that carry GPU tensors, with the world's."""
    tied = job.model.table.tied and job.pp > 1
    sizes = (job.gpus, job.tp, job.pp, job.cp, job.dp, job.dp * job.cp, job.ep, 2 if tied else 1)
    group = job.config.sync.transport == "group" and job.samples_itself and stage == 0
    return sum(size > 1 for size in sizes) + group


# ---- the steps ----


def batch_bytes(job: PlannedRun, longest: int) -> float:
    """Bytes of a rank's batch, with sequences of `longest` tokens.

    Per token: id and position. Per response token: row, place and flag in its microbatch, and the
    streams of all minibatches.
    """
    algorithm, responses = job.config.algorithm, job.samples * job.config.rollout.max_response_tokens
    repeats = algorithm.minibatches * algorithm.epochs > 1
    # The engine's log-prob, the advantage, and a flag for distilled tokens (9); log-prob and
    # entropy of the teacher (8); the student's log-prob before the step (4).
    streams = (
        9 + (8 if job.has_credit else 0) + (4 if repeats or credit_traits(algorithm).needs_old_logp else 0)
    )
    tokens = job.samples * longest / job.cp
    return tokens * 16 + min(responses, tokens) * 17 + responses * streams * algorithm.minibatches


def signal_bytes(job: PlannedRun, stage: int) -> float:
    """Bytes kept from the teacher's forward until the student's, on one rank of the stage.

    The teacher's forward runs over all minibatches before the first update. Every stage keeps
    slot_R. The last stage keeps a row for every response token, whole on each context-parallel
    rank, and once the output weight, if it is a copy.
    """
    algorithm, rollout, teacher = job.config.algorithm, job.config.rollout, job.active_teacher
    if teacher is None:
        return 0.0
    tokens, parts = job.samples * rollout.max_response_tokens, algorithm.minibatches
    slots = 8.0 * tokens * parts
    if stage != job.pp - 1:
        return slots
    several = teacher.weights == "trust_region"
    hidden = job.teacher_model.hidden * (2 if several else 1)
    # The output weight is a copy if two of them lie side by side, if it is cast from fp32, or if a
    # live teacher is updated before it is read for the last time.
    copied = (
        several
        or (teacher.weights in TEACHERS_WITH_FP32_COPY and job.word < 4)
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
    """Bytes by cause that the student's forward and backward add to what is always there."""
    tokens = job.tokens(job.longest)
    positions = tokens if job.config.actor.packing else -(-job.longest // job.cp)
    return {
        "batch": batch_bytes(job, job.longest),
        "activations": activations.held(job, stage, tokens, positions),
        "backward": activations.backward(job, tokens),
        "loss": sum(loss(job).values()) if stage == job.pp - 1 else 0.0,
    }


def teacher_memory(job: PlannedRun, stage: int, teacher: TeacherConfig) -> dict[str, float]:
    """Bytes by cause that the teacher's forward adds to what is always there."""
    cast = job.word < 4 and teacher.weights in TEACHERS_WITH_FP32_COPY
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
    """Response tokens of the largest microbatch on a context-parallel rank.

    The last context-parallel rank holds the middle of every sequence, which may be nothing but
    response tokens.
    """
    return min(job.rows(longest) * job.config.rollout.max_response_tokens, job.tokens(longest))


def loss(job: PlannedRun) -> dict[str, float]:
    """Bytes by cause that the student's loss holds.

    entering: hidden states of the microbatch's response tokens. rows: their gradient and the
    teacher's rows. The rest is the workspace of one chunk.
    """
    tokens, own = response_tokens(job, job.longest), job.word * job.model.hidden
    teacher, term = job.active_teacher, job.config.algorithm.distill
    row, teacher_logits = 0, False
    if teacher is not None and term is not None:
        teacher_logits = teacher.transport != "record"
        hidden = job.teacher_model.hidden * (2 if teacher.weights == "trust_region" else 1)
        row = job.word * hidden if teacher_logits else 8 * term.top_k + 4
    # Sequence parallelism cuts the last layer's output over ranks; the loss puts it together.
    entering = tokens * own + (job.tokens(job.longest) * own if job.sp > 1 else 0)
    return {"entering": float(entering), "rows": float(tokens * (own + row))} | workspace(
        job, tokens, teacher_logits=teacher_logits, gradient=True
    )


def workspace(job: PlannedRun, tokens: int, *, teacher_logits: bool, gradient: bool) -> dict[str, float]:
    """Bytes by cause of one chunk of the loss, at most `tokens` tokens.

    logits: the student's, with teacher_logits the teacher's too, and their gradient where it has a
    narrower dtype. hidden: the fp32 gradient of the hidden states. logprobs: what computing the
    vocab-parallel log-probs takes.
    """
    columns, narrow = job.model.vocabulary(job.config.actor), not job.gpu.local_spec and job.word == 2
    words = 4 * (1 + teacher_logits) + (job.word if narrow else 0)
    chunk = max(1, (job.config.actor.loss_memory_mib << 20) // (columns * words))
    chunk = min(chunk if chunk < 128 else chunk // 128 * 128, tokens)
    return {
        "logits": float(chunk * columns * (words if gradient else words - (job.word if narrow else 0))),
        "hidden": float(chunk * job.model.hidden * 4 * (gradient and narrow)),
        "logprobs": (
            cpu_logprobs(job, chunk, columns)
            if job.gpu.local_spec
            else 4.0 * LOGPROB_TENSORS * chunk * (kept_ids(job) + 1)
        ),
    }


def kept_ids(job: PlannedRun) -> int:
    """Vocabulary entries per token that the divergence reads; 0 for support=full."""
    term = job.config.algorithm.distill
    if term is None or term.support == "full":
        return 0
    return min(term.top_k, int(job.model.hf["vocab_size"])) * (2 if term.support == "union" else 1)


def cpu_logprobs(job: PlannedRun, chunk: int, columns: int) -> float:
    """Bytes that computing vocab-parallel log-probs takes on a CPU: the largest of three moments.

    The CPU's kernels walk over blocks of rows (ops/kernels_torch.py) and multiply bfloat16 matrices
    in fp32 (ops/fused_linear_loss.py).
    """
    term, k = job.config.algorithm.distill, kept_ids(job)
    full = term is not None and term.support == "full"
    count, elements = (9, 1 << 17) if full else (2, 1 << 19)
    rows = min(max(1, elements // columns), 512, chunk)
    select = rows * (k * 118 + 8 * columns // max(1, columns // (8 * k))) if k else 0
    walk = 4 * count * rows * columns + select + 4 * 3.7 * chunk * (k + 1)
    wide = min(columns, 8192) if job.word == 2 else 0
    return max(
        4.0 * LOGPROB_TENSORS * chunk * (k + 1),
        walk,
        4.0 * wide * (chunk + job.model.hidden) + 4 * chunk * job.model.hidden,
    )


def engine_fits(job: PlannedRun) -> bool:
    """Whether an engine's cache holds a sample, and whether engines fit on GPUs of their own."""
    if not job.samples_itself:
        return True
    return cache_holds_a_sample(job) and (
        job.colocated or sum(engine(job).values()) <= job.gpu.memory * (1 - RESERVE)
    )
