"""What both directions of a conversion share: options, progress, checked blocks of rows, the facts
that are written down.

A conversion never builds a model: to_megatron.py and to_hf.py move blocks of rows from one
directory to another.
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

# read and written at once towards Hugging Face
BLOCK_BYTES = 16 << 20
FILE_BYTES = 2 << 30
FACTS = "conversion.json"


@dataclass(frozen=True)
class ConversionOptions:
    # of what is written; None = as it is
    dtype: torch.dtype | None = None
    file_bytes: int = FILE_BYTES
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_pickle: bool = False
    # compare every value with the source before the target appears
    check: bool = False
    # of a run's checkpoint: the teacher's average
    teacher: bool = False
    # config.json and tokenizer, where the checkpoint does not lead to them
    hf: Path | None = None


@dataclass(frozen=True)
class ConversionResult:
    out_dir: Path
    # the Hugging Face side: source, target, or where config.json came from
    hf_dir: Path
    parameters: int
    nbytes: int
    files: int
    resumed_files: int


class ConversionProgress:
    """What a conversion tells while it works; the command line draws it."""

    def start(self, what: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def say(self, line: str) -> None: ...


def cast_checked(
    values: Tensor, dtype: torch.dtype, name: str, where: object, allow_nonfinite: bool
) -> Tensor:
    """UserError naming the tensor when it holds, or becomes in this dtype, an infinity or NaN."""
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
    step = max(1, limit // row_bytes)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def parameter_rows(
    source: RawShards | PickleShards,
    rule: ParamRule,
    start: int,
    stop: int,
    read: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """Rows [start, stop) of a whole Megatron parameter, put together from Hugging Face tensors.
    `read(values, name)` casts and checks.
    """
    pieces = []
    for part, first, length, offset in torch_dist_keys.rows_of(rule):
        low, high = max(start, offset), min(stop, offset + length)
        if low < high:
            pieces.append(read(source.read(part, first + low - offset, first + high - offset), part))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def parts_of(rule: ParamRule) -> dict[str, list[Rows]]:
    """Hugging Face tensor -> where its rows lie in the parameter, in the tensor's order."""
    found: dict[str, list[Rows]] = {part: [] for part in rule.parts}
    for rows in torch_dist_keys.rows_of(rule):
        found[rows.part].append(rows)
    return {part: sorted(rows, key=lambda r: r.start) for part, rows in found.items()}


def hf_rows(checkpoint: MegatronSource, name: str, rows: list[Rows]) -> Iterator[tuple[int, Tensor]]:
    """(first row, values) of one Hugging Face tensor, block by block in its order, from the
    parameter `name` of a checkpoint.
    """
    row_bytes = max(1, checkpoint.row_bytes(name))
    for _, first, length, offset in rows:
        for start, stop in row_blocks(length, row_bytes, BLOCK_BYTES):
            yield first + start, checkpoint.read(name, offset + start, offset + stop)


def source_fingerprint(directory: Path) -> dict[str, list[int]]:
    """What a directory's weights are told apart by: names, sizes and times of its files."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and (
            path.suffix in (".safetensors", ".bin", ".json", ".distcp") or path.name == ".metadata"
        ):
            stat = path.stat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns]
    return found


def dtype_names(tensors: dict[str, tuple[torch.dtype, Shape]]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype, _ in tensors.values()}))


def say_resumed(work: ResumableDir, progress: ConversionProgress) -> int:
    done = len(work.sizes) - len(work.left)
    if done:
        progress.say(f"going on from {work.partial}: {done} of {len(work.sizes)} files are whole")
    return done


def write_facts(work: ResumableDir, facts: dict[str, Any]) -> None:
    """conversion.json: what was converted, by which version, and bytes and CRC-32 of every file of
    weights.
    """
    files = {name: {key: record[key] for key in ("bytes", "crc32")} for name, record in work.records.items()}
    known = {key: value for key, value in facts.items() if value is not None}
    (work.partial / FACTS).write_text(
        json.dumps({**known, "megasd": __version__, "files": dict(sorted(files.items()))}, indent=2) + "\n"
    )
