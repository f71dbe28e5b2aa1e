"""Check the actor's keys for speed and precision together.

The checks cover the keys among themselves, with TransformerEngine, and with the model. Stdlib only.

Sources: transformer_config.py, distributed_data_parallel.py and fp8_utils.py of megatron-core
0.16.1; TransformerEngine 2.9's assert_dim_for_fp8_exec (rows in 8, columns in 16; the backward's
transposes in 16) and Float8BlockQuantizer.is_quantizable (128).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from megasd.config.schema import ActorConfig, Config, ConfigError

# Every dimension of an FP8 matrix product must be a multiple of this.
FP8_ALIGNMENT = 16
# The block size of the FP8 recipe "blockwise". Sequence-parallel ranks must gather whole blocks.
BLOCK = 128
# The modules of Megatron that can be recomputed here. The models have no latent attention, no
# grouped GEMM and no shared experts, and their norms are fused into the linear layers. (Without
# TransformerEngine the norms are not fused, and Megatron 0.16.1 fails with a NameError.)
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe")


def has_fixed_shape(actor: ActorConfig) -> bool:
    """Whether every microbatch must have the same number of rows and tokens.

    CUDA graphs are replayed with a fixed shape, and userbuffers are allocated for a fixed shape.
    """
    return actor.cuda_graph or actor.tp_comm_overlap


def sequence_multiple(config: Config) -> int:
    """The number of tokens to whose multiples sequences are padded.

    Each context-parallel rank holds two chunks, and each sequence-parallel rank an equal part of
    them. In FP8, a part has a multiple of 16 tokens (of 128 if block-scaled parts are gathered).
    If shapes are fixed, the result is the longest sequence, rounded up.
    """
    actor, share = config.actor, 1
    if actor.fp8 is not None:
        share = BLOCK if actor.fp8_recipe == "blockwise" and actor.sequence_parallel else FP8_ALIGNMENT
    chunks = 2 if actor.context_parallel_size > 1 else 1
    ranks = actor.context_parallel_size * (actor.tensor_model_parallel_size if actor.sequence_parallel else 1)
    multiple = ranks * math.lcm(chunks, share)
    if not has_fixed_shape(actor):
        return multiple
    return (
        math.ceil((config.rollout.max_prompt_tokens + config.rollout.max_response_tokens) / multiple)
        * multiple
    )


def check_machine(actor: ActorConfig) -> None:
    """Raise ConfigError for keys that do not fit this machine's TransformerEngine.

    If TransformerEngine is not installed, keys that need it are refused. If it is installed, keys
    that it cannot handle are refused.
    """
    if find_spec("transformer_engine") is not None:
        if actor.packing and actor.dtype == "float32":
            raise ConfigError(
                "actor.packing: TransformerEngine's attention takes packed sequences in bfloat16 alone; set"
                " actor.dtype"
            )
        return
    wants = {
        "actor.fp8": (actor.fp8, None, "null"),
        "actor.tp_comm_overlap": (actor.tp_comm_overlap, False, "false"),
        "actor.apply_rope_fusion": (actor.apply_rope_fusion, False, "false"),
        "actor.cuda_graph": (actor.cuda_graph, False, "false"),
        "actor.attention_backend": (actor.attention_backend, "auto", "auto"),
    }
    for key, (value, off, text) in wants.items():
        if value != off:
            shown, where = (
                (value, "a Hopper GPU") if key == "actor.fp8" else (str(value).lower(), "a GPU machine")
            )
            raise ConfigError(
                f"{key}={shown}: TransformerEngine is not installed on this machine; set {key}={text} or"
                f" install megasd[te] on {where}"
            )


def check_actor(config: Config) -> None:
    """Raise ConfigError for values that Megatron or TransformerEngine would refuse or misread.

    The check reads no file.
    """
    actor = config.actor
    _check_fp8(actor)
    _check_overlap(actor)
    _check_recompute(actor)
    _check_fixed_shape(config)


def _check_fp8(actor: ActorConfig) -> None:
    if actor.fp8 is None:
        if actor.fp8_param_gather:
            raise ConfigError("actor.fp8_param_gather: needs actor.fp8; set that to hybrid, or this to false")
        return
    if actor.dtype == "float32":
        raise ConfigError(
            "actor.dtype=float32: FP8 layers compute next to bfloat16; set actor.dtype=bfloat16, or"
            " actor.fp8=null"
        )
    if actor.fp8_recipe == "delayed" and actor.first_last_layers_bf16:
        raise ConfigError(
            "actor.fp8_recipe=delayed: Megatron cannot leave layers in bf16 under it; set"
            " actor.first_last_layers_bf16=false, or actor.fp8_recipe=tensorwise"
        )
    if actor.fp8_param_gather and not actor.use_distributed_optimizer:
        raise ConfigError(
            "actor.fp8_param_gather: needs actor.use_distributed_optimizer; set that to true, or this to"
            " false"
        )


def _check_overlap(actor: ActorConfig) -> None:
    if actor.overlap_param_gather:
        for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(actor, needed):
                raise ConfigError(
                    f"actor.overlap_param_gather: needs actor.{needed}; set that to true, or this to false"
                )
    if actor.tp_comm_overlap:
        if actor.tensor_model_parallel_size == 1:
            raise ConfigError(
                "actor.tp_comm_overlap: needs actor.tensor_model_parallel_size > 1; set it to false"
            )
        if not actor.sequence_parallel:
            raise ConfigError(
                "actor.tp_comm_overlap: needs actor.sequence_parallel; set that to true, or this to false"
            )


def _check_recompute(actor: ActorConfig) -> None:
    if actor.recompute_granularity != "full" and (actor.recompute_method, actor.recompute_num_layers) != (
        "uniform",
        1,
    ):
        key = "recompute_method" if actor.recompute_method != "uniform" else "recompute_num_layers"
        raise ConfigError(
            f"actor.{key}={getattr(actor, key)}: read with actor.recompute_granularity=full alone; set that,"
            " or leave it out"
        )
    if actor.recompute_granularity != "selective":
        return
    if not actor.recompute_modules:
        raise ConfigError(
            "actor.recompute_modules: names nothing to compute again; give core_attn, or set"
            " actor.recompute_granularity=null"
        )
    for name in actor.recompute_modules:
        if name not in RECOMPUTE_MODULES:
            raise ConfigError(
                f"actor.recompute_modules: no {name!r} in these models; choose from"
                f" {', '.join(RECOMPUTE_MODULES)}"
            )


def _check_fixed_shape(config: Config) -> None:
    actor = config.actor
    if not has_fixed_shape(actor):
        return
    key = "actor.cuda_graph" if actor.cuda_graph else "actor.tp_comm_overlap"
    if actor.packing:
        raise ConfigError(
            f"{key}: needs microbatches of one shape, and packed ones differ; set actor.packing=false"
        )
    if actor.max_tokens_per_microbatch is not None:
        raise ConfigError(f"{key}: needs microbatches of one shape; set actor.max_tokens_per_microbatch=null")
    if not actor.cuda_graph:
        return
    if actor.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "actor.cuda_graph: a pipeline stage records one graph a microbatch, and their number changes; set"
            " actor.pipeline_model_parallel_size=1, or actor.cuda_graph=false"
        )
    if actor.recompute_granularity == "full":
        raise ConfigError(
            "actor.cuda_graph: Megatron graphs no layers that are recomputed whole; set"
            " actor.recompute_granularity=null"
        )
    if actor.fp8 is not None:
        raise ConfigError(
            "actor.cuda_graph: the graphs keep FP8 copies of weights that forward passes between the steps"
            " write again; set actor.fp8=null, or actor.cuda_graph=false"
        )


def check_sizes(config: Config, model: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose layers or matrices do not fit the actor's keys.

    `model`: the model's config.json. `where`: a name of the model for the error message.
    """
    actor, is_moe = config.actor, bool(model.get("num_experts"))
    stage = model["num_hidden_layers"] // actor.pipeline_model_parallel_size
    if actor.recompute_granularity == "full":
        count, uniform = actor.recompute_num_layers, actor.recompute_method == "uniform"
        if count > stage or (uniform and stage % count):
            wanted = f"a divisor of the {stage}" if uniform else f"at most the {stage}"
            raise ConfigError(
                f"actor.recompute_num_layers={count}: must be {wanted} layers of a pipeline stage of {where} "
                f"(actor.recompute_method={actor.recompute_method}); choose another"
            )
    if actor.recompute_granularity == "selective":
        absent = "mlp" if is_moe else "moe"
        if absent in actor.recompute_modules:
            kind = "is a mixture of experts" if is_moe else "has no experts"
            raise ConfigError(
                f"actor.recompute_modules: {where} {kind}; give {'moe' if is_moe else 'mlp'} instead of"
                f" {absent}, or leave it out"
            )
    if actor.cuda_graph and is_moe:
        raise ConfigError(
            f"actor.cuda_graph: the experts of {where} get another number of tokens each time; set it to"
            " false"
        )
    if actor.fp8 is not None:
        _check_bf16_layers(actor, model["num_hidden_layers"], stage, where)
        _check_alignment(actor, model, where)


def _check_bf16_layers(actor: ActorConfig, layers: int, stage: int, where: str) -> None:
    if not actor.first_last_layers_bf16:
        return
    start, end = actor.num_layers_at_start_in_bf16, actor.num_layers_at_end_in_bf16
    for key, count in (("num_layers_at_start_in_bf16", start), ("num_layers_at_end_in_bf16", end)):
        if count > stage:
            raise ConfigError(
                f"actor.{key}={count}: a pipeline stage of {where} has {stage} layers; give at most that"
            )
    if start + end >= layers:
        raise ConfigError(
            f"actor.num_layers_at_start_in_bf16={start}: with num_layers_at_end_in_bf16={end} no layer of the"
            f" {layers} of {where} is left for FP8; lower one, or set actor.fp8=null"
        )


def _check_alignment(actor: ActorConfig, model: Mapping[str, Any], where: str) -> None:
    """Check that both sides of every FP8 matrix on each rank are aligned."""
    tensor, hidden, heads = (
        actor.tensor_model_parallel_size,
        model.get("hidden_size"),
        model["num_attention_heads"],
    )
    if type(hidden) is not int or hidden < 1:
        raise ConfigError(f"{where}: hidden_size must be a positive integer, not {hidden!r}")
    width = model.get("head_dim") or hidden // heads
    groups = model.get("num_key_value_heads") or heads
    ffn, shards = model.get("intermediate_size"), tensor
    if model.get("num_experts"):
        ffn, shards = model["moe_intermediate_size"], 1 if actor.expert_model_parallel_size > 1 else tensor
    in_blocks = actor.fp8_recipe == "blockwise" and actor.sequence_parallel
    sides = {
        "hidden_size": (hidden, BLOCK if in_blocks else FP8_ALIGNMENT, 1),
        "attention output (heads x head_dim)": (heads * width, FP8_ALIGNMENT, tensor),
        "query, key and value rows": ((heads + 2 * groups) * width, FP8_ALIGNMENT, tensor),
        "intermediate_size": (ffn, FP8_ALIGNMENT, shards),
    }
    for name, (size, multiple, ranks) in sides.items():
        if size // ranks % multiple:
            share = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
            fix = (
                "choose another actor.tensor_model_parallel_size, or set actor.fp8=null"
                if ranks > 1
                else "set actor.fp8=null"
            )
            raise ConfigError(
                f"actor.fp8={actor.fp8}: {name} of {where} is {size // ranks}{share}, no multiple of"
                f" {multiple}; {fix}"
            )
