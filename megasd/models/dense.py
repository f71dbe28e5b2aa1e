"""What the decoder families share: Megatron's arguments, the rules of a layer, and the refusals.

Nothing here imports torch at module level: the planner needs shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megasd.models import tp_layouts
from megasd.models.param_table import Family, ParamRule, Rope, key, mlp_rules, refuse


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key of config.json, for what no family supports."""
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            refuse(hf, name, "these linear layers have no bias")
    if hf.get("hidden_act", "silu") != "silu":
        refuse(hf, "hidden_act", "only silu")


def check_full_attention(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that asks for sliding windows."""
    if hf.get("use_sliding_window"):
        refuse(hf, "use_sliding_window", "only full attention")
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        refuse(hf, "layer_types", "only full attention")


def head_dim(hf: Mapping[str, Any]) -> int:
    """Size of a head: `head_dim`, or the hidden size divided by the number of heads."""
    return int(hf.get("head_dim") or key(hf, "hidden_size") // key(hf, "num_attention_heads"))


def query_groups(hf: Mapping[str, Any]) -> int:
    """Number of key and value heads; as many as query heads when config.json does not say."""
    return int(hf.get("num_key_value_heads") or key(hf, "num_attention_heads"))


def family(hf: Mapping[str, Any], ropes: tuple[Rope, ...], **particular: Any) -> Family:
    """Megatron's arguments.

    `particular`: fields of TransformerConfig that the family adds, and the fields `layer_ropes` and
    `post_norm` of Family.
    """
    import torch.nn.functional as F

    fields = {name: particular.pop(name) for name in ("layer_ropes", "post_norm") if name in particular}
    transformer: dict[str, Any] = {
        "num_layers": key(hf, "num_hidden_layers"),
        "hidden_size": key(hf, "hidden_size"),
        "ffn_hidden_size": key(hf, "intermediate_size"),
        "num_attention_heads": key(hf, "num_attention_heads"),
        "num_query_groups": query_groups(hf),
        "kv_channels": head_dim(hf),
        "layernorm_epsilon": key(hf, "rms_norm_eps"),
        "init_method_std": hf.get("initializer_range", 0.02),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        **particular,
    }
    gpt = {
        "max_sequence_length": key(hf, "max_position_embeddings"),
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
    }
    return Family(transformer, gpt, int(key(hf, "vocab_size")), ropes, **fields)


def attention_rules(hf: Mapping[str, Any], *, qkv_bias: bool = False) -> list[ParamRule]:
    """The rules of linear_qkv and linear_proj."""
    hidden, groups, size = key(hf, "hidden_size"), query_groups(hf), head_dim(hf)
    rows = {"q_proj": key(hf, "num_attention_heads") * size, "k_proj": groups * size, "v_proj": groups * size}
    qkv = partial(tp_layouts.qkv, num_query_groups=groups)
    weights = {f"self_attn.{name}.weight": (length, hidden) for name, length in rows.items()}
    biases = {f"self_attn.{name}.bias": (length,) for name, length in rows.items()}
    return [
        ParamRule("self_attention.linear_qkv.weight", weights, qkv),
        *([ParamRule("self_attention.linear_qkv.bias", biases, qkv)] if qkv_bias else []),
        ParamRule(
            "self_attention.linear_proj.weight",
            {"self_attn.o_proj.weight": (hidden, rows["q_proj"])},
            tp_layouts.row,
        ),
    ]


def norm_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """The rules of the norms before attention and before the MLP."""
    hidden = key(hf, "hidden_size")
    return [
        ParamRule("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}, tp_layouts.replicated),
        ParamRule(
            "pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (hidden,)}, tp_layouts.replicated
        ),
    ]


def layer_rules(hf: Mapping[str, Any], *, qkv_bias: bool = False) -> list[ParamRule]:
    """The rules of a Llama-like layer: norms first, gated MLP."""
    mlp = mlp_rules("mlp.", "mlp.", key(hf, "hidden_size"), key(hf, "intermediate_size"))
    return [*norm_rules(hf), *attention_rules(hf, qkv_bias=qkv_bias), *mlp]
