"""Qwen2 and Qwen2.5: Llama-like layers with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense
from megasd.models.param_table import Family, ParamRule
from megasd.models.rope import rope

MODEL_TYPES = ("qwen2",)


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that would become a different model here; names the key."""
    # Qwen2 always has a bias on queries, keys and values; attention_bias says nothing about it.
    dense.check({name: value for name, value in hf.items() if name != "attention_bias"})
    dense.check_full_attention(hf)


def num_experts(hf: Mapping[str, Any]) -> int:
    """0: the model is dense."""
    return 0


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported."""
    return dense.family(hf, (rope(hf, dense.head_dim(hf)),), add_qkv_bias=True)


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`."""
    return dense.layer_rules(hf, qkv_bias=True)
