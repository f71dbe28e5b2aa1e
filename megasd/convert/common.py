"""Parts of a conversion in either direction: options, progress, blocks of rows, conversion.json.

A conversion never builds a model: hf_to_megatron.py and megatron_to_hf.py move blocks of rows from
one directory to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasd import __version__
from megasd.convert import torch_dist_keys
from megasd.convert.hf_source import PickleShards
from megasd.convert.megatron_source import MegatronSource
from megasd.convert.resumable_dir import ResumableDir
from megasd.convert.torch_dist_keys import Rows
from megasd.models.param_table import ParamRule
from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.safetensors_io import RawShards, as_bytes

# how much is read and written at once towards Hugging Face
BLOCK_BYTES = 16 << 20
FILE_BYTES = 2 << 30
FACTS = "conversion.json"


@dataclass(frozen=True)
class ConversionOptions:
    """The options of `megasd convert`."""

    # dtype of the target; None: the dtype of the source
    dtype: torch.dtype | None = None
    # about how large a file of the target is
    file_bytes: int = FILE_BYTES
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_pickle: bool = False
    # compare every value with the source before the target appears
    check: bool = False
    # convert the moving average of the teacher, which the checkpoint of a run may hold
    teacher: bool = False
    # directory of config.json and tokenizer; None: the checkpoint says where they are
    hf: Path | None = None


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion wrote."""

    out_dir: Path
    # the Hugging Face directory: the source or the target
    hf_dir: Path
    parameters: int
    nbytes: int
    files: int
    # files that an earlier, stopped conversion had written
    resumed_files: int


class ConversionProgress:
    """Hears how far a conversion is. This class ignores it; the command line draws it."""

    def start(self, what: str, total_bytes: int) -> None:
        """A part of the work begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""

    def say(self, line: str) -> None:
        """A line for the user."""


def cast_checked(
    values: Tensor, dtype: torch.dtype, name: str, where: object, allow_nonfinite: bool
) -> Tensor:
    """The values in another dtype.

    UserError, naming the tensor: it holds NaN or infinity, or has values too large for the dtype.
    """
    cast = values.to(dtype)
    if not allow_nonfinite and cast.numel():
        low, high = (float(v) for v in torch.aminmax(cast))
        # NaN fails both
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            if torch.isfinite(values).all():
                raise UserError(
                    f"{where}: {name} has values too large for {dtype}; take --dtype bfloat16 or float32"
                )
            raise UserError(
                f"{where}: {name} holds NaN or infinity; take another checkpoint, or give --allow-nonfinite"
            )
    return cast


def row_blocks(rows: int, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of at most `limit` bytes; one row at least."""
    step = max(1, limit // row_bytes)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two CPU tensors agree in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def parameter_rows(
    source: RawShards | PickleShards,
    rule: ParamRule,
    start: int,
    stop: int,
    read: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """Rows [start, stop) of a whole Megatron parameter, put together from Hugging Face tensors.

    `read(values, name)` casts and checks the rows of one tensor.
    """
    pieces = []
    for part, first, length, offset in torch_dist_keys.rows_of(rule):
        low, high = max(start, offset), min(stop, offset + length)
        if low < high:
            pieces.append(read(source.read(part, first + low - offset, first + high - offset), part))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def parts_of(rule: ParamRule) -> dict[str, list[Rows]]:
    """Hugging Face tensor -> where its rows lie in the parameter, in the order of the tensor."""
    found: dict[str, list[Rows]] = {part: [] for part in rule.parts}
    for rows in torch_dist_keys.rows_of(rule):
        found[rows.part].append(rows)
    return {part: sorted(rows, key=lambda r: r.start) for part, rows in found.items()}


def hf_rows(checkpoint: MegatronSource, name: str, rows: list[Rows]) -> Iterator[tuple[int, Tensor]]:
    """(first row, values) of one Hugging Face tensor, block by block.

    `rows`: where the tensor lies in the parameter `name` of the checkpoint.
    """
    row_bytes = max(1, checkpoint.row_bytes(name))
    for _, first, length, offset in rows:
        for start, stop in row_blocks(length, row_bytes, BLOCK_BYTES):
            yield first + start, checkpoint.read(name, offset + start, offset + stop)


def source_fingerprint(directory: Path) -> dict[str, list[int]]:
    """Names, sizes and times of the files of a directory: they change when the weights change."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and (
            path.suffix in (".safetensors", ".bin", ".json", ".distcp") or path.name == ".metadata"
        ):
            stat = path.stat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns]
    return found


def dtype_names(tensors: dict[str, tuple[torch.dtype, Shape]]) -> str:
    """The dtypes of these tensors, such as "bfloat16, float32"."""
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype, _ in tensors.values()}))


def say_resumed(work: ResumableDir, progress: ConversionProgress) -> int:
    """Number of files that a stopped conversion left; told to the user when there are any."""
    done = len(work.sizes) - len(work.left)
    if done:
        progress.say(f"going on from {work.partial}: {done} of {len(work.sizes)} files are whole")
    return done


def write_facts(work: ResumableDir, facts: dict[str, Any]) -> None:
    """Write conversion.json: the facts, this version, and bytes and CRC-32 of every weight file."""
    files = {name: {key: record[key] for key in ("bytes", "crc32")} for name, record in work.records.items()}
    known = {key: value for key, value in facts.items() if value is not None}
    (work.partial / FACTS).write_text(
        json.dumps({**known, "megasd": __version__, "files": dict(sorted(files.items()))}, indent=2) + "\n"
    )
