"""Qwen3 and Qwen3-MoE: config.json -> Megatron's arguments, and the one table of names, used in both directions.

Local names are those of megatron-core's GPTModel with the local layer spec; TransformerEngine's two fused norms are renamed first.
Experts are SequentialMLP's (`moe_grouped_gemm=False`) with `expert_tensor_parallel_size=1`: an expert is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F

from megasd.types import UserError
from megasd.weights import mapping
from megasd.weights.mapping import Layout, Shape

MODEL_TYPES = ("qwen3", "qwen3_moe")

_TE_NAMES = {  # TransformerEngine fuses the norm into the linear layer that follows it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Family:
    """Arguments of Megatron: TransformerConfig(**transformer, <parallelism, dtype>), GPTModel(config, spec, padded vocab, **gpt)."""

    transformer: dict[str, Any]
    gpt: dict[str, Any]
    vocab_size: int  # tokens, without padding


@dataclass(frozen=True)
class Rule:
    """One local parameter and the Hugging Face tensors that it is made of.

    Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, heads * head_dim)}, mapping.row)
    """

    local: str  # Megatron's name, without the layer's prefix
    parts: Mapping[str, Shape]  # Hugging Face names and whole shapes, in the layout's order
    layout: Callable[..., Layout]  # (shapes, rank, size) -> Layout
    expert: bool = False  # over expert-parallel ranks; never cut over tensor-parallel ones


def _key(hf: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise UserError(f"config.json has no {names[0]}: take the config.json of the checkpoint's own repository")


def _refuse(hf: Mapping[str, Any], key: str, why: str) -> None:
    raise UserError(f"config.json: {key}={hf.get(key)!r} is not supported: {why}")


def _rotary_base(hf: Mapping[str, Any]) -> float:
    # transformers 5 nests rope_theta; reading only the top level would silently leave Megatron's 10000.
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        _refuse(hf, "rope_parameters", "only rope_type default")
    if hf.get("rope_scaling"):
        _refuse(hf, "rope_scaling", "remove it, the model then has its native context length")
    if "rope_theta" in rope:
        return float(rope["rope_theta"])
    return float(_key(hf, "rope_theta"))


def check_supported(hf: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key of config.json, for whatever these tables would turn into a silently different model."""
    if hf.get("model_type") not in MODEL_TYPES:
        _refuse(hf, "model_type", f"one of {', '.join(MODEL_TYPES)} is")
    if hf.get("quantization_config"):
        _refuse(hf, "quantization_config", "take the float checkpoint")
    if hf.get("attention_bias"):
        _refuse(hf, "attention_bias", "Qwen3 attention has no bias")
    if hf.get("use_sliding_window"):
        _refuse(hf, "use_sliding_window", "only full attention")
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        _refuse(hf, "layer_types", "only full attention")
    if hf.get("hidden_act", "silu") != "silu":
        _refuse(hf, "hidden_act", "only silu")
    if is_moe(hf):
        if not hf.get("norm_topk_prob", False):
            _refuse(hf, "norm_topk_prob", "the router normalises the chosen experts' weights")
        if hf.get("mlp_only_layers"):
            _refuse(hf, "mlp_only_layers", "every layer must have experts")
        if hf.get("decoder_sparse_step", 1) != 1:
            _refuse(hf, "decoder_sparse_step", "every layer must have experts")


def is_moe(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "qwen3_moe"


def _num_experts(hf: Mapping[str, Any]) -> int:
    return int(_key(hf, "num_experts", "num_local_experts"))  # the hub's name; the one that transformers 5 writes


def config_from_hf(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json (a dict). UserError names the key that is missing or not supported."""
    check_supported(hf)
    transformer: dict[str, Any] = {
        "num_layers": _key(hf, "num_hidden_layers"),
        "hidden_size": _key(hf, "hidden_size"),
        "ffn_hidden_size": _key(hf, "intermediate_size"),
        "num_attention_heads": _key(hf, "num_attention_heads"),
        "num_query_groups": _key(hf, "num_key_value_heads"),
        "kv_channels": _key(hf, "head_dim"),
        "layernorm_epsilon": _key(hf, "rms_norm_eps"),
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
            "num_moe_experts": _num_experts(hf),
            "moe_ffn_hidden_size": _key(hf, "moe_intermediate_size"),
            "moe_router_topk": _key(hf, "num_experts_per_tok"),
            "moe_router_pre_softmax": False,  # softmax over the chosen experts = norm_topk_prob
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": False,
        }
    gpt = {
        "max_sequence_length": _key(hf, "max_position_embeddings"),
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(hf),
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
    }
    return Family(transformer, gpt, int(_key(hf, "vocab_size")))


# ---- the table: every weight is named here, once ----


def ends_rules(hf: Mapping[str, Any]) -> list[Rule]:
    """What stands before and after the layers. `vocab` layouts also take `rows`, the local number of vocabulary rows."""
    table, hidden = (_key(hf, "vocab_size"), _key(hf, "hidden_size")), _key(hf, "hidden_size")
    # A tied model's last pipeline stage holds a copy of the embedding as its output layer: loaded, never exported.
    head = "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"
    return [
        Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": table}, mapping.vocab),
        Rule("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}, mapping.replicated),
        Rule("output_layer.weight", {head: table}, mapping.vocab),
    ]


def layer_rules(hf: Mapping[str, Any]) -> list[Rule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`; in experts' names `{}` stands for the expert's global number."""
    hidden, head_dim = _key(hf, "hidden_size"), _key(hf, "head_dim")
    num_query_groups = _key(hf, "num_key_value_heads")
    q, kv = _key(hf, "num_attention_heads") * head_dim, num_query_groups * head_dim
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
        return attention + _mlp_rules("mlp.", "mlp.", hidden, _key(hf, "intermediate_size"))
    router = Rule("mlp.router.weight", {"mlp.gate.weight": (_num_experts(hf), hidden)}, mapping.replicated)
    experts = _mlp_rules("mlp.experts.local_experts.{}.", "mlp.experts.{}.", hidden, _key(hf, "moe_intermediate_size"), expert=True)
    return [*attention, router, *experts]


def _mlp_rules(local: str, prefix: str, hidden: int, width: int, expert: bool = False) -> list[Rule]:
    gate_up: dict[str, Shape] = {f"{prefix}gate_proj.weight": (width, hidden), f"{prefix}up_proj.weight": (width, hidden)}
    return [
        Rule(f"{local}linear_fc1.weight", gate_up, mapping.gated, expert),
        Rule(f"{local}linear_fc2.weight", {f"{prefix}down_proj.weight": (hidden, width)}, mapping.row, expert),
    ]


def expected_tensors(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor of a Hugging Face checkpoint of this model, in the model's order."""
    embedding, norm, head = ends_rules(hf)
    layer, found = layer_rules(hf), dict(embedding.parts)
    for index in range(_key(hf, "num_hidden_layers")):
        for expert in [None, *range(_num_experts(hf))] if is_moe(hf) else [None]:
            for rule in layer:
                if rule.expert == (expert is not None):
                    found |= {f"model.layers.{index}.{name.format(expert)}": shape for name, shape in rule.parts.items()}
    return found | dict(norm.parts) | dict(head.parts)


class Names:
    """Looks local parameters up in the table. `layer_offset`: global number of the stage's first layer."""

    def __init__(self, hf: Mapping[str, Any], layer_offset: int) -> None:
        self.hf, self.layer_offset = hf, layer_offset
        self.num_layers = int(_key(hf, "num_hidden_layers"))
        self.num_experts = _num_experts(hf) if is_moe(hf) else 0
        self.ends = {rule.local: rule for rule in ends_rules(hf)}
        self.layer = {rule.local: rule for rule in layer_rules(hf)}

    def lookup(self, name: str, expert_offset: int = 0) -> Rule:
        """The rule of a local parameter, with full Hugging Face names; `expert_offset` is the rank's first expert. UserError if unknown."""
        if name in self.ends:
            return self.ends[name]
        match = _LAYER.fullmatch(name)
        if match is None:
            raise UserError(f"Megatron parameter {name} has no Hugging Face counterpart in megasd/weights/qwen3.py")
        index, suffix = int(match[1]) + self.layer_offset, match[2]
        suffix, expert = _TE_NAMES.get(suffix, suffix), _EXPERT.fullmatch(suffix)
        number = None
        if expert is not None:
            number, suffix = int(expert[1]) + expert_offset, f"mlp.experts.local_experts.{{}}.{expert[2]}"
        rule = self.layer.get(suffix)
        if rule is None or index >= self.num_layers or (number is not None and number >= self.num_experts):
            raise UserError(
                f"Megatron parameter {name} (layer {index}) has no Hugging Face counterpart: "
                f"config.json has {self.num_layers} layers and {self.num_experts} experts"
            )
        parts = {f"model.layers.{index}.{part.format(number)}": shape for part, shape in rule.parts.items()}
        return Rule(name, parts, rule.layout, rule.expert)

    def expected_locals(self, name: str, num_local_experts: int) -> list[str]:
        """The local names that a layer must have, given one of its parameters (to find a parameter that a model spec left out)."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return []
        expand = [local.format(e) for local, rule in self.layer.items() for e in (range(num_local_experts) if rule.expert else [None])]
        return [f"decoder.layers.{match[1]}.{local}" for local in expand]


def canonical_name(name: str) -> str:
    """Local-spec name of a parameter: TransformerEngine's fused norms renamed, others unchanged."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{match[1]}.{_TE_NAMES.get(match[2], match[2])}" if match else name
