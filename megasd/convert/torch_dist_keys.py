"""Where each parameter lies in a Megatron checkpoint, and of which Hugging Face rows it is made.

A checkpoint knows no ranks. Its tensors are global, layers (and experts) are stacked, and a fused
tensor has the row order of a single tensor-parallel rank. So every parameter is a list of row ranges
of Hugging Face tensors, in both directions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megasd.models import tp_layouts
from megasd.models.param_table import ParamRule, ParamTable
from megasd.models.tp_layouts import Shape
from megasd.types import UserError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# Megatron saves the norms of its local layers under TransformerEngine's names
# (sharded_state_dict_keys_map)
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_MLP_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
# Experts do not begin with a norm: TransformerEngine's layers keep the norm under another name.
ALIASES = {_MLP_NORM: "decoder.layers.pre_mlp_layernorm.weight"}
# Keys in the checkpoint of a run that are no part of the model.
NOT_THE_MODEL = re.compile(
    r"(chained_\d+\.)?optimizer\.|teacher\.|rng\b|rng_state|opt_param_scheduler|rerun_state"
)


class Slot(NamedTuple):
    """Where one parameter lies in a checkpoint: `tensor[key][*prefix]`.

    The tensor has the shape (*stack, rows, ...).
    """

    key: str
    prefix: Shape
    stack: Shape


class Rows(NamedTuple):
    """A range of rows of a Hugging Face tensor, and its place in the parameter.

    `part[start : start + length]` lies at rows [offset, offset + length) of the parameter.
    """

    part: str
    start: int
    length: int
    offset: int


def slot(name: str, table: ParamTable) -> Slot:
    """Where the parameter of this global name lies."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Slot(name, (), ())
    index, suffix = int(layer[1]), _NORMS.get(layer[2], layer[2])
    expert = _EXPERT.fullmatch(suffix)
    if expert is not None:
        return Slot(
            f"decoder.layers.mlp.experts.experts.{expert[2]}",
            (index, int(expert[1])),
            (table.num_layers, table.num_experts),
        )
    return Slot(f"decoder.layers.{suffix}", (index,), (table.num_layers,))


def names(table: ParamTable) -> list[str]:
    """Global names of all parameters of a checkpoint; the output layer of a tied model is not stored."""
    return [name for name in table.names() if not (table.tied and name == "output_layer.weight")]


def shape_of(rule: ParamRule) -> Shape:
    """The shape of a whole parameter, without vocabulary padding."""
    shapes = tuple(rule.parts.values())
    return shapes[0] if rule.layout is tp_layouts.vocab else tuple(rule.layout(shapes, 0, 1).shape)


def rows_of(rule: ParamRule) -> list[Rows]:
    """The row ranges that make up a whole parameter, in order."""
    parts = list(rule.parts)
    if rule.layout is tp_layouts.vocab:
        return [Rows(parts[0], 0, shape_of(rule)[0], 0)]
    rows = []
    for s in rule.layout(tuple(rule.parts.values()), 0, 1).segments:
        # A parameter that is cut along dimension 1 is whole on one rank: it has all rows.
        rows.append(
            Rows(parts[s.part], s.start, s.length, s.offset)
            if s.dim == 0
            else Rows(parts[s.part], 0, shape_of(rule)[0], 0)
        )
    return sorted(rows, key=lambda r: r.offset)


def modules_with_state(table: ParamTable) -> dict[str, Shape]:
    """`<key>._extra_state` -> the dimensions that it is stacked over.

    Of every module of which Megatron or TransformerEngine may load an extra state.
    """
    found: dict[str, Shape] = {}
    for name in names(table):
        place = slot(name, table)
        found[f"{place.key.rpartition('.')[0]}._extra_state"] = place.stack or (1,)
    del found["embedding.word_embeddings._extra_state"]
    found["decoder.layers.self_attention.core_attention._extra_state"] = (table.num_layers,)
    if table.num_experts:
        found["decoder.layers.pre_mlp_layernorm._extra_state"] = (table.num_layers,)
    return found


def check_keys(found: dict[str, Shape], table: ParamTable, where: str, prefix: str = "") -> dict[str, str]:
    """Wanted key -> key that was found.

    `found`: key -> shape, where every key of the model begins with `prefix`. UserError names the first
    key that is missing, unknown or of another shape.
    """
    chosen: dict[str, str] = {}
    for name in names(table):
        place, rule = slot(name, table), table.rule(name)
        if place.key in chosen:
            continue
        key = next(
            (
                prefix + k
                for k in (place.key, ALIASES.get(place.key))
                if k is not None and prefix + k in found
            ),
            None,
        )
        if key is None:
            raise UserError(
                f"{where}: tensor {prefix + place.key} is missing, which config.json asks for (for"
                f" {', '.join(rule.parts)})"
            )
        wanted, shape = (*place.stack, *shape_of(rule)), tuple(found[key])
        padded = (
            rule.layout is tp_layouts.vocab
            and len(shape) == len(wanted)
            and shape[0] >= wanted[0]
            and shape[1:] == wanted[1:]
        )
        if shape != wanted and not padded:
            raise UserError(
                f"{where}: {key} has shape {shape}, config.json asks for {wanted}; is it this model's"
                " config.json?"
            )
        chosen[place.key] = key
    known = set(chosen.values()) | {prefix + alias for alias in ALIASES.values()}
    for key in sorted(found):
        if key.startswith(prefix) and key not in known and not (not prefix and NOT_THE_MODEL.match(key)):
            raise UserError(
                f"{where}: tensor {key} belongs to no part of this model; is it this model's config.json?"
            )
    return chosen
