"""Bytes that a rollout engine takes on each of its GPUs, and the tokens that its cache holds."""

from __future__ import annotations

from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import PlannedRun

# SGLang beside weights and cache: context, CUDA graphs, activations of a prefill chunk, logits. An
# assumption, below the 10 GiB that SGLang 0.5.23 itself sets aside on GPUs of more than 60 GiB
# (srt/arg_groups/memory_hook.py).
ENGINE_OVERHEAD = 5 * GIB


def engine(job: PlannedRun) -> dict[str, float]:
    """One of an engine's GPUs."""
    return {
        "engine weights": engine_weights(job),
        "KV cache": kv_bytes(job),
        "engine overhead": float(ENGINE_OVERHEAD),
    }


def engine_weights(job: PlannedRun) -> float:
    """Cut over the engine's ranks, norms aside. An engine of its own model (fp8) holds a byte a
    weight, but two in embedding and head.
    """
    engine, model = job.config.rollout.engine, job.model
    if engine.model_path:
        nbytes = model.weights + model.vocabulary_weights
    else:
        nbytes = {"auto": job.word, "float32": 4, "bfloat16": 2}[engine.dtype] * model.weights
    return nbytes / engine.tensor_parallel_size


def kv_token_bytes(job: PlannedRun) -> float:
    """Bytes that a token takes in the cache of one GPU of an engine; fewer key heads than ranks are
    held several times.
    """
    engine, model = job.config.rollout.engine, job.model
    word = {"auto": job.word, "float32": 4, "bfloat16": 2}[engine.dtype]
    return 2.0 * model.layers * max(1.0, model.groups / engine.tensor_parallel_size) * model.head_dim * word


def kv_tokens(job: PlannedRun) -> int:
    """Tokens that an engine's cache holds: rollout.engine.max_total_tokens, or what
    mem_fraction_static leaves.
    """
    engine = job.config.rollout.engine
    if engine.mem_fraction_static is None:
        return engine.max_total_tokens
    room = engine.mem_fraction_static * job.gpu.memory - engine_weights(job)
    return min(engine.max_total_tokens, max(0, int(room / kv_token_bytes(job))))


def kv_bytes(job: PlannedRun) -> float:
    return kv_tokens(job) * kv_token_bytes(job)


def cache_holds_a_sample(job: PlannedRun) -> bool:
    return kv_tokens(job) >= job.config.rollout.max_prompt_tokens + job.config.rollout.max_response_tokens
