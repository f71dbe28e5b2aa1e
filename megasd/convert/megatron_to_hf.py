"""Megatron (torch_dist) -> Hugging Face, a block of rows at a time, without building a model.

    to_hf(Path("runs/x/checkpoints/step-100"), Path("exported"), ConversionOptions(dtype=torch.bfloat16))

All keys, shapes, dtypes and the free disk are checked before the first byte is written. Writing is
resumable (resumable_dir.py).
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
    """Write a Hugging Face directory from a torch_dist checkpoint of to_megatron or of a run.

    UserError: see the checks of open_checkpoint, ResumableDir and cast_checked.
    """
    progress = progress or ConversionProgress()
    with ExitStack() as stack:
        checkpoint = open_checkpoint(checkpoint_dir, options.hf, stack, teacher=options.teacher)
        # Hugging Face tensor -> parameter, and where the tensor lies in it
        source = {
            part: (name, rows)
            for name in torch_dist_keys.names(checkpoint.table)
            for part, rows in parts_of(checkpoint.table.rule(name)).items()
        }
        planned = _plan_tensors(checkpoint, options.dtype)
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
                        what = f"{checkpoint.key(source[part][0])} ({part})"
                        for _, values in hf_rows(checkpoint, *source[part]):
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


def _plan_tensors(
    checkpoint: MegatronSource, dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """dtype and shape of every Hugging Face tensor, in the order of the model.

    UserError: a tensor would have a dtype that safetensors files of models do not have.
    """
    planned: dict[str, tuple[torch.dtype, Shape]] = {}
    for name in torch_dist_keys.names(checkpoint.table):
        for part, shape in checkpoint.table.rule(name).parts.items():
            written = dtype or checkpoint.dtype(name)
            if written not in DTYPE_NAMES:
                raise UserError(
                    f"{checkpoint.directory}: {part} is {written}; give --dtype float32, bfloat16 or float16"
                )
            planned[part] = written, shape
    return planned


def _finish_hf(
    work: ResumableDir,
    checkpoint: MegatronSource,
    planned: dict[str, tuple[torch.dtype, Shape]],
    options: ConversionOptions,
    parameters: int,
) -> None:
    """Write all but the weights: config and tokenizer, conversion.json, README.md."""
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
    """Read the directory as to_megatron does, and compare every byte with the checkpoint.

    UserError names the first parameter that differs.
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
