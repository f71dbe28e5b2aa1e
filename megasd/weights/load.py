"""Fills the live parameters of a parallel model from a Hugging Face directory.

Ranks do not communicate: each rank reads only its own slices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from megasd.models import registry, tp_layouts
from megasd.models.param_table import ParamTable
from megasd.types import UserError
from megasd.weights.hf_files import Source, read_hf_config
from megasd.weights.te_fp8 import fill, is_quantised


def check_names(names: Iterable[str], table: ParamTable, where: Path) -> None:
    """Raise UserError unless `names` are the tensors of the model; the message begins with `where`."""
    expected, found = table.expected_tensors(), set(names)
    for name in expected:
        if name not in found:
            raise UserError(
                f"{where}: tensor {name} is missing, which config.json asks for; fetch the directory again"
            )
    if table.tied:
        # Some checkpoints of tied models hold a copy of the embedding.
        found.discard("lm_head.weight")
    unknown = sorted(found - expected.keys())
    if unknown:
        raise UserError(
            f"{where}: tensor {unknown[0]} (and {len(unknown) - 1} more) belongs to no part of this model; is"
            " config.json its own?"
        )


def check_hf(hf_dir: str | os.PathLike[str]) -> None:
    """Raise UserError for everything that `load_hf` would refuse with any parallel layout.

    Checks config.json, and name, shape and dtype of every tensor; reads headers only. One rank calls
    this before the ranks build a model that they could not load.
    """
    hf_dir = Path(hf_dir)
    hf = read_hf_config(hf_dir)
    try:
        table = registry.param_table(hf)
        registry.config_from_hf(hf)
    except UserError as error:
        # The message begins with "config.json", without a directory.
        raise UserError(f"{hf_dir}/{error}") from error
    with ExitStack() as stack:
        checkpoint = Source(hf_dir, stack)
        check_names(checkpoint.file_of, table, hf_dir)
        for name, shape in table.expected_tensors().items():
            checkpoint.slice(name, shape)


def _check_whole_layers(params: Mapping[str, Tensor], table: ParamTable, experts: Sequence[int]) -> None:
    """Raise UserError if a layer lacks a parameter that a layer spec may have left out."""
    for index in sorted({int(name.split(".")[2]) for name in params if name.startswith("decoder.layers.")}):
        for wanted in table.layer_names(index, experts):
            if wanted not in params:
                parts = ", ".join(table.rule(wanted).parts)
                raise UserError(
                    f"the Megatron model has no parameter {wanted} to take {parts}: its layer spec does not"
                    " fit this config.json"
                )


@torch.no_grad()
def load_hf(
    params: Mapping[str, Tensor],
    hf_dir: str | os.PathLike[str],
    *,
    tp_rank: int,
    tp_size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> None:
    """Fill the local parameters, under global names (global_params), in place. No communication.

    Only the slices of this rank are read. Values are cast to the dtype of the parameter. Padded
    vocabulary rows (embedding and output layer) become zeros; the loss masks their logits. All names
    and shapes are checked before the first copy. UserError names a tensor that is missing, left over
    or of another shape.
    """
    hf_dir = Path(hf_dir)
    hf = read_hf_config(hf_dir)
    table = registry.param_table(hf)
    if table.num_experts % ep_size:
        raise UserError(
            f"{table.num_experts} experts do not divide over actor.expert_model_parallel_size={ep_size}"
        )
    local_experts = table.num_experts // ep_size
    _check_whole_layers(params, table, range(ep_rank * local_experts, (ep_rank + 1) * local_experts))
    with ExitStack() as stack:
        source = Source(hf_dir, stack)
        check_names(source.file_of, table, hf_dir)
        plan = []
        for name, param in params.items():
            rule, shape = table.rule(name), tuple(param.shape)
            layout = rule.shard(shape, *((tp_rank, tp_size) if rule.is_cut(shape, ep_size) else (0, 1)))
            plan.append(
                (param, rule, layout, [source.slice(part, shape) for part, shape in rule.parts.items()])
            )
        for param, rule, layout, sources in plan:
            # A slice of a TransformerEngine fp8 parameter is a dequantised copy: it takes values
            # only as a whole.
            shard = param
            if is_quantised(param):
                shard = torch.empty(layout.shape, dtype=param.dtype, device=param.device)
            if rule.layout is tp_layouts.vocab:
                # the last rows may be padding
                shard.zero_()
            for s in layout.segments:
                values = (
                    sources[s.part][s.start : s.start + s.length]
                    if s.dim == 0
                    else sources[s.part][:, s.start : s.start + s.length]
                )
                shard.narrow(s.dim, s.offset, s.length).copy_(values)
            if shard is not param:
                fill(param, shard)
