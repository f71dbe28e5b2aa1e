"""Megatron's layer specs for a model family.

On a GPU the modules are TransformerEngine's. On a CPU they are Megatron's local ones and those of
cpu_layers.py. Each layer has a spec of its own, because rotary tables and attention factors differ
between the layers of some families. megatron-core 0.16.1.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megasd.actor.cpu_layers import RMSNorm, SDPAttention
from megasd.actor.layers import AllHeadsRMSNorm, TableAttention, post_norm
from megasd.models.param_table import Family


def block_spec(
    family: Family, config: TransformerConfig, gpu: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its virtual stage `vp_stage`, and the final norm."""
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(family, config, gpu, index) for index in layers],
        layer_norm=_te()["norm"] if gpu else RMSNorm,
    )


def _te() -> dict[str, type]:
    """TransformerEngine's modules, imported here since only a GPU machine has them."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return {"norm": TENorm, "column": TEColumnParallelLinear, "row": TERowParallelLinear}


def layer_spec(family: Family, config: TransformerConfig, gpu: bool, index: int) -> ModuleSpec:
    """The spec of one layer; index: its number in the whole model."""
    if gpu:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if not gpu:
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        attention.core_attention = SDPAttention
    if family.post_norm:
        modules = (
            _te() if gpu else {"norm": RMSNorm, "column": ColumnParallelLinear, "row": RowParallelLinear}
        )
        mlp = layer.mlp.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        # TransformerEngine's usual modules begin with a norm; these do not.
        attention.linear_qkv = mlp.linear_fc1 = modules["column"]
        attention.linear_proj = mlp.linear_fc2 = post_norm(modules["row"], modules["norm"])
        attention.q_layernorm = ModuleSpec(AllHeadsRMSNorm, params={"num_heads": config.num_attention_heads})
        attention.k_layernorm = ModuleSpec(AllHeadsRMSNorm, params={"num_heads": config.num_query_groups})
    table = family.layer_ropes[index] if family.layer_ropes else 0
    factor = family.ropes[table].attention_factor
    if len(family.ropes) > 1 or factor != 1.0:
        layer.self_attention.module = TableAttention
        layer.self_attention.params |= {"table": table, "attention_factor": factor}
    return spec
