"""Hugging Face directories: read config.json and safetensors lazily, write weights and what belongs to them.

with ExitStack() as stack:
    source = Source(Path(hf_dir), stack)
    rows = source.slice("model.norm.weight", (4096,))[:16]              # reads 16 rows
write_weights(tensors, source_dir, out_dir)                             what an engine loads: weights + config.json
save_hf(tensors, source_dir, out_dir)                                   what a user loads: + tokenizer and the rest
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasd.types import UserError
from megasd.weights.mapping import Shape

SHARD_BYTES = 4 << 30  # of one safetensors file of save_hf
_FILE_DTYPES = {"F32", "BF16", "F16"}
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def read_hf_config(hf_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a directory; UserError when it is missing or not JSON."""
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; model.path must be a Hugging Face directory") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


class Source:
    """The safetensors files of a directory, one or many, opened when first read. Close with the ExitStack given."""

    def __init__(self, hf_dir: Path, stack: ExitStack) -> None:
        self.dir, self.stack, self.files = hf_dir, stack, {}
        index, single = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
        if single.is_file():
            self.file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        elif index.is_file():
            try:
                self.file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index}: not a safetensors index ({error!r}); fetch the directory again") from error
            for name in set(self.file_of.values()):
                if Path(name).name != name:
                    raise UserError(f"{index}: file {name!r} lies outside the directory")
                if not (hf_dir / name).is_file():
                    raise UserError(f"{hf_dir / name}: missing, though {index.name} names it; fetch the directory again")
        else:
            raise UserError(f"{hf_dir}: neither model.safetensors nor model.safetensors.index.json; convert the weights to safetensors")

    def _open(self, name: str) -> Any:
        if name not in self.files:
            try:
                self.files[name] = self.stack.enter_context(safe_open(self.dir / name, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.dir / name}: not a whole safetensors file ({error}); fetch it again") from error
        return self.files[name]

    def slice(self, name: str, shape: Shape) -> Any:
        """A lazily read tensor; UserError unless it is there, floating point and of this shape."""
        path = self.dir / self.file_of[name]
        try:
            found = self._open(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path}: no tensor {name}, though the index says so; fetch it again") from error
        if tuple(found.get_shape()) != tuple(shape):
            raise UserError(
                f"{path}: {name} has shape {tuple(found.get_shape())}, config.json asks for {tuple(shape)}; is config.json its own?"
            )
        if found.get_dtype() not in _FILE_DTYPES:
            raise UserError(f"{path}: {name} is {found.get_dtype()}; take the float checkpoint (bfloat16, float16 or float32)")
        return found


# ---- writing ----


def write_config(source_dir: Path, out_dir: Path, dtype: torch.dtype) -> None:
    """source_dir's config.json with the dtype of the weights that go beside it."""
    config = read_hf_config(source_dir)
    name = str(dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = name
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> int:
    """Write model.safetensors and config.json into out_dir, each renamed when whole; returns the bytes of the tensors."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(Path(source_dir), out_dir, next(iter(tensors.values())).dtype)
    partial_file = out_dir / "model.safetensors.tmp"
    save_file(dict(tensors), partial_file, metadata={"format": "pt"})
    partial_file.replace(out_dir / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def save_hf(tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """A Hugging Face directory: weights (files of about 4 GiB and an index when larger), config.json, generation config, tokenizer.

    Written to `<out_dir>.tmp` and renamed when whole; an out_dir that is there is replaced. The rest is copied from source_dir.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    beside, old = out_dir.with_name(out_dir.name + ".tmp"), out_dir.with_name(out_dir.name + ".old")
    for stale in (beside, old):
        if stale.exists():
            shutil.rmtree(stale)
    beside.mkdir(parents=True)
    write_config(source_dir, beside, next(iter(tensors.values())).dtype)
    for pattern in _COPIED:
        for path in source_dir.glob(pattern):
            shutil.copyfile(path, beside / path.name) if path.is_file() else shutil.copytree(path, beside / path.name)
    _save_sharded(tensors, beside)
    if out_dir.exists():
        out_dir.rename(old)
    beside.rename(out_dir)
    if old.exists():
        shutil.rmtree(old)


def _save_sharded(tensors: Mapping[str, Tensor], out_dir: Path) -> None:
    files: list[dict[str, Tensor]] = [{}]
    sizes: dict[int, int] = defaultdict(int)
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if files[-1] and sizes[len(files) - 1] + nbytes > SHARD_BYTES:
            files.append({})
        files[-1][name] = tensor
        sizes[len(files) - 1] += nbytes
    if len(files) == 1:
        save_file(files[0], out_dir / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, part in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, out_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
