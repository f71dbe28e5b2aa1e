"""Bytes that a rollout engine takes on each of its GPUs, and the tokens that its KV cache holds."""

from __future__ import annotations

from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import PlannedRun

# Bytes of SGLang next to weights and cache: CUDA context, CUDA graphs, activations of a prefill
# chunk, logits. An assumption, below the 10 GiB that SGLang 0.5.23 itself sets aside on GPUs of
# more than 60 GiB (srt/arg_groups/memory_hook.py).
ENGINE_OVERHEAD = 5 * GIB


def engine(job: PlannedRun) -> dict[str, float]:
    """Bytes by cause on one of an engine's GPUs."""
    return {
        "engine weights": engine_weights(job),
        "KV cache": kv_bytes(job),
        "engine overhead": float(ENGINE_OVERHEAD),
    }


def engine_weights(job: PlannedRun) -> float:
    """Bytes of the engine's weights on one of its GPUs.

    SGLang cuts the weights over the engine's ranks (norms, which it does not cut, are negligible).
    An engine with a model of its own (rollout.engine.model_path) holds FP8 weights, one byte each,
    and two bytes in embedding and output layer.
    """
    engine, model = job.config.rollout.engine, job.model
    if engine.model_path:
        nbytes = model.weights + model.vocabulary_weights
    else:
        nbytes = {"auto": job.word, "float32": 4, "bfloat16": 2}[engine.dtype] * model.weights
    return nbytes / engine.tensor_parallel_size


def kv_token_bytes(job: PlannedRun) -> float:
    """Bytes that a token takes in the KV cache of one of an engine's GPUs.

    If a model has fewer key heads than the engine has ranks, several ranks hold the same head.
    """
    engine, model = job.config.rollout.engine, job.model
    word = {"auto": job.word, "float32": 4, "bfloat16": 2}[engine.dtype]
    return 2.0 * model.layers * max(1.0, model.groups / engine.tensor_parallel_size) * model.head_dim * word


def kv_tokens(job: PlannedRun) -> int:
    """Tokens that an engine's KV cache holds.

    That is rollout.engine.max_total_tokens, or fewer, if mem_fraction_static leaves less room.
    """
    engine = job.config.rollout.engine
    if engine.mem_fraction_static is None:
        return engine.max_total_tokens
    room = engine.mem_fraction_static * job.gpu.memory - engine_weights(job)
    return min(engine.max_total_tokens, max(0, int(room / kv_token_bytes(job))))


def kv_bytes(job: PlannedRun) -> float:
    """Bytes of the KV cache on one of an engine's GPUs."""
    return kv_tokens(job) * kv_token_bytes(job)


def cache_holds_a_sample(job: PlannedRun) -> bool:
    """Whether an engine's KV cache holds the longest prompt with the longest response."""
    return kv_tokens(job) >= job.config.rollout.max_prompt_tokens + job.config.rollout.max_response_tokens
