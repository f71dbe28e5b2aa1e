"""Writes and reads safetensors files block by block, without mapping them.

One block is in memory at a time. The names, dtypes and shapes of a checkpoint are known before the
first value, and so are the files, their headers and the offset of every tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megasd.models.tp_layouts import Shape
from megasd.types import UserError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
INDEX = "model.safetensors.index.json"


class TensorLocation(NamedTuple):
    """Where a tensor lies in its file."""

    # bytes from the begin of the file
    offset: int
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """One file: its header as bytes, and the place of each tensor, in the order of the file."""

    name: str
    header: bytes
    places: dict[str, TensorLocation]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(place.nbytes for place in self.places.values())


def plan_shards(tensors: Mapping[str, tuple[torch.dtype, Shape]], shard_bytes: int) -> list[ShardPlan]:
    """Divide tensors over files of about `shard_bytes`, in the given order; a larger tensor is alone.

    Within a file, wider dtypes come first.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * dtype.itemsize
        if parts[-1] and size + nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += nbytes
    plans = []
    for number, names in enumerate(parts, start=1):
        # wider dtypes first, so that every tensor is aligned without gaps; otherwise in order
        names.sort(key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, offsets = 0, {}
        for name in names:
            dtype, shape = tensors[name]
            offsets[name], end = offset, offset + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        places = {name: TensorLocation(start + offsets[name], *tensors[name]) for name in names}
        file = (
            "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        plans.append(ShardPlan(file, struct.pack("<Q", len(text)) + text, places))
    return plans


def index_of(plans: list[ShardPlan]) -> str | None:
    """The text of model.safetensors.index.json; None for a single file, which needs no index."""
    if len(plans) == 1:
        return None
    total = sum(place.nbytes for plan in plans for place in plan.places.values())
    weight_map = {name: plan.name for plan in plans for name in plan.places}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset of an open file; one system call may write only a part."""
    while len(data):
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def read_at(file: int, out: Tensor, offset: int, where: str) -> None:
    """Fill a contiguous CPU tensor from an offset of an open file.

    UserError, which begins with `where`: the file ends too early.
    """
    data = as_bytes(out)
    while len(data):
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise UserError(f"{where}: the file ends {len(data)} bytes too early; fetch it again")
        data, offset = data[count:], offset + count


class RawShards:
    """The tensors of safetensors files, by plain reads.

    Unlike pages of mapped files, the bytes that were read do not count as memory of this process.
    """

    def __init__(self, directory: Path, files: set[str], stack: ExitStack) -> None:
        """Open the files and read their headers. UserError: not a whole safetensors file."""
        self.places: dict[str, TensorLocation] = {}
        self.file_of: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self.directory = directory
        for name in sorted(files):
            path = directory / name
            try:
                file = self._open[name] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, file)
                (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
                header = json.loads(os.pread(file, min(length, path.stat().st_size), 8))
                header.pop("__metadata__", None)
                ends = [entry["data_offsets"][1] for entry in header.values()]
                if path.stat().st_size != 8 + length + max(ends, default=0):
                    raise ValueError(
                        f"{path.stat().st_size} bytes where its header promises"
                        f" {8 + length + max(ends, default=0)}"
                    )
            except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
            for tensor, entry in header.items():
                if tensor in self.file_of:
                    raise UserError(
                        f"{path}: tensor {tensor} is also in {self.file_of[tensor]}; remove the file that is"
                        " not of this checkpoint"
                    )
                self.file_of[tensor] = name
                if entry["dtype"] in DTYPES:
                    self.places[tensor] = TensorLocation(
                        8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"])
                    )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in the dtype of the file."""
        place = self.places[name]
        out = torch.empty((stop - start, *place.shape[1:]), dtype=place.dtype)
        file = self.file_of[name]
        read_at(self._open[file], out, place.offset + start * place.row_bytes, str(self.directory / file))
        return out
