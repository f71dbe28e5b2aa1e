"""Megatron (torch_dist) -> Hugging Face, a block of rows at a time, without building a model.

    to_hf(Path("runs/x/checkpoints/step-100"), Path("exported"), Options(dtype=torch.bfloat16))

All keys, shapes, dtypes and the free disk are checked before the first byte is written. Writing is
resumable (work.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch

from megasd import __version__
from megasd.convert import torch_dist_keys
from megasd.convert.common import (
    BLOCK_BYTES,
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
from megasd.convert.hf_source import open_source
from megasd.convert.megatron_source import MegatronSource, open_checkpoint
from megasd.convert.model_card import card
from megasd.convert.resumable_dir import ResumableDir
from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.hf_files import copy_side_files, write_hf_config
from megasd.weights.safetensors_io import DTYPE_NAMES, INDEX, as_bytes, index_of, plan_shards


def to_hf(
    checkpoint_dir: Path,
    out_dir: Path,
    options: ConversionOptions,
    progress: ConversionProgress | None = None,
) -> ConversionResult:
    """Write a Hugging Face directory from a torch_dist checkpoint: one that to_megatron made, or a run's."""
    progress = progress or ConversionProgress()
    with ExitStack() as stack:
        checkpoint = open_checkpoint(checkpoint_dir, options.hf, stack, teacher=options.teacher)
        table = checkpoint.table
        source = {
            part: (name, rows)
            for name in torch_dist_keys.names(table)
            for part, rows in parts_of(table.rule(name)).items()
        }
        shapes = {
            part: shape
            for name in torch_dist_keys.names(table)
            for part, shape in table.rule(name).parts.items()
        }
        planned = {
            part: (options.dtype or checkpoint.dtype(name), shapes[part])
            for part, (name, _) in source.items()
        }
        for part, (dtype, _) in planned.items():
            if dtype not in DTYPE_NAMES:
                raise UserError(
                    f"{checkpoint_dir}: {part} is {dtype}; give --dtype float32, bfloat16 or float16"
                )
        plans = {plan.name: plan for plan in plan_shards(planned, options.file_bytes)}
        job = {
            "to": "hf",
            "dtype": str(options.dtype),
            "file_bytes": options.file_bytes,
            "teacher": options.teacher,
            "source": source_fingerprint(checkpoint_dir),
            "config": checkpoint.hf,
        }
        sizes = {name: plan.nbytes for name, plan in plans.items()}
        progress.start(f"{checkpoint_dir} -> {out_dir}", sum(sizes.values()))
        with ResumableDir(out_dir, job, sizes, overwrite=options.overwrite, advance=progress.advance) as work:
            resumed = say_resumed(work, progress)
            for file in work.left:
                with work.file(file) as sink:
                    sink.write(plans[file].header)
                    for part, place in plans[file].places.items():
                        for _, values in hf_rows(checkpoint, *source[part]):
                            what = f"{checkpoint.key(source[part][0])} ({part})"
                            cast = cast_checked(
                                values, place.dtype, what, checkpoint_dir, options.allow_nonfinite
                            )
                            sink.write(as_bytes(cast))
            parameters = sum(prod(shape) for _, shape in planned.values())
            if (index := index_of(list(plans.values()))) is not None:
                (work.partial / INDEX).write_text(index)
            _finish_hf(work, checkpoint, planned, options, parameters)
            if options.check:
                _check_hf(work.partial, checkpoint, planned, progress, stack)
            nbytes = sum(record["bytes"] for record in work.records.values())
            work.publish()
    return ConversionResult(out_dir, out_dir, parameters, nbytes, len(plans), resumed)


def _finish_hf(
    work: ResumableDir,
    checkpoint: MegatronSource,
    planned: dict[str, tuple[torch.dtype, Shape]],
    options: ConversionOptions,
    parameters: int,
) -> None:
    write_hf_config(checkpoint.hf_dir, work.partial, planned["model.embed_tokens.weight"][0])
    copy_side_files(checkpoint.hf_dir, work.partial)
    facts = {
        "direction": "Megatron to Hugging Face",
        "source": str(checkpoint.directory),
        "dtype": dtype_names(planned),
        "parameters": parameters,
        "weights": "teacher (moving average)" if options.teacher else None,
        "step": checkpoint.step,
        "recipe": checkpoint.recipe,
    }
    write_facts(work, facts)
    title = (
        f"{work.out_dir.name}: weights of a training run"
        if checkpoint.step is not None
        else f"{work.out_dir.name}: converted weights"
    )
    model = {
        "model type": checkpoint.hf["model_type"],
        "layers": checkpoint.table.num_layers,
        "parameters": f"{parameters:,}",
    }
    rows = {
        "source": f"`{checkpoint.directory}`",
        "step": checkpoint.step,
        "recipe": checkpoint.recipe,
        "weights": facts["weights"],
    }
    made = {"dtype": facts["dtype"], "made by": f"megasd {__version__}"}
    (work.partial / "README.md").write_text(card({"title": title, **model, **rows, **made}))


def _check_hf(
    partial: Path,
    checkpoint: MegatronSource,
    planned: dict[str, tuple[torch.dtype, Shape]],
    progress: ConversionProgress,
    stack: ExitStack,
) -> None:
    """Read the directory as the way to Megatron does and compare every byte with the checkpoint.
    UserError names the first that differs.
    """
    written, table = open_source(partial, stack), checkpoint.table
    progress.start("check", sum(prod(shape) * dtype.itemsize for dtype, shape in planned.values()))
    for name in torch_dist_keys.names(table):
        rule = table.rule(name)
        shape = torch_dist_keys.shape_of(rule)
        for start, stop in row_blocks(shape[0], max(1, checkpoint.row_bytes(name)), BLOCK_BYTES):
            found = parameter_rows(written, rule, start, stop, lambda values, _: values)
            if not same_bytes(found, checkpoint.read(name, start, stop).to(found.dtype)):
                raise UserError(
                    f"{partial}: {checkpoint.key(name)} does not come back as it is in"
                    f" {checkpoint.directory}; run again"
                )
            progress.advance(found.nbytes)
    progress.say("check: every value goes back into the Megatron parameters bit for bit")
