"""Floating-point operations of a model, counted from its config.json. Plain Python.

A multiply-add counts 2. Counted are matrix products: projections, attention scores and values,
router, experts a token visits, output layer; not norms, rotary tables, softmax (below 1 % at the
sizes this is for). Attention is causal: a token sees itself and what is before it, or the last
`sliding_window` tokens. A backward is twice its forward; activations computed anew cost their
forward again. The same count as PaLM's model FLOPs (2204.02311, appendix B) but for the causal
half, which FlashAttention does not compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megasd.config.schema import ActorConfig


def head_dim(hf: Mapping[str, Any]) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def linear_weights(hf: Mapping[str, Any]) -> int:
    """Weights of one layer's matrices that one token meets: of a mixture of experts, those of the
    experts it visits and the router.
    """
    h, d = hf["hidden_size"], head_dim(hf)
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    attention = h * d * (2 * heads + 2 * groups)
    if hf.get("num_experts"):
        return (
            attention
            + hf["num_experts_per_tok"] * 3 * h * hf["moe_intermediate_size"]
            + h * hf["num_experts"]
        )
    return attention + 3 * h * hf["intermediate_size"]


def attention_pairs(length: int, window: int | None = None) -> int:
    """(query, key) pairs of a causal sequence; each query sees at most `window` tokens, itself among them."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def layers_flops(hf: Mapping[str, Any], length: int) -> float:
    """Forward of all layers over one sequence of `length` tokens."""
    return 2.0 * linear_weights(hf) * hf["num_hidden_layers"] * length + scores_flops(hf, length)


def scores_flops(hf: Mapping[str, Any], length: int) -> float:
    """Forward of the core attention of all layers over one sequence: a pair costs one product with
    the key and one with the value.
    """
    pairs = sum(count * attention_pairs(length, window) for window, count in Counter(_windows(hf)).items())
    return 4.0 * hf["num_attention_heads"] * head_dim(hf) * pairs


def output_flops(hf: Mapping[str, Any], tokens: int) -> float:
    """Forward of the output layer for `tokens` predicted tokens."""
    return 2.0 * hf["hidden_size"] * hf["vocab_size"] * tokens


def forward_flops(hf: Mapping[str, Any], length: int, predicted: int) -> float:
    """Forward over one sequence, with the output layer for its `predicted` response tokens alone."""
    return layers_flops(hf, length) + output_flops(hf, predicted)


def recompute_flops(hf: Mapping[str, Any], length: int, actor: ActorConfig) -> float:
    """What the backward of one sequence computes anew by actor.recompute_*: layers, attention
    scores, or the MLP; norms are not counted.
    """
    if actor.recompute_granularity is None:
        return 0.0
    layers = hf["num_hidden_layers"]
    if actor.recompute_granularity == "full":
        share = 1.0
        # the first layers of each pipeline stage
        if actor.recompute_method == "block":
            share = min(1.0, actor.recompute_num_layers * actor.pipeline_model_parallel_size / layers)
        return share * layers_flops(hf, length)
    flops = scores_flops(hf, length) if "core_attn" in actor.recompute_modules else 0.0
    if {"mlp", "moe"} & set(actor.recompute_modules):
        h, heads, groups = (
            hf["hidden_size"],
            hf["num_attention_heads"],
            hf.get("num_key_value_heads") or hf["num_attention_heads"],
        )
        flops += 2.0 * (linear_weights(hf) - h * head_dim(hf) * (2 * heads + 2 * groups)) * layers * length
    return flops


def _windows(hf: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer; None = the whole sequence."""
    count, window = hf["num_hidden_layers"], hf.get("sliding_window")
    kinds = hf.get("layer_types")
    if window is None or hf.get("use_sliding_window") is False:
        return [None] * count
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window] * count
