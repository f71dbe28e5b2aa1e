"""Hugging Face -> Megatron (torch_dist), a block of rows at a time, without building a model.

    to_megatron(Path("Qwen3-8B"), Path("qwen3-8b-megatron"), ConversionOptions())

All names, shapes, dtypes and the free disk are checked before the first byte is written. Writing is
resumable (resumable_dir.py).
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megasd.convert import torch_dist_keys
from megasd.convert.common import (
    ConversionOptions,
    ConversionProgress,
    ConversionResult,
    cast_checked,
    dtype_names,
    hf_rows,
    parameter_rows,
    parts_of,
    row_blocks,
    same_bytes,
    say_resumed,
    source_fingerprint,
    write_facts,
)
from megasd.convert.hf_source import PickleShards, open_source
from megasd.convert.megatron_source import open_checkpoint
from megasd.convert.resumable_dir import ResumableDir, Sink
from megasd.convert.torch_dist_write import Item, no_extra_state, write_chunk, write_metadata
from megasd.models import registry
from megasd.models.param_table import ParamTable
from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.hf_files import copy_side_files, read_hf_config, write_hf_config
from megasd.weights.safetensors_io import RawShards

# size of a chunk of the checkpoint, which is what a conversion holds in memory
CHUNK_BYTES = 64 << 20
Tensors = dict[str, tuple[torch.dtype, Shape]]


class PlannedChunk(NamedTuple):
    """Rows [start, stop) of a parameter, which become one chunk of a file."""

    name: str
    start: int
    stop: int
    nbytes: int


def to_megatron(
    hf_dir: Path, out_dir: Path, options: ConversionOptions, progress: ConversionProgress | None = None
) -> ConversionResult:
    """Write a torch_dist directory from a Hugging Face directory.

    megatron.core.dist_checkpointing.load fills a GPTModel of any TP, PP, EP and VPP from it.
    `<out_dir>/hf` holds config.json and the tokenizer, for the way back. UserError: see the checks of
    open_source, ResumableDir and cast_checked.
    """
    progress = progress or ConversionProgress()
    hf = read_hf_config(hf_dir)
    with ExitStack() as stack:
        source = open_source(hf_dir, stack, allow_pickle=options.allow_pickle)
        table = registry.param_table(hf)
        tensors = _global_tensors(table, source, options.dtype, hf_dir)
        files = _plan_files(table, tensors, options.file_bytes)
        sizes = {name: sum(chunk.nbytes for chunk in chunks) for name, chunks in files.items()}
        job = {
            "to": "megatron",
            "dtype": str(options.dtype),
            "file_bytes": options.file_bytes,
            "source": source_fingerprint(hf_dir),
        }
        progress.start(f"{hf_dir} -> {out_dir}", sum(sizes.values()))
        with ResumableDir(out_dir, job, sizes, overwrite=options.overwrite, advance=progress.advance) as work:
            resumed = say_resumed(work, progress)
            for file in work.left:
                with work.file(file) as sink:
                    sink.record["items"] = [
                        _write_planned(sink, chunk, source, table, tensors, options) for chunk in files[file]
                    ]
            parameters = sum(prod(shape) for _, shape in tensors.values())
            _finish_megatron(work, hf_dir, table, tensors, options, parameters)
            if options.check:
                _check_megatron(work.partial, hf_dir, source, table, tensors, progress)
            nbytes = sum(record["bytes"] for record in work.records.values())
            work.publish()
    return ConversionResult(out_dir, hf_dir, parameters, nbytes, len(files), resumed)


def _write_planned(
    sink: Sink,
    planned: PlannedChunk,
    source: RawShards | PickleShards,
    table: ParamTable,
    tensors: Tensors,
    options: ConversionOptions,
) -> Item:
    """Write one chunk. Returns where it lies."""
    slot, rule = torch_dist_keys.slot(planned.name, table), table.rule(planned.name)
    dtype, shape = tensors[slot.key]

    def read(values: Tensor, part: str) -> Tensor:
        where = source.directory / source.file_of[part]
        return cast_checked(values, dtype, part, where, options.allow_nonfinite)

    chunk = parameter_rows(source, rule, planned.start, planned.stop, read)
    depth = len(slot.stack)
    chunk = chunk.view((1,) * depth + tuple(chunk.shape))
    begin = sink.nbytes
    write_chunk(chunk, sink)
    offsets = (*slot.prefix, planned.start, *(0,) * (len(shape) - depth - 1))
    return Item(slot.key, offsets, tuple(chunk.shape), begin, sink.nbytes - begin)


def _global_tensors(
    table: ParamTable, source: RawShards | PickleShards, dtype: torch.dtype | None, where: Path
) -> Tensors:
    """dtype and shape of every tensor of the checkpoint; UserError: one tensor would have two dtypes."""
    tensors: Tensors = {}
    for name in torch_dist_keys.names(table):
        slot, rule = torch_dist_keys.slot(name, table), table.rule(name)
        for part in rule.parts:
            found = dtype or source.places[part].dtype
            known, _ = tensors.setdefault(slot.key, (found, (*slot.stack, *torch_dist_keys.shape_of(rule))))
            if found != known:
                raise UserError(
                    f"{where}: {part} is {found}, other parts of {slot.key} are {known}; give one --dtype"
                    " for all"
                )
    return tensors


def _plan_files(table: ParamTable, tensors: Tensors, file_bytes: int) -> dict[str, list[PlannedChunk]]:
    """File -> chunks, in the order of the model."""
    files: list[list[PlannedChunk]] = [[]]
    size = 0
    for name in torch_dist_keys.names(table):
        slot = torch_dist_keys.slot(name, table)
        dtype, shape = tensors[slot.key]
        rows, row_bytes = shape[len(slot.stack)], prod(shape[len(slot.stack) + 1 :]) * dtype.itemsize
        for start, stop in row_blocks(rows, row_bytes, CHUNK_BYTES):
            nbytes = (stop - start) * row_bytes
            if files[-1] and size + nbytes > file_bytes:
                files.append([])
                size = 0
            files[-1].append(PlannedChunk(name, start, stop, nbytes))
            size += nbytes
    return {f"__0_{number}.distcp": chunks for number, chunks in enumerate(files)}


def _finish_megatron(
    work: ResumableDir,
    hf_dir: Path,
    table: ParamTable,
    tensors: Tensors,
    options: ConversionOptions,
    parameters: int,
) -> None:
    """Write all but the chunks: extra states, .metadata, config and tokenizer, conversion.json."""
    items = {file: [Item(*map(_tupled, item)) for item in work.records[file]["items"]] for file in work.sizes}
    tensors = dict(tensors)
    # The norm before experts is stored once, under two keys.
    if table.num_experts:
        for key, alias in torch_dist_keys.ALIASES.items():
            tensors[alias] = tensors[key]
            for chunks in items.values():
                chunks += [item._replace(key=alias) for item in chunks if item.key == key]
    # All modules share the bytes of one empty extra state.
    state = no_extra_state()
    states = f"__0_{len(work.sizes)}.distcp"
    (work.partial / states).write_bytes(state)
    objects = {}
    for key, stack in torch_dist_keys.modules_with_state(table).items():
        for offset in product(*(range(n) for n in stack)):
            unique = f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, stack))}"
            objects[unique] = Item(unique, (), (), 0, len(state))
    write_metadata(work.partial, tensors, items, objects, states)
    _copy_hf(hf_dir, work.partial / "hf", options.dtype)
    write_facts(
        work,
        {
            "direction": "Hugging Face to Megatron",
            "source": str(hf_dir),
            "dtype": dtype_names(tensors),
            "parameters": parameters,
        },
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _copy_hf(hf_dir: Path, out_dir: Path, dtype: torch.dtype | None) -> None:
    out_dir.mkdir(exist_ok=True)
    # A stopped conversion may have left files.
    for path in out_dir.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    if dtype is None:
        (out_dir / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
    else:
        write_hf_config(hf_dir, out_dir, dtype)
    copy_side_files(hf_dir, out_dir)


def _check_megatron(
    partial: Path,
    hf_dir: Path,
    source: RawShards | PickleShards,
    table: ParamTable,
    tensors: Tensors,
    progress: ConversionProgress,
) -> None:
    """Read the directory back as Hugging Face tensors and compare every byte with the source.

    UserError names the first tensor that differs.
    """
    with ExitStack() as stack:
        written = open_checkpoint(partial, hf_dir, stack)
        progress.start("check", sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values()))
        for name in torch_dist_keys.names(table):
            for part, rows in parts_of(table.rule(name)).items():
                for start, values in hf_rows(written, name, rows):
                    wanted = source.read(part, start, start + len(values)).to(values.dtype)
                    if not same_bytes(values, wanted):
                        raise UserError(
                            f"{partial}: {part} does not come back as it is in {hf_dir}; the target was not"
                            " made, run again"
                        )
                    progress.advance(values.nbytes)
    progress.say("check: every value comes back from the Megatron directory bit for bit")
