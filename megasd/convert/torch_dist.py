"""Megatron's `torch_dist` checkpoints (torch.distributed.checkpoint): read without trusting them,
written without a model.

    with ExitStack() as stack:
        checkpoint = TorchDist(Path("runs/x/checkpoints/step-100"), stack)
        # layer 3, rows 0..63
        checkpoint.read("decoder.layers.mlp.linear_fc2.weight", prefix=(3,), start=0, stop=64)

A directory has `.metadata` (a pickle: which chunk of which global tensor lies where),
`__<n>_<m>.distcp` files (chunks, each a torch.save archive), `common.pt` and `metadata.json`.
Trust: unpickling runs code. The two kinds of pickle that are read here, `.metadata` and the
`data.pkl` of a chunk, are read by unpicklers that know the few names of this format, make inert
records of them and refuse everything else by name; values are read as plain bytes at their offsets.
`common.pt` is not opened.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.safetensors_io import read_at

METADATA, CONFIG = ".metadata", "metadata.json"
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_FORMAT = "torch.distributed.checkpoint."
# classes that become records
_KNOWN = {
    (_FORMAT + "metadata", "BytesStorageMetadata"),
    (_FORMAT + "metadata", "ChunkStorageMetadata"),
    (_FORMAT + "metadata", "Metadata"),
    (_FORMAT + "metadata", "MetadataIndex"),
    (_FORMAT + "metadata", "StorageMeta"),
    (_FORMAT + "metadata", "TensorProperties"),
    (_FORMAT + "metadata", "TensorStorageMetadata"),
    (_FORMAT + "metadata", "_MEM_FORMAT_ENCODING"),
    (_FORMAT + "filesystem", "_StorageInfo"),
    (_FORMAT + "planner", "SavePlan"),
    (_FORMAT + "planner", "TensorWriteData"),
    (_FORMAT + "planner", "WriteItem"),
    (_FORMAT + "planner", "WriteItemType"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"),
}


class _Record:
    """An unpickled object of a known class: its arguments and its state, and nothing that could run."""

    # of an object pickled without one
    state: Any = MappingProxyType({})

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            # fresh, so that no pickle can change a class for another
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(sizes)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise UserError(
            f"{self.path}: holds {module}.{name}, which no checkpoint needs; it was refused, do not load this"
            " directory elsewhere"
        )


class _ChunkUnpickler(pickle.Unpickler):
    """data.pkl of torch.save(tensor): gives (dtype, storage key, first element, shape, strides)."""

    def __init__(self, file: io.BufferedIOBase, where: str) -> None:
        super().__init__(file)
        self.where = where

    def persistent_load(self, saved: Any) -> Any:
        kind, storage, key, _, _ = saved
        return kind, storage, key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (
                storage[1],
                storage[2],
                offset,
                shape,
                strides,
            )
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise UserError(
            f"{self.where}: holds {module}.{name}, which is no plain tensor of float32, bfloat16 or float16"
        )


class _View(io.RawIOBase):
    """A part of an open file as a file of its own; opens zip archives inside a .distcp file."""

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
    """A box of a global tensor and the archive that holds it."""

    offsets: Shape
    sizes: Shape
    file: str
    # bytes
    start: int
    length: int


@dataclass
class GlobalTensor:
    dtype: torch.dtype
    shape: Shape
    chunks: list[Chunk]
    # of those that a layer (and expert) has
    by_prefix: dict[Shape, list[Chunk]] | None = None


class TorchDist:
    """The tensors of a checkpoint directory by key. Files are opened when first read and closed
    with the ExitStack given.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """UserError when the directory is no whole torch_dist checkpoint, or its metadata holds
        what the format does not know.
        """
        self.directory, self.stack = directory, stack
        self.tensors: dict[str, GlobalTensor] = {}
        self.objects: set[str] = set()
        self._open: dict[str, int] = {}
        # chunk -> offset of its values
        self._data: dict[tuple[str, int], int] = {}
        backend = _json(directory / CONFIG).get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(
                f"{directory / CONFIG}: sharded_backend {backend!r} is not supported; save the checkpoint as"
                " torch_dist"
            )
        self._read_metadata(directory / METADATA)
        self._check_files()

    def _read_metadata(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file, path).load()
            stored: dict[tuple[str, Shape | None], tuple[str, int, int]] = {}
            for index, info in metadata.state["storage_data"].items():
                if info.state.get("transform_descriptors"):
                    raise ValueError(
                        f"{index.state['fqn']} is stored through {info.state['transform_descriptors']}"
                    )
                place = info.state["relative_path"], int(info.state["offset"]), int(info.state["length"])
                stored[index.state["fqn"], index.state.get("offset")] = place
            for key, found in metadata.state["state_dict_metadata"].items():
                if "chunks" not in found.state:
                    self.objects.add(key)
                    continue
                boxes = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in found.state["chunks"]]
                chunks = [Chunk(offsets, sizes, *stored[key, offsets]) for offsets, sizes in boxes]
                self.tensors[key] = GlobalTensor(
                    found.state["properties"].state[0], found.state["size"], chunks
                )
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; give the directory of a whole Megatron checkpoint"
            ) from error
        except UserError:
            raise
        except Exception as error:
            # whatever a damaged pickle makes of itself
            raise UserError(
                f"{path}: not the metadata of a torch_dist checkpoint ({error!r}); copy the directory again"
            ) from error

    def _check_files(self) -> None:
        """Every file is there and as long as the metadata says."""
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
        """Byte offset, in its file, of a chunk's first value. UserError unless it is one contiguous
        tensor of the metadata's dtype.
        """
        if (chunk.file, chunk.start) not in self._data:
            where = f"{self.directory / chunk.file}: {key} at {chunk.offsets}"
            view = io.BufferedReader(_View(self._file(chunk.file), chunk.start, chunk.length))
            try:
                with zipfile.ZipFile(view) as archive:
                    (root,) = {name.partition("/")[0] for name in archive.namelist()}
                    with archive.open(f"{root}/data.pkl") as file:
                        dtype, storage, first, shape, strides = _ChunkUnpickler(file, where).load()
                    info = archive.getinfo(f"{root}/data/{storage}")
                    order = f"{root}/byteorder"
                    if order in archive.namelist() and archive.read(order) != b"little":
                        raise ValueError("big-endian values")
                # of the local header: lengths of name and extra field, which precede the values
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
                # zipfile and pickle raise anything on damaged bytes
                raise UserError(f"{where} is damaged ({error!r}); copy the directory again") from error
            wanted = self.tensors[key].dtype
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
            if (
                first + prod(shape)
            ) * dtype.itemsize > info.file_size or offset + info.file_size > chunk.length:
                raise UserError(
                    f"{where} has fewer values than its shape {tuple(shape)}; copy the directory again"
                )
            self._data[chunk.file, chunk.start] = chunk.start + offset + first * dtype.itemsize
        return self._data[chunk.file, chunk.start]

    def read(self, key: str, prefix: Shape, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor at `prefix` (layer, expert) of a global tensor `[*prefix
        dims, rows, ...]`, in its own dtype.

        UserError when the chunks do not cover them, or cover them twice.
        """
        tensor, depth = self.tensors[key], len(prefix)
        if tensor.by_prefix is None:
            tensor.by_prefix = {}
            for chunk in tensor.chunks:
                ranges = (
                    range(low, low + size)
                    for low, size in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                )
                for index in product(*ranges):
                    tensor.by_prefix.setdefault(index, []).append(chunk)
        out = torch.empty((stop - start, *tensor.shape[depth + 1 :]), dtype=tensor.dtype)
        covered = 0
        for chunk in tensor.by_prefix.get(tuple(prefix), []):
            first, last = (
                max(start, chunk.offsets[depth]),
                min(stop, chunk.offsets[depth] + chunk.sizes[depth]),
            )
            if first >= last:
                continue
            row = prod(chunk.sizes[depth + 1 :])
            # of the prefix, in tensors
            position = 0
            for index, low, size in zip(prefix, chunk.offsets, chunk.sizes, strict=False):
                position = position * size + index - low
            element = (position * chunk.sizes[depth] + first - chunk.offsets[depth]) * row
            target = out[first - start : last - start]
            for dim, (offset, size) in enumerate(
                zip(chunk.offsets[depth + 1 :], chunk.sizes[depth + 1 :], strict=True), start=1
            ):
                target = target.narrow(dim, offset, size)
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


# ---- writing ----


class Item(NamedTuple):
    """One chunk as it was written: key, box, place; of a sharded object, its bytes (no box)."""

    key: str
    offsets: Shape
    sizes: Shape
    start: int
    length: int


def write_chunk(tensor: Tensor, stream: Any) -> None:
    """One chunk, as torch.distributed.checkpoint writes it. `tensor`: contiguous, on the CPU, of
    exactly its storage.
    """
    torch.save(tensor, stream)


def no_extra_state() -> bytes:
    """What a module without extra state saves: Megatron keeps a list of one None under the key
    `<module>._extra_state/shard_...`.
    """
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def write_metadata(
    directory: Path,
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    items: Mapping[str, list[Item]],
    objects: Mapping[str, Item],
    file: str,
) -> None:
    """`.metadata`, common.pt and metadata.json. `items`: chunks by file name; `objects`: by their
    unique keys, all in `file`.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        for key, (dtype, shape) in tensors.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, chunks in items.items():
        for item in chunks:
            storage[MetadataIndex(item.key, item.offsets)] = _StorageInfo(name, item.start, item.length)
            state[item.key].chunks.append(
                ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            )
    for key, item in objects.items():
        state[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, item.start, item.length)
    torch.save({}, directory / "common.pt")
    (directory / CONFIG).write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    metadata = Metadata(state, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with (directory / METADATA).open("wb") as stream:
        pickle.dump(metadata, stream)
