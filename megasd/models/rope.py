"""Rotary tables from config.json.

Inverse frequencies are exactly those of transformers: float32, in the same order of operations.

Megatron's own scaling is not used: it hard-codes two of llama3's factors and the original length
(rotary_pos_embedding.py:92).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megasd.models.param_table import Rope, key, refuse

if TYPE_CHECKING:
    from torch import Tensor

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NEEDED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}
_OPTIONAL: dict[str, set[str]] = {
    "default": set(),
    "linear": set(),
    "llama3": {"original_max_position_embeddings"},
    "yarn": {
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def rope_parameters(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rope parameters of a config.json, after the name of the key that holds them.

    The key is rope_parameters (transformers 5), or rope_scaling with rope_theta (transformers 4).
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    if new and old:
        refuse(hf, "rope_scaling", "rope_parameters says it too; remove one of the two")
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        if hf.get(name) is not None:
            refuse(hf, name, "give it inside rope_parameters")
    if new:
        return "rope_parameters", dict(new)
    return "rope_scaling", dict(old or {})


def rope(hf: Mapping[str, Any], head_dim: int) -> Rope:
    """The one table of a model. UserError names the key of config.json that is not supported."""
    where, parameters = rope_parameters(hf)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        refuse(hf, where, "one table for all layers")
    return rope_table(hf, where, parameters, head_dim)


def rope_table(hf: Mapping[str, Any], where: str, parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """The table of `parameters`, which stand under the key `where` of config.json.

    rope_theta may stand next to this key. UserError names the key that is not supported.
    """
    import torch

    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _NEEDED:
        refuse(hf, where, f"rope_type one of {', '.join(_NEEDED)}")
    given = {name for name, value in parameters.items() if value is not None}
    if missing := _NEEDED[kind] - given:
        refuse(hf, where, f"rope_type {kind} needs {', '.join(sorted(missing))}")
    if unknown := given - _COMMON - _NEEDED[kind] - _OPTIONAL[kind]:
        refuse(hf, where, f"{', '.join(sorted(unknown))} is unknown to rope_type {kind}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        refuse(hf, where, "only whole heads are turned")
    theta = parameters.get("rope_theta")
    base = float(key(hf, "rope_theta") if theta is None else theta)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    factor = 1.0
    if kind == "yarn":
        frequencies, factor = _yarn(base, exponents, _original_length(hf, parameters), parameters)
    else:
        frequencies = 1.0 / base**exponents
        if kind == "linear":
            frequencies /= parameters["factor"]
        if kind == "llama3":
            frequencies = _llama3(frequencies, _original_length(hf, parameters), parameters)
    return Rope(tuple(frequencies.tolist()), factor)


def _original_length(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
    """The length (tokens) that the model was trained on before its rope was scaled."""
    return parameters.get("original_max_position_embeddings") or key(hf, "max_position_embeddings")


def _llama3(frequencies: Tensor, original: float, parameters: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves are slowed down by `factor`, short waves are kept, the rest is blended.

    `frequencies` [head_dim / 2], `original` in tokens.
    """
    import torch

    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(
    base: float, exponents: Tensor, original: float, parameters: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """YaRN (2309.00071): frequencies [head_dim / 2], and the attention factor.

    Pairs with few rotations over the original length are interpolated, pairs with many are kept.
    """
    import torch

    scale, half = parameters["factor"], len(exponents)

    def magnitude(mscale: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    def pair(rotations: float) -> float:
        # index of the pair that makes so many rotations over the original length
        return (2 * half * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    factor, mscale, mscale_all = (
        parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if factor is None:
        factor = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    kept, powers = 1 - ramp, base**exponents
    return 1.0 / (scale * powers) * (1 - kept) + 1.0 / powers * kept, float(factor)
