"""Which model families there are: config.json's model_type -> the module that knows it.

A family module has MODEL_TYPES, check(hf), family(hf) -> Family, layer_rules(hf) and
num_experts(hf); nothing else asks for the model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megasd.models import llama, mistral, olmo, qwen2, qwen3
from megasd.models.param_table import Family, ParamTable, ends_rules, refuse

MODULES: dict[str, ModuleType] = {
    model_type: module for module in (qwen2, qwen3, llama, mistral, olmo) for model_type in module.MODEL_TYPES
}


def _module(hf: Mapping[str, Any]) -> ModuleType:
    """Raises UserError, naming the key of config.json, for whatever the tables would turn into a
    silently different model.
    """
    if hf.get("model_type") not in MODULES:
        refuse(hf, "model_type", f"one of {', '.join(MODULES)} is")
    if hf.get("quantization_config"):
        refuse(hf, "quantization_config", "take the float checkpoint")
    module = MODULES[hf["model_type"]]
    module.check(hf)
    return module


def config_from_hf(hf: Mapping[str, Any]) -> Family:
    """Megatron's arguments for a config.json (a dict). UserError names the key that is missing or
    not supported.
    """
    return _module(hf).family(hf)


def param_table(hf: Mapping[str, Any]) -> ParamTable:
    """The table of names of a config.json. UserError names the key that is missing or not supported."""
    module = _module(hf)
    return ParamTable(hf, ends_rules(hf), module.layer_rules(hf), module.num_experts(hf))
