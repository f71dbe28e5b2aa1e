"""The table of model families: `model_type` of config.json -> the module of the family.

A new family is a module with the functions of FamilyModule, and its name in FAMILIES. No other file
asks for the model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megasd.models import llama, mistral, olmo, qwen2, qwen3
from megasd.models.param_table import Family, ParamRule, ParamTable, ends_rules, refuse


class FamilyModule(Protocol):
    """What the module of a family has; `hf` is a config.json as a dict."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The values of `model_type` that the module reads."""
        ...

    def check(self, hf: Mapping[str, Any]) -> None:
        """Raise UserError, naming the key, for a config.json that would become another model here."""
        ...

    def family(self, hf: Mapping[str, Any]) -> Family:
        """Megatron's arguments."""
        ...

    def layer_rules(self, hf: Mapping[str, Any]) -> list[ParamRule]:
        """The rules of one layer; Hugging Face names lack the prefix `model.layers.<i>.`."""
        ...

    def num_experts(self, hf: Mapping[str, Any]) -> int:
        """Experts a layer; 0 for a dense model."""
        ...


FAMILIES: tuple[FamilyModule, ...] = (qwen2, qwen3, llama, mistral, olmo)
MODULES: dict[str, FamilyModule] = {
    model_type: module for module in FAMILIES for model_type in module.MODEL_TYPES
}


def _module(hf: Mapping[str, Any]) -> FamilyModule:
    """The module of a config.json, which it has checked. UserError names the key that is refused."""
    if hf.get("model_type") not in MODULES:
        refuse(hf, "model_type", f"one of {', '.join(MODULES)} is")
    if hf.get("quantization_config"):
        refuse(hf, "quantization_config", "take the float checkpoint")
    module = MODULES[hf["model_type"]]
    module.check(hf)
    return module


def config_from_hf(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json; UserError names a key that is missing or not supported."""
    return _module(hf).family(hf)


def param_table(hf: Mapping[str, Any]) -> ParamTable:
    """The parameter table of a config.json; UserError names a key that is missing or not supported."""
    module = _module(hf)
    return ParamTable(hf, ends_rules(hf), module.layer_rules(hf), module.num_experts(hf))
