"""Mistral: Llama-like layers; `sliding_window`, where it is not null, holds for every layer, as in
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense
from megasd.models.param_table import Family, ParamRule, refuse
from megasd.models.rope import rope

MODEL_TYPES = ("mistral",)


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key of config.json, for whatever these tables would turn into a
    silently different model.
    """
    dense.check(hf)
    if hf.get("layer_types"):
        refuse(hf, "layer_types", "Mistral's window holds for every layer")
    if "sliding_window" not in hf:
        refuse(hf, "sliding_window", "say null or a number of tokens: its default differs between readers")


def num_experts(hf: Mapping[str, Any]) -> int:
    return 0


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json (a dict). UserError names the key that is missing or
    not supported.
    """
    window = hf["sliding_window"]
    # the token itself is one of the window
    windows = {} if window is None else {"window_size": (window - 1, 0)}
    return dense.family(hf, (rope(hf, dense.head_dim(hf)),), **windows)


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`."""
    return dense.layer_rules(hf)
