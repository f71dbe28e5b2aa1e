"""Llama 3.x (and what calls itself llama): rope scaling with any factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasd.models import dense
from megasd.models.param_table import Family, ParamRule
from megasd.models.rope import rope

MODEL_TYPES = ("llama",)


def check(hf: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that would become a different model here; names the key."""
    dense.check(hf)
    dense.check_full_attention(hf)


def num_experts(hf: Mapping[str, Any]) -> int:
    """0: the model is dense."""
    return 0


def family(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported."""
    return dense.family(hf, (rope(hf, dense.head_dim(hf)),))


def layer_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """One layer. Hugging Face names lack the prefix `model.layers.<i>.`."""
    return dense.layer_rules(hf)
