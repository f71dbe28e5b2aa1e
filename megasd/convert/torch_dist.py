"""Reads Megatron's `torch_dist` checkpoints (torch.distributed.checkpoint) without trusting them.

    with ExitStack() as stack:
        checkpoint = TorchDist(Path("runs/x/checkpoints/step-100"), stack)
        # layer 3, rows 0..63
        checkpoint.read("decoder.layers.mlp.linear_fc2.weight", prefix=(3,), start=0, stop=64)

A directory has `.metadata` (a pickle: which chunk of which global tensor lies where),
`__<n>_<m>.distcp` files (chunks, each a torch.save archive), `common.pt` and `metadata.json`.

Unpickling can run code. Two kinds of pickle are read, `.metadata` and the `data.pkl` of a chunk, both
by the unpicklers of torch_dist_pickle.py, which make inert records. Values are read as plain bytes at
their offsets. `common.pt` is not opened. torch_dist_write.py writes such a directory.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megasd.convert.torch_dist_pickle import ChunkUnpickler, MetadataUnpickler
from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.safetensors_io import read_at

METADATA, CONFIG = ".metadata", "metadata.json"


class _View(io.RawIOBase):
    """A part of an open file as a file: opens zip archives inside a .distcp file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = os.pread(
            self.file, min(len(buffer), max(0, self.length - self.position)), self.start + self.position
        )
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Chunk(NamedTuple):
    """A box of a global tensor, and the archive that holds it: bytes [start, start + length) of `file`."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of the checkpoint, whole, and the chunks that it is stored in."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]


class TorchDist:
    """The tensors of a checkpoint directory, by key.

    Files are opened when they are first read, and closed with the ExitStack that is given.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """Read the metadata and check the files.

        UserError: the directory is no whole torch_dist checkpoint, or the metadata holds something
        that the format does not know.
        """
        self.directory, self.stack = directory, stack
        self._open: dict[str, int] = {}
        # (file, start of the chunk) -> offset of the values of the chunk in the file
        self._data: dict[tuple[str, int], int] = {}
        # (key, number of prefix dimensions) -> prefix -> chunks
        self._by_prefix: dict[tuple[str, int], dict[Shape, list[Chunk]]] = {}
        backend = _json(directory / CONFIG).get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(
                f"{directory / CONFIG}: sharded_backend {backend!r} is not supported; save the checkpoint as"
                " torch_dist"
            )
        self.tensors = _read_metadata(directory / METADATA)
        self._check_files()

    def _check_files(self) -> None:
        """Raise UserError unless every file is there and as long as the metadata says."""
        ends: dict[str, tuple[int, str]] = {}
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                if Path(chunk.file).name != chunk.file:
                    raise UserError(
                        f"{self.directory / METADATA}: file {chunk.file!r} of {key} lies outside the"
                        " directory"
                    )
                ends[chunk.file] = max(ends.get(chunk.file, (0, "")), (chunk.start + chunk.length, key))
        for name, (end, key) in ends.items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(
                    f"{path}: missing, though {METADATA} says that it holds {key}; copy the directory again"
                )
            if path.stat().st_size < end:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes where {key} ends at byte {end}; copy the directory"
                    " again"
                )

    def _file(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.directory / name, os.O_RDONLY)
            self.stack.callback(os.close, self._open[name])
        return self._open[name]

    def _values_at(self, key: str, chunk: Chunk) -> int:
        """Byte offset, in the file, of the first value of a chunk."""
        place = chunk.file, chunk.start
        if place not in self._data:
            where = f"{self.directory / chunk.file}: {key} at {chunk.offsets}"
            self._data[place] = _find_values(self._file(chunk.file), chunk, self.tensors[key].dtype, where)
        return self._data[place]

    def _chunks_at(self, key: str, prefix: Shape) -> list[Chunk]:
        """The chunks that hold a part of the tensor at `prefix`."""
        depth = len(prefix)
        if (key, depth) not in self._by_prefix:
            found: dict[Shape, list[Chunk]] = {}
            for chunk in self.tensors[key].chunks:
                ranges = (
                    range(low, low + size)
                    for low, size in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                )
                for index in product(*ranges):
                    found.setdefault(index, []).append(chunk)
            self._by_prefix[key, depth] = found
        return self._by_prefix[key, depth].get(tuple(prefix), [])

    def read(self, key: str, prefix: Shape, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the part at `prefix` (layer, expert) of a global tensor.

        The global tensor is `[*prefix dims, rows, ...]`; the result is `[stop - start, ...]`, in the
        dtype of the checkpoint. UserError: the chunks do not cover these rows, or cover them twice.
        """
        tensor, depth = self.tensors[key], len(prefix)
        out = torch.empty((stop - start, *tensor.shape[depth + 1 :]), dtype=tensor.dtype)
        covered = 0
        for chunk in self._chunks_at(key, prefix):
            first, last = (
                max(start, chunk.offsets[depth]),
                min(stop, chunk.offsets[depth] + chunk.sizes[depth]),
            )
            if first >= last:
                continue
            row = prod(chunk.sizes[depth + 1 :])
            # number of the prefix among the prefixes of the chunk
            number = 0
            for index, low, size in zip(prefix, chunk.offsets, chunk.sizes, strict=False):
                number = number * size + index - low
            element = (number * chunk.sizes[depth] + first - chunk.offsets[depth]) * row
            target = out[first - start : last - start]
            for dim, low, size in zip(
                range(1, len(target.shape)), chunk.offsets[depth + 1 :], chunk.sizes[depth + 1 :], strict=True
            ):
                target = target.narrow(dim, low, size)
            values = target if target.is_contiguous() else torch.empty(target.shape, dtype=tensor.dtype)
            byte = self._values_at(key, chunk) + element * tensor.dtype.itemsize
            read_at(self._file(chunk.file), values, byte, f"{self.directory / chunk.file} ({key})")
            if values is not target:
                target.copy_(values)
            covered += values.numel()
        if covered != out.numel():
            raise UserError(
                f"{self.directory}: the chunks of {key} hold {covered} of the {out.numel()} values of rows"
                f" {start} to {stop}{f' at {prefix}' if prefix else ''}; copy the directory again"
            )
        return out


def _read_metadata(path: Path) -> dict[str, GlobalTensor]:
    """The tensors that `.metadata` lists."""
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file, path).load()
        stored: dict[tuple[str, Shape | None], tuple[str, int, int]] = {}
        for index, info in metadata.state["storage_data"].items():
            if info.state.get("transform_descriptors"):
                raise ValueError(
                    f"{index.state['fqn']} is stored through {info.state['transform_descriptors']}"
                )
            place = info.state["relative_path"], int(info.state["offset"]), int(info.state["length"])
            stored[index.state["fqn"], index.state.get("offset")] = place
        tensors: dict[str, GlobalTensor] = {}
        for key, found in metadata.state["state_dict_metadata"].items():
            # an object (extra state of a module) has no chunks
            if "chunks" in found.state:
                boxes = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in found.state["chunks"]]
                chunks = tuple(Chunk(offsets, sizes, *stored[key, offsets]) for offsets, sizes in boxes)
                dtype = found.state["properties"].state[0]
                tensors[key] = GlobalTensor(dtype, found.state["size"], chunks)
        return tensors
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the directory of a whole Megatron checkpoint"
        ) from error
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle may raise anything.
        raise UserError(
            f"{path}: not the metadata of a torch_dist checkpoint ({error!r}); copy the directory again"
        ) from error


def _find_values(file: int, chunk: Chunk, wanted: torch.dtype, where: str) -> int:
    """Byte offset, in the file, of the first value of a chunk.

    UserError, which begins with `where`, unless the chunk is one contiguous tensor of dtype `wanted`.
    """
    view = io.BufferedReader(_View(file, chunk.start, chunk.length))
    try:
        with zipfile.ZipFile(view) as archive:
            (root,) = {name.partition("/")[0] for name in archive.namelist()}
            with archive.open(f"{root}/data.pkl") as pickled:
                dtype, storage, first, shape, strides = ChunkUnpickler(pickled, where).load()
            info = archive.getinfo(f"{root}/data/{storage}")
            order = f"{root}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("big-endian values")
        # The values follow the local header: 30 bytes, the name, and the extra field. The header
        # holds the lengths of both.
        view.seek(info.header_offset + 26)
        lengths = view.read(4)
        offset = (
            info.header_offset
            + 30
            + int.from_bytes(lengths[:2], "little")
            + int.from_bytes(lengths[2:], "little")
        )
    except UserError:
        raise
    except Exception as error:
        # zipfile and pickle may raise anything on damaged bytes
        raise UserError(f"{where} is damaged ({error!r}); copy the directory again") from error
    contiguous = all(
        size == 1 or stride == prod(shape[dim + 1 :])
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
    if (
        dtype != wanted
        or tuple(shape) != tuple(chunk.sizes)
        or not contiguous
        or info.compress_type != zipfile.ZIP_STORED
    ):
        raise UserError(
            f"{where} is {dtype} {tuple(shape)} with strides {strides}, the metadata says {wanted}"
            f" {chunk.sizes}"
        )
    if (first + prod(shape)) * dtype.itemsize > info.file_size or offset + info.file_size > chunk.length:
        raise UserError(f"{where} has fewer values than its shape {tuple(shape)}; copy the directory again")
    return chunk.start + offset + first * dtype.itemsize


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the directory of a whole Megatron checkpoint"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the directory again") from error
