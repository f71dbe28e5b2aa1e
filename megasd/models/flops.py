"""Floating-point operations of a model, counted from its config.json. Plain Python.

A multiply-add counts 2. Matrix products are counted: projections, attention scores and values, the
router, the experts that a token visits, the output layer. Norms, rotary tables and softmax are not
counted (below 1 % at the sizes this is for). Attention is causal: a token sees itself and the tokens
before it, or the last `sliding_window` tokens. A backward costs twice its forward. Recomputed
activations cost their forward again.

This is the count of PaLM's model FLOPs (2204.02311, appendix B), except that only the causal half of
the attention scores counts: FlashAttention does not compute the other half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megasd.config.schema import ActorConfig
from megasd.models.dense import head_dim, query_groups


def linear_weights(hf: Mapping[str, Any]) -> int:
    """Number of matrix weights of one layer that one token meets.

    In a mixture of experts a token meets the router and the experts that it visits.
    """
    h, attention = hf["hidden_size"], attention_weights(hf)
    if hf.get("num_experts"):
        return (
            attention
            + hf["num_experts_per_tok"] * 3 * h * hf["moe_intermediate_size"]
            + h * hf["num_experts"]
        )
    return attention + 3 * h * hf["intermediate_size"]


def attention_weights(hf: Mapping[str, Any]) -> int:
    """Number of weights of the attention projections of one layer."""
    return hf["hidden_size"] * head_dim(hf) * (2 * hf["num_attention_heads"] + 2 * query_groups(hf))


def attention_pairs(length: int, window: int | None = None) -> int:
    """Number of (query, key) pairs of a causal sequence.

    Each query sees at most `window` tokens, itself included.
    """
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def layers_flops(hf: Mapping[str, Any], length: int) -> float:
    """FLOPs of the forward of all layers over one sequence of `length` tokens."""
    return 2.0 * linear_weights(hf) * hf["num_hidden_layers"] * length + scores_flops(hf, length)


def scores_flops(hf: Mapping[str, Any], length: int) -> float:
    """FLOPs of the core attention of all layers over one sequence, forward.

    A (query, key) pair costs one product with the key and one product with the value.
    """
    pairs = sum(count * attention_pairs(length, window) for window, count in Counter(_windows(hf)).items())
    return 4.0 * hf["num_attention_heads"] * head_dim(hf) * pairs


def output_flops(hf: Mapping[str, Any], tokens: int) -> float:
    """FLOPs of the output layer for `tokens` predicted tokens, forward."""
    return 2.0 * hf["hidden_size"] * hf["vocab_size"] * tokens


def forward_flops(hf: Mapping[str, Any], length: int, predicted: int) -> float:
    """FLOPs of the forward over one sequence; the output layer runs on `predicted` tokens alone."""
    return layers_flops(hf, length) + output_flops(hf, predicted)


def recompute_flops(hf: Mapping[str, Any], length: int, actor: ActorConfig) -> float:
    """FLOPs that the backward of one sequence computes again, as actor.recompute_* say.

    Layers, attention scores or the MLP are counted; norms are not.
    """
    if actor.recompute_granularity is None:
        return 0.0
    layers = hf["num_hidden_layers"]
    if actor.recompute_granularity == "full":
        fraction = 1.0
        # "block" recomputes the first layers of each pipeline stage
        if actor.recompute_method == "block":
            fraction = min(1.0, actor.recompute_num_layers * actor.pipeline_model_parallel_size / layers)
        return fraction * layers_flops(hf, length)
    flops = scores_flops(hf, length) if "core_attn" in actor.recompute_modules else 0.0
    if {"mlp", "moe"} & set(actor.recompute_modules):
        flops += 2.0 * (linear_weights(hf) - attention_weights(hf)) * layers * length
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
