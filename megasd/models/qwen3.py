"""Qwen3 and Qwen3-MoE: Llama-like layers with a norm on each query and key head.

All layers are dense (Qwen3), or all layers have experts (Qwen3-MoE).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense, tp_layouts
from megasd.models.param_table import Family, ParamRule, key, mlp_rules, refuse
from megasd.models.rope import rope

MODEL_TYPES = ("qwen3", "qwen3_moe")


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that would become a different model here; names the key."""
    dense.check(hf)
    dense.check_full_attention(hf)
    # mandatory: the default of Qwen3 is not hidden_size / num_attention_heads
    key(hf, "head_dim")
    if is_moe(hf):
        if not hf.get("norm_topk_prob", False):
            refuse(hf, "norm_topk_prob", "the router normalises the chosen experts' weights")
        if hf.get("mlp_only_layers"):
            refuse(hf, "mlp_only_layers", "every layer must have experts")
        if hf.get("decoder_sparse_step", 1) != 1:
            refuse(hf, "decoder_sparse_step", "every layer must have experts")


def is_moe(hf: Mapping[str, Any]) -> bool:
    """Whether every layer is a mixture of experts."""
    return hf.get("model_type") == "qwen3_moe"


def num_experts(hf: Mapping[str, Any]) -> int:
    """Experts a layer; 0 for a dense model."""
    if not is_moe(hf):
        return 0
    # the name on the hub, and the name that transformers 5 writes
    return int(key(hf, "num_experts", "num_local_experts"))


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported."""
    check(hf)
    experts: dict[str, Any] = {}
    if is_moe(hf):
        experts = {
            "num_moe_experts": num_experts(hf),
            "moe_ffn_hidden_size": key(hf, "moe_intermediate_size"),
            "moe_router_topk": key(hf, "num_experts_per_tok"),
            # a softmax over the chosen experts alone is norm_topk_prob
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": False,
        }
    return dense.family(hf, (rope(hf, dense.head_dim(hf)),), qk_layernorm=True, **experts)


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`.

    In the names of experts, `{}` stands for the global number of the expert.
    """
    hidden = key(hf, "hidden_size")
    attention = [
        *dense.norm_rules(hf),
        *dense.attention_rules(hf),
        ParamRule(
            "self_attention.q_layernorm.weight",
            {"self_attn.q_norm.weight": (dense.head_dim(hf),)},
            tp_layouts.replicated,
        ),
        ParamRule(
            "self_attention.k_layernorm.weight",
            {"self_attn.k_norm.weight": (dense.head_dim(hf),)},
            tp_layouts.replicated,
        ),
    ]
    if not is_moe(hf):
        return attention + mlp_rules("mlp.", "mlp.", hidden, key(hf, "intermediate_size"))
    router = ParamRule(
        "mlp.router.weight", {"mlp.gate.weight": (num_experts(hf), hidden)}, tp_layouts.replicated
    )
    experts = mlp_rules(
        "mlp.experts.local_experts.{}.",
        "mlp.experts.{}.",
        hidden,
        key(hf, "moe_intermediate_size"),
        expert=True,
    )
    return [*attention, router, *experts]
