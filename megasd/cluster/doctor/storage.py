"""Checks of run.dir: room for checkpoints, and the kind of its file system."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasd.cluster.doctor.host import nearest
from megasd.cluster.doctor.report import CheckResult, Machine, fail, gib, ok, warn
from megasd.config.schema import Config
from megasd.types import UserError
from megasd.weights.safetensors_headers import tensor_shapes

# Values of algorithm.teacher.weights for which a checkpoint holds a copy of the teacher.
TEACHERS_WITH_FP32_COPY = ("ema", "frozen", "snapshot", "gated", "trust_region")
# File systems that do not keep files -> why.
PASSING = {
    "overlay": "is lost with the container",
    "tmpfs": "is memory, and lost with the machine",
    "ramfs": "is memory",
}
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")
# Without a config, fewer free bytes than these give a warning.
SMALL = 10 << 30


def check_disk(machine: Machine) -> list[CheckResult]:
    """Check the free space against the size of the checkpoints, and the file system's kind."""
    folder = nearest(machine.run_dir)
    kind = file_system((machine.proc / "mounts").read_text(), folder)
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK | os.X_OK)
    parameters = count_parameters(machine.config, machine.files) if machine.config else None
    space = judge_space(free, str(folder), writable, machine.config, parameters)
    return [space, judge_file_system(kind, str(folder), machine.config is not None)]


def count_parameters(config: Config, files: list[str]) -> int | None:
    """Number of weights of the model at model.path; None if that is not known.

    It is read from the headers of the model's safetensors, else from its config.json or from
    <name>.json in a folder `model` near a YAML file or in configs/model.
    """
    path = Path(config.model.path)
    if path.is_dir():
        try:
            return sum(math.prod(shape) for shape in tensor_shapes(path).values())
        except UserError:
            # The directory has no weights yet.
            pass
    above = [parent for file in files for parent in Path(file).absolute().parents]
    names = [
        path / "config.json",
        *(parent / "model" / f"{path.name}.json" for parent in above),
        Path(f"configs/model/{path.name}.json"),
    ]
    for name in names:
        if name.is_file():
            return parameters_of(json.loads(name.read_text()))
    return None


def parameters_of(hf: Mapping[str, Any]) -> int:
    """Number of weights of a model by its config.json: embedding, layers, output layer.

    Norms and biases are left out; they are below 0.1 %.
    """
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    groups, width = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or hidden // heads
    attention = hidden * width * (2 * heads + 2 * groups)
    if experts := hf.get("num_experts"):
        mlp = hidden * experts * (3 * hf["moe_intermediate_size"] + 1)
    else:
        mlp = 3 * hidden * hf["intermediate_size"]
    vocabulary = hf["vocab_size"] * hidden * (1 if hf.get("tie_word_embeddings") else 2)
    return vocabulary + hf["num_hidden_layers"] * (attention + mlp)


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint.

    It holds weights in actor.dtype, fp32 main weights, Adam's two moments, and the teacher's fp32
    copy, if there is one.
    """
    weights = 2 if config.actor.dtype == "bfloat16" else 4
    teacher = config.algorithm.teacher
    return parameters * (
        weights + 12 + (4 if teacher is not None and teacher.weights in TEACHERS_WITH_FP32_COPY else 0)
    )


def judge_space(
    free: int, folder: str, writable: bool, config: Config | None, parameters: int | None
) -> CheckResult:
    """Judge the `free` bytes of `folder` for a model of `parameters` weights (None: not known).

    While a checkpoint is written, checkpoint.keep older ones are still there. run.export writes the
    weights once more.
    """
    detail = f"{gib(free)} free in {folder}"
    if not writable:
        return fail("disk", f"{folder} cannot be written", "give another run.dir, or permissions there")
    if config is None or parameters is None:
        why = (
            ""
            if config is None
            else "; how large a checkpoint is cannot be told without the model's config.json"
        )
        if free < SMALL:
            return warn("disk", f"{detail}{why}", "free some: an 8B model's checkpoint takes 140 GiB")
        return ok("disk", f"{detail}{why}")
    each = checkpoint_bytes(config, parameters)
    export = parameters * (2 if config.actor.dtype == "bfloat16" else 4) if config.run.export else 0
    needed = each * (config.checkpoint.keep + 1) + export
    size = (
        f"{parameters / 1e9:.2f}B parameters" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M parameters"
    )
    detail += (
        f", {gib(needed)} needed: {size}, {gib(each)} a checkpoint, {config.checkpoint.keep} + 1 of them,"
        f" {gib(export)} export"
    )
    if free < needed:
        return fail("disk", detail, "give a run.dir with more room, or lower checkpoint.keep")
    if free < 1.5 * needed:
        return warn("disk", f"{detail}; rollouts and logs come on top", "free some, or lower checkpoint.keep")
    return ok("disk", detail)


def file_system(mounts: str, folder: Path) -> str:
    """Kind of an absolute directory's file system, by the text of /proc/mounts; "?" if unknown."""
    found, depth = "?", -1
    path = folder.resolve()
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = Path(words[1].replace("\\040", " "))
        # Of two mounts at one point the later counts.
        if (point == path or point in path.parents) and len(point.parts) >= depth:
            found, depth = words[2], len(point.parts)
    return found


def judge_file_system(kind: str, folder: str, is_run_dir: bool) -> CheckResult:
    """Judge the kind of the folder's file system; is_run_dir: a run will write there."""
    what = f"{folder} is on {kind}"
    if kind in PASSING and is_run_dir:
        return warn(
            "file system",
            f"{what}, which {PASSING[kind]}",
            "give a run.dir on a disk that stays (docker run -v /data/runs:/runs)",
        )
    if kind in NETWORK and is_run_dir:
        fix = (
            "for large models give a run.dir on a parallel file system (Lustre, GPFS, WekaFS) that all"
            " nodes see"
        )
        return warn("file system", f"{what}: every rank writes its part of a checkpoint there at once", fix)
    return ok("file system", what)
