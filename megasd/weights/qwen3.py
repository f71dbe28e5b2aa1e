"""Qwen3 and Qwen3-MoE: what config.json may say, Megatron's arguments for it, and the rules of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F

from megasd.weights import mapping
from megasd.weights.table import Family, Rule, key, mlp_rules, refuse

MODEL_TYPES = ("qwen3", "qwen3_moe")


def _rotary_base(hf: Mapping[str, Any]) -> float:
    # transformers 5 nests rope_theta; reading only the top level would silently leave Megatron's 10000.
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        refuse(hf, "rope_parameters", "only rope_type default")
    if hf.get("rope_scaling"):
        refuse(hf, "rope_scaling", "remove it, the model then has its native context length")
    if "rope_theta" in rope:
        return float(rope["rope_theta"])
    return float(key(hf, "rope_theta"))


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key of config.json, for whatever these tables would turn into a silently different model."""
    if hf.get("attention_bias"):
        refuse(hf, "attention_bias", "Qwen3 attention has no bias")
    if hf.get("use_sliding_window"):
        refuse(hf, "use_sliding_window", "only full attention")
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        refuse(hf, "layer_types", "only full attention")
    if hf.get("hidden_act", "silu") != "silu":
        refuse(hf, "hidden_act", "only silu")
    if is_moe(hf):
        if not hf.get("norm_topk_prob", False):
            refuse(hf, "norm_topk_prob", "the router normalises the chosen experts' weights")
        if hf.get("mlp_only_layers"):
            refuse(hf, "mlp_only_layers", "every layer must have experts")
        if hf.get("decoder_sparse_step", 1) != 1:
            refuse(hf, "decoder_sparse_step", "every layer must have experts")


def is_moe(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "qwen3_moe"


def num_experts(hf: Mapping[str, Any]) -> int:
    """0 for a dense model."""
    if not is_moe(hf):
        return 0
    return int(key(hf, "num_experts", "num_local_experts"))  # the hub's name; the one that transformers 5 writes


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json (a dict). UserError names the key that is missing or not supported."""
    check(hf)
    transformer: dict[str, Any] = {
        "num_layers": key(hf, "num_hidden_layers"),
        "hidden_size": key(hf, "hidden_size"),
        "ffn_hidden_size": key(hf, "intermediate_size"),
        "num_attention_heads": key(hf, "num_attention_heads"),
        "num_query_groups": key(hf, "num_key_value_heads"),
        "kv_channels": key(hf, "head_dim"),
        "layernorm_epsilon": key(hf, "rms_norm_eps"),
        "init_method_std": hf.get("initializer_range", 0.02),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }
    if is_moe(hf):
        transformer |= {
            "num_moe_experts": num_experts(hf),
            "moe_ffn_hidden_size": key(hf, "moe_intermediate_size"),
            "moe_router_topk": key(hf, "num_experts_per_tok"),
            "moe_router_pre_softmax": False,  # softmax over the chosen experts = norm_topk_prob
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": False,
        }
    gpt = {
        "max_sequence_length": key(hf, "max_position_embeddings"),
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(hf),
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
    }
    return Family(transformer, gpt, int(key(hf, "vocab_size")))


def layer_rules(hf: Mapping[str, Any]) -> list[Rule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`; in experts' names `{}` stands for the expert's global number."""
    hidden, head_dim = key(hf, "hidden_size"), key(hf, "head_dim")
    num_query_groups = key(hf, "num_key_value_heads")
    q, kv = key(hf, "num_attention_heads") * head_dim, num_query_groups * head_dim
    qkv = partial(mapping.qkv, num_query_groups=num_query_groups)
    attention = [
        Rule("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}, mapping.replicated),
        Rule(
            "self_attention.linear_qkv.weight",
            {"self_attn.q_proj.weight": (q, hidden), "self_attn.k_proj.weight": (kv, hidden), "self_attn.v_proj.weight": (kv, hidden)},
            qkv,
        ),
        Rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": (head_dim,)}, mapping.replicated),
        Rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": (head_dim,)}, mapping.replicated),
        Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, q)}, mapping.row),
        Rule("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (hidden,)}, mapping.replicated),
    ]
    if not is_moe(hf):
        return attention + mlp_rules("mlp.", "mlp.", hidden, key(hf, "intermediate_size"))
    router = Rule("mlp.router.weight", {"mlp.gate.weight": (num_experts(hf), hidden)}, mapping.replicated)
    experts = mlp_rules("mlp.experts.local_experts.{}.", "mlp.experts.{}.", hidden, key(hf, "moe_intermediate_size"), expert=True)
    return [*attention, router, *experts]
