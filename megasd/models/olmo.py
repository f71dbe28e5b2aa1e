"""OLMo-2 and OLMo-3: norms after attention and MLP, and q/k norms over all heads.

OLMo-3 also has layers with a sliding window, which use another rope table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense, tp_layouts
from megasd.models.param_table import Family, ParamRule, Rope, key, mlp_rules, refuse
from megasd.models.rope import rope, rope_parameters, rope_table

MODEL_TYPES = ("olmo2", "olmo3")
# A layer uses the rope table at the index of its kind.
_KINDS = ("full_attention", "sliding_attention")
# The rope_theta that transformers gives to sliding layers when config.json has the old spelling.
_THETA = 500000.0


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that would become a different model here; names the key."""
    dense.check(hf)
    if hf.get("clip_qkv"):
        refuse(hf, "clip_qkv", "queries, keys and values are not clipped")
    if hf.get("model_type") == "olmo2":
        dense.check_full_attention(hf)
        return
    types = _layer_types(hf)
    if len(types) != key(hf, "num_hidden_layers") or set(types) - set(_KINDS):
        refuse(
            hf, "layer_types", f"one of {', '.join(_KINDS)} for each of {key(hf, 'num_hidden_layers')} layers"
        )
    if "sliding_attention" in types and not hf.get("sliding_window"):
        refuse(hf, "sliding_window", "layer_types asks for sliding layers; give the window (tokens)")


def num_experts(hf: Mapping[str, Any]) -> int:
    """0: the model is dense."""
    return 0


def _layer_types(hf: Mapping[str, Any]) -> list[str]:
    """Three sliding layers, then a full one, unless config.json says otherwise."""
    return hf.get("layer_types") or [_KINDS[(i + 1) % 4 != 0] for i in range(key(hf, "num_hidden_layers"))]


def _ropes(hf: Mapping[str, Any]) -> tuple[Rope, ...]:
    """The tables of full and of sliding layers. Scaling in the old spelling is for full layers alone."""
    where, parameters = rope_parameters(hf)
    size = dense.head_dim(hf)
    if where == "rope_parameters":
        if set(parameters) - set(_KINDS):
            refuse(hf, where, f"OLMo-3 nests it by layer type: {', '.join(_KINDS)}")
        if hf.get("rope_theta") is not None:
            refuse(hf, "rope_theta", "give it inside rope_parameters, for each layer type")
        for kind in _KINDS:
            nested = parameters.setdefault(kind, {}) or {}
            parameters[kind] = {"rope_theta": _THETA} | nested
            if not nested.get("truncate", True):
                refuse(hf, where, "transformers does not read a nested truncate")
        return tuple(rope_table(hf, where, parameters[kind], size) for kind in _KINDS)
    if float(key(hf, "rope_theta")) != _THETA:
        refuse(
            hf,
            "rope_theta",
            f"transformers gives sliding layers {_THETA}; write rope_parameters by layer type",
        )
    return rope_table(hf, where, parameters, size), rope_table(hf, where, {}, size)


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported.

    qk_layernorm stays False: Megatron would sum the gradients of q/k norms over tensor-parallel
    ranks, which here hold different weights.
    """
    if hf.get("model_type") == "olmo2":
        return dense.family(hf, (rope(hf, dense.head_dim(hf)),), post_norm=True)
    sliding = [int(kind == "sliding_attention") for kind in _layer_types(hf)]
    windows = (
        {"window_size": (hf["sliding_window"] - 1, 0), "window_attn_skip_freq": sliding}
        if any(sliding)
        else {}
    )
    return dense.family(hf, _ropes(hf), layer_ropes=tuple(sliding), post_norm=True, **windows)


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`.

    The norm after attention, or after the MLP, belongs to the last linear layer before it.
    """
    hidden, size = key(hf, "hidden_size"), dense.head_dim(hf)
    rows = {"q": key(hf, "num_attention_heads") * size, "k": dense.query_groups(hf) * size}
    return [
        *dense.attention_rules(hf),
        *(
            ParamRule(
                f"self_attention.{n}_layernorm.weight",
                {f"self_attn.{n}_norm.weight": (rows[n],)},
                tp_layouts.column,
            )
            for n in rows
        ),
        ParamRule(
            "self_attention.linear_proj.post_layernorm.weight",
            {"post_attention_layernorm.weight": (hidden,)},
            tp_layouts.replicated,
        ),
        *mlp_rules("mlp.", "mlp.", hidden, key(hf, "intermediate_size")),
        ParamRule(
            "mlp.linear_fc2.post_layernorm.weight",
            {"post_feedforward_layernorm.weight": (hidden,)},
            tp_layouts.replicated,
        ),
    ]
