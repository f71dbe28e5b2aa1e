"""Reads and writes Hugging Face directories.

Reading is lazy:

    with ExitStack() as stack:
        source = Source(Path(hf_dir), stack)
        # reads 16 rows
        rows = source.slice("model.norm.weight", (4096,))[:16]

Three ways to write:

    # what an engine loads: weights and config.json
    write_weights(tensors, source_dir, out_dir)
    # what a user loads: also the tokenizer and the rest
    save_hf(tensors, source_dir, out_dir)
    # the same, with one tensor in memory at a time
    with HFWriter(out_dir, source_dir) as writer:
        writer.add(name, tensor)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasd.models import registry
from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.safetensors_io import (
    INDEX,
    TensorLocation,
    as_bytes,
    index_of,
    plan_shards,
    write_at,
)

# about how large one safetensors file of HFWriter is
SHARD_BYTES = 4 << 30
_FILE_DTYPES = {"F32", "BF16", "F16"}
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)


def read_hf_config(hf_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a directory. UserError: it is missing or not JSON."""
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; model.path must be a Hugging Face directory") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


class Source:
    """The safetensors files of a directory, one or many.

    Files are opened when they are first read, and closed with the ExitStack that is given. UserError:
    the directory has no safetensors, or an index that does not fit.
    """

    def __init__(self, hf_dir: Path, stack: ExitStack) -> None:
        self.dir, self.stack = hf_dir, stack
        # file name -> open file
        self.files: dict[str, Any] = {}
        index, single = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
        if single.is_file():
            self.file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        elif index.is_file():
            try:
                self.file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{index}: not a safetensors index ({error!r}); fetch the directory again"
                ) from error
            for name in set(self.file_of.values()):
                if Path(name).name != name:
                    raise UserError(f"{index}: file {name!r} lies outside the directory")
                if not (hf_dir / name).is_file():
                    raise UserError(
                        f"{hf_dir / name}: missing, though {index.name} names it; fetch the directory again"
                    )
        else:
            raise UserError(
                f"{hf_dir}: neither model.safetensors nor model.safetensors.index.json; convert the weights"
                " to safetensors"
            )

    def _open(self, name: str) -> Any:
        if name not in self.files:
            try:
                self.files[name] = self.stack.enter_context(
                    safe_open(self.dir / name, framework="pt", device="cpu")
                )
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.dir / name}: not a whole safetensors file ({error}); fetch it again"
                ) from error
        return self.files[name]

    def slice(self, name: str, shape: Shape) -> Any:
        """A tensor to slice, read lazily. UserError: no float tensor of this name and shape."""
        path = self.dir / self.file_of[name]
        try:
            found = self._open(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path}: no tensor {name}, though the index says so; fetch it again") from error
        if tuple(found.get_shape()) != tuple(shape):
            raise UserError(
                f"{path}: {name} has shape {tuple(found.get_shape())}, config.json asks for {tuple(shape)};"
                " is config.json its own?"
            )
        if found.get_dtype() not in _FILE_DTYPES:
            raise UserError(
                f"{path}: {name} is {found.get_dtype()}; take the float checkpoint (bfloat16, float16 or"
                " float32)"
            )
        return found


# ---- writing ----


def write_hf_config(source_dir: Path, out_dir: Path, dtype: torch.dtype) -> None:
    """Write the config.json of source_dir, with the dtype of the weights of out_dir."""
    config = read_hf_config(source_dir)
    name = str(dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = name
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(
    tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> int:
    """Write model.safetensors and config.json into out_dir. Returns the bytes of the tensors.

    model.safetensors gets its name when it is whole.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_hf_config(Path(source_dir), out_dir, next(iter(tensors.values())).dtype)
    partial_file = out_dir / "model.safetensors.tmp"
    save_file(dict(tensors), partial_file, metadata={"format": "pt"})
    partial_file.replace(out_dir / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def copy_side_files(source_dir: Path, out_dir: Path) -> None:
    """Copy what belongs to a model next to its weights: tokenizer, chat templates, generation config."""
    for pattern in _COPIED:
        for path in sorted(source_dir.glob(pattern)):
            (
                shutil.copyfile(path, out_dir / path.name)
                if path.is_file()
                else shutil.copytree(path, out_dir / path.name)
            )


def sync_directory(directory: Path) -> None:
    """Make renames and new files in this directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(finished: Path, out_dir: Path) -> None:
    """Rename a finished directory to out_dir; replaces an existing out_dir."""
    old = out_dir.with_name(out_dir.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if out_dir.exists():
        out_dir.rename(old)
    finished.rename(out_dir)
    sync_directory(out_dir.parent)
    if old.exists():
        shutil.rmtree(old)


class HFWriter:
    """Writes a Hugging Face directory tensor by tensor, in any order.

    The directory gets weights, config.json, generation config and tokenizer. All files go to
    `<out_dir>.tmp`, which is renamed when it is whole and replaces an existing out_dir. config.json of
    source_dir gives names and shapes, and every tensor must be added once. An error in the `with` block
    leaves out_dir as it was. No tensor is kept in memory. Files have about SHARD_BYTES; several files
    have an index.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        source_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: tensors are cast to it; None: all tensors must have the dtype of the first one."""
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        self.dtype, self._cast = dtype, dtype is not None
        self.expected = registry.param_table(read_hf_config(source_dir)).expected_tensors()
        self.unfinished = self.out_dir.with_name(self.out_dir.name + ".tmp")
        # tensor -> open file, and its place there; empty before the first tensor
        self._files: dict[str, int] = {}
        self._places: dict[str, TensorLocation] = {}
        self._stack = ExitStack()
        self._left = dict.fromkeys(self.expected)

    def __enter__(self) -> Self:
        with self._telling():
            if self.unfinished.exists():
                shutil.rmtree(self.unfinished)
            self.unfinished.mkdir(parents=True)
        return self

    def _begin(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        write_hf_config(self.source_dir, self.unfinished, dtype)
        copy_side_files(self.source_dir, self.unfinished)
        plans = plan_shards({name: (dtype, shape) for name, shape in self.expected.items()}, SHARD_BYTES)
        self._places = {name: place for plan in plans for name, place in plan.places.items()}
        for plan in plans:
            file = os.open(self.unfinished / plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._stack.callback(os.close, file)
            write_at(file, memoryview(plan.header), 0)
            os.truncate(file, plan.nbytes)
            self._files |= dict.fromkeys(plan.places, file)
        if (index := index_of(plans)) is not None:
            (self.unfinished / INDEX).write_text(index)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.unfinished}: {error.strerror}; make room for the export, {self.out_dir} is as it was"
            ) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        UserError: config.json has no such tensor, or the tensor comes a second time, or has another
        shape or dtype.
        """
        if name not in self._left:
            why = "was written before" if name in self.expected else "is not a tensor of this config.json"
            raise UserError(f"{self.out_dir}: {name} {why}")
        if not self._files:
            with self._telling():
                self._begin(self.dtype or tensor.dtype)
        place = self._places[name]
        if tuple(tensor.shape) != place.shape:
            raise UserError(
                f"{self.out_dir}: {name} has shape {tuple(tensor.shape)}, config.json asks for {place.shape}"
            )
        if tensor.dtype != place.dtype and not self._cast:
            raise UserError(
                f"{self.out_dir}: {name} is {tensor.dtype}, the tensors before it are {place.dtype}; give a"
                " dtype to write"
            )
        with self._telling():
            write_at(self._files[name], as_bytes(tensor.to("cpu", place.dtype).contiguous()), place.offset)
        del self._left[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stack:
                if kind is None and self._left:
                    raise UserError(
                        f"{self.out_dir}: {next(iter(self._left))} (of {len(self._left)} tensors) was never"
                        " written"
                    )
                if kind is None:
                    for file in set(self._files.values()):
                        os.fsync(file)
            if kind is None:
                sync_directory(self.unfinished)
                put_in_place(self.unfinished, self.out_dir)
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)


def save_hf(
    tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> None:
    """Write a Hugging Face directory of all tensors of the config.json of source_dir; see HFWriter."""
    with HFWriter(out_dir, source_dir) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
