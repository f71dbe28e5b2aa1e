"""Mistral: Llama-like layers, with a sliding window in every layer or in none.

A `sliding_window` that is not null holds for every layer, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense
from megasd.models.param_table import Family, ParamRule, refuse
from megasd.models.rope import rope

MODEL_TYPES = ("mistral",)


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that would become a different model here; names the key."""
    dense.check(hf)
    if hf.get("layer_types"):
        refuse(hf, "layer_types", "Mistral's window holds for every layer")
    if "sliding_window" not in hf:
        refuse(hf, "sliding_window", "say null or a number of tokens: its default differs between readers")


def num_experts(hf: Mapping[str, Any]) -> int:
    """0: the model is dense."""
    return 0


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported."""
    window = hf["sliding_window"]
    # Megatron counts the tokens before the token itself.
    windows = {} if window is None else {"window_size": (window - 1, 0)}
    return dense.family(hf, (rope(hf, dense.head_dim(hf)),), **windows)


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`."""
    return dense.layer_rules(hf)
