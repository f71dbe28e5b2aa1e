"""`megasd convert`: which way, what is shown while it works, and what is said at the end."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from megasd.convert.common import ConversionOptions, ConversionProgress
from megasd.convert.hf_to_megatron import to_megatron
from megasd.convert.megatron_to_hf import to_hf
from megasd.types import UserError
from megasd.weights.safetensors_io import INDEX


def run(arguments: argparse.Namespace) -> None:
    """Convert as the command line says (cli.py). UserError for whatever is refused."""
    start, source, target = time.perf_counter(), Path(arguments.source), Path(arguments.target)
    direction = direction_of(source)
    if arguments.to not in (None, direction):
        wanted = "Hugging Face" if arguments.to == "megatron" else "Megatron"
        raise UserError(f"{source}: is no {wanted} directory; convert it with --to {direction}")
    options = ConversionOptions(
        dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
        file_bytes=arguments.file_mib << 20,
        overwrite=arguments.overwrite,
        allow_nonfinite=arguments.allow_nonfinite,
        allow_pickle=arguments.allow_pickle,
        check=arguments.check,
        teacher=arguments.teacher,
        hf=None if arguments.hf is None else Path(arguments.hf),
    )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f"{target}: lies in the source directory; give another target")
    with Bar() as bar:
        before = peak_mib()
        result = (to_megatron if direction == "megatron" else to_hf)(source, target, options, bar)
        seconds, peak = time.perf_counter() - start, peak_mib()
    resumed = f", {result.resumed_files} of them from before" if result.resumed_files else ""
    print(
        f"{target}: {result.parameters:,} parameters, {result.nbytes / 2**30:.3f} GiB in {result.files}"
        f" files{resumed}"
    )
    print(
        f"{seconds:.1f} s; peak memory {peak:.0f} MiB (VmHWM of this process; {before:.0f} MiB when it began)"
    )
    if options.check:
        print(probe_logits(source, target, direction, result.parameters, options))


def direction_of(source: Path) -> str:
    """ "megatron" for a Hugging Face directory, "hf" for a Megatron one."""
    if not source.is_dir():
        raise UserError(
            f"{source}: {'is no directory' if source.exists() else 'not found'}; give a Hugging Face or"
            " Megatron directory"
        )
    if (source / "metadata.json").is_file() or (source / ".metadata").is_file():
        return "hf"
    weights = any((source / name).is_file() for name in ("model.safetensors", INDEX)) or any(
        source.glob("pytorch_model*.bin")
    )
    if (source / "config.json").is_file() or weights:
        return "megatron"
    raise UserError(
        f"{source}: neither a Hugging Face directory (config.json) nor a Megatron one (metadata.json,"
        " .metadata)"
    )


def probe_logits(
    source: Path, target: Path, direction: str, parameters: int, options: ConversionOptions
) -> str:
    """Compare logits when both models fit into memory; returns what to say. UserError when they differ."""
    from megasd.convert.check_logits import TOKENS, TOLERANCE, bytes_needed, logits_difference

    needed, free = bytes_needed(parameters), available_bytes()
    if options.teacher:
        return "check: logits not compared, the checkpoint's model is not its teacher"
    if needed > free:
        return (
            f"check: logits not compared, that needs {needed / 2**30:.1f} GiB of memory and"
            f" {free / 2**30:.1f} GiB are free"
        )
    megatron, hf_dir = (target, source) if direction == "megatron" else (source, target)
    difference, largest = logits_difference(megatron, hf_dir, options.dtype)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{target}: logits differ from transformers' by {difference:.2g} (largest {largest:.2g}); do not"
            " use it"
        )
    return (
        f"check: logits of {TOKENS} tokens differ from transformers' by {difference:.2g} at most (largest"
        f" {largest:.2g}; float32)"
    )


class Bar(ConversionProgress):
    """A rich progress bar on standard error when it is a terminal; lines that say something go to
    standard output.
    """

    def __init__(self) -> None:
        self.progress = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self.progress = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task("")

    def start(self, what: str, total_bytes: int) -> None:
        if self.progress is not None:
            self.progress.reset(self.task, total=total_bytes, description=what)

    def advance(self, nbytes: int) -> None:
        if self.progress is not None:
            self.progress.advance(self.task, nbytes)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def __enter__(self) -> Bar:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()


def peak_mib() -> float:
    """The largest resident memory that this process had so far, mapped files included; NaN where
    /proc does not tell.
    """
    return _proc("/proc/self/status", "VmHWM:") / 1024


def available_bytes() -> float:
    """Memory that new processes can have; infinite where /proc does not tell."""
    kib = _proc("/proc/meminfo", "MemAvailable:")
    return kib * 1024 if kib == kib else float("inf")


def _proc(path: str, key: str) -> float:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return float(line.split()[1])
    except OSError:
        pass
    return float("nan")
