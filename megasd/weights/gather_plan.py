"""The plan of a weight push: which rank sends which piece, and which tensors are in which bucket.

The plan is made once and carried out at every push.

    # what every rank holds (gather.py)
    holdings = exchange(mine, world_size)
    plan = make_gather_plan(table, holdings, bucket_bytes=256 << 20)
    # Entry(shape, dtype, offset) in the flat buffer of bucket 3
    plan.buckets[3].tensors["model.norm.weight"]

A bucket is consecutive Hugging Face tensors of the model, one after another without gaps. This is the
layout of a safetensors data section and of SGLang's flattened bucket. A parameter is never split over
buckets. Nothing here knows a process group or an engine: every rank makes the same plan from the same
holdings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.models.param_table import ParamTable
from megasd.models.tp_layouts import Layout, Shape
from megasd.types import UserError

# bytes: every dtype can be viewed at such an offset of a message
ALIGNMENT = 16


@dataclass(frozen=True)
class Holding:
    """What one rank has: its place, and its parameters under global names (global_params)."""

    # rank in the world
    rank: int
    tp_rank: int
    tp_size: int
    ep_size: int
    params: Mapping[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True)
class Entry:
    """A Hugging Face tensor in the flat buffer of a bucket.

    The tensor is `flat[offset : offset + nbytes].view(dtype).view(shape)`.
    """

    shape: Shape
    dtype: torch.dtype
    # bytes
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """One tensor-parallel part of a parameter, or the whole parameter if it is not cut."""

    layout: Layout
    # the rank that sends the piece: the first rank that holds a copy
    owner: int


@dataclass(frozen=True)
class Param:
    """A parameter in a bucket: its Hugging Face tensors and its pieces."""

    name: str
    parts: tuple[str, ...]
    # the dtype that travels; owners cast their pieces
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Bucket:
    """Consecutive parameters of the model, and their Hugging Face tensors in one flat buffer."""

    index: int
    params: tuple[Param, ...]
    tensors: Mapping[str, Entry]
    nbytes: int

    def only(self, names: frozenset[str]) -> Bucket:
        """This bucket with these parameters alone."""
        params = tuple(param for param in self.params if param.name in names)
        return _bucket(
            self.index, params, {part: self.tensors[part].shape for param in params for part in param.parts}
        )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors of a flat uint8 buffer, by name, without a copy."""
        return {
            n: flat[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape)
            for n, e in self.tensors.items()
        }


@dataclass(frozen=True)
class GatherPlan:
    """All buckets of a model, in order."""

    buckets: tuple[Bucket, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def max_bucket_bytes(self) -> int:
        """Bytes of the largest bucket."""
        return max(bucket.nbytes for bucket in self.buckets)

    def tensors(self) -> dict[str, Entry]:
        """Every Hugging Face tensor by name; offsets count from the begin of the bucket."""
        return {name: entry for bucket in self.buckets for name, entry in bucket.tensors.items()}


def make_gather_plan(
    table: ParamTable, holdings: Sequence[Holding], *, bucket_bytes: int, dtype: torch.dtype | None = None
) -> GatherPlan:
    """Divide the model into buckets of at most `bucket_bytes`, in order; a larger parameter is alone.

    `dtype`: what travels; None: the dtype of each parameter. The output layer of a tied model does not
    travel. UserError names a tensor that no rank holds, a parameter that the table does not know, or a
    parameter whose shape does not fit.
    """
    held: dict[str, list[Holding]] = {}
    for holding in holdings:
        for name in holding.params:
            held.setdefault(name, []).append(holding)
    shapes: dict[str, Shape] = {}
    params = []
    for name in table.names():
        owners = held.pop(name, [])
        if name == "output_layer.weight" and table.tied:
            continue
        rule = table.rule(name)
        if not owners:
            raise UserError(
                f"no rank holds {name}, of which {', '.join(rule.parts)} are made: does the model fit its"
                " config.json?"
            )
        shape, own_dtype = owners[0].params[name]
        size = owners[0].tp_size if rule.is_cut(shape, owners[0].ep_size) else 1
        pieces = []
        for part in range(size):
            ranks = [owner.rank for owner in owners if size == 1 or owner.tp_rank == part]
            if not ranks:
                raise UserError(f"no rank holds tensor-parallel part {part} of {name}")
            pieces.append(Piece(rule.shard(shape, part, size), min(ranks)))
        params.append(Param(name, tuple(rule.parts), dtype or own_dtype, tuple(pieces)))
        shapes.update(rule.parts)
    for name in held:
        # The table does not list these names: raises UserError if no rule fits.
        table.rule(name)
    return GatherPlan(
        tuple(_bucket(i, group, shapes) for i, group in enumerate(_groups(params, shapes, bucket_bytes)))
    )


def _nbytes(param: Param, shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shapes[part]) for part in param.parts) * param.dtype.itemsize


def _groups(
    params: Sequence[Param], shapes: Mapping[str, Shape], bucket_bytes: int
) -> Iterator[tuple[Param, ...]]:
    group: list[Param] = []
    total = 0
    for param in params:
        nbytes = _nbytes(param, shapes)
        if group and total + nbytes > bucket_bytes:
            yield tuple(group)
            group, total = [], 0
        group.append(param)
        total += nbytes
    if group:
        yield tuple(group)


def _bucket(index: int, params: tuple[Param, ...], shapes: Mapping[str, Shape]) -> Bucket:
    tensors: dict[str, Entry] = {}
    offset = 0
    for param in params:
        for part in param.parts:
            tensors[part] = entry = Entry(shapes[part], param.dtype, offset)
            offset += entry.nbytes
    return Bucket(index, params, tensors, offset)
