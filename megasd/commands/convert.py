"""`megasd convert`: weights between Hugging Face and Megatron; SOURCE decides the direction."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megasd.commands.parser import Parser, SubCommands, positive, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.types import UserError

if TYPE_CHECKING:
    from megasd.convert.common import ConversionOptions
    from megasd.convert.direction import Direction


@dataclass(frozen=True)
class Options:
    """The options of `megasd convert`; `add_parser` says what each does."""

    source: Path
    target: Path
    # "megatron", "hf" or None = the direction that the source asks for
    to: str | None
    # "keep" or the name of a torch dtype
    dtype: str
    check: bool
    teacher: bool
    # directory of config.json and tokenizer of a Megatron source
    hf: Path | None
    file_mib: int
    overwrite: bool
    allow_nonfinite: bool
    allow_pickle: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(
            source=Path(args.source),
            target=Path(args.target),
            to=args.to,
            dtype=args.dtype,
            check=args.check,
            teacher=args.teacher,
            hf=None if args.hf is None else Path(args.hf),
            file_mib=args.file_mib,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
            allow_pickle=args.allow_pickle,
        )


def add_parser(commands: SubCommands) -> None:
    """Add `megasd convert` to the command line."""
    parser = commands.add_parser(
        "convert",
        help="convert weights between Hugging Face and Megatron",
        description=(
            "Hugging Face directory -> Megatron checkpoint (torch_dist), or back: a run's"
            " <run.dir>/checkpoints/step-<n>, or one made here. SOURCE says which. Reads and writes a block"
            " at a time; stopped anywhere, the same command goes on."
        ),
        epilog=(
            "There is no --tp, --pp or --ep: a torch_dist checkpoint holds whole tensors, and Megatron cuts"
            " them when it loads, for any TP, PP, EP and virtual PP. To train from a checkpoint, convert it"
            " to Hugging Face and give that as model.path."
        ),
    )
    parser.add_argument("source", metavar="SOURCE", help="directory to read")
    parser.add_argument("target", metavar="TARGET", help="directory to make; appears when whole")
    _add_options(parser)
    start_with(parser, lambda args: run(Options.from_args(args)))


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "--to", choices=("megatron", "hf"), help="refuse a SOURCE that is not of the other kind"
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of what is written (default: keep)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read the target back, compare every byte, then logits if the model fits",
    )
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="a run's checkpoint: the teacher's moving average, not the model",
    )
    parser.add_argument(
        "--hf",
        metavar="DIR",
        help="config.json and tokenizer of a Megatron SOURCE that does not lead to them",
    )
    parser.add_argument(
        "--file-mib",
        type=positive,
        default=2048,
        metavar="N",
        help="size of the files written, about (MiB, default 2048)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace TARGET, and drop another conversion's partial files"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="take pytorch_model.bin, with torch's weights_only; safetensors else",
    )


def run(options: Options) -> int:
    """Convert, say what was written, and return 0. Raises UserError for whatever is refused."""
    quiet_libraries()
    import torch

    from megasd.convert.common import ConversionOptions
    from megasd.convert.direction import direction_of
    from megasd.convert.hf_to_megatron import to_megatron
    from megasd.convert.host_memory import peak_mib
    from megasd.convert.megatron_to_hf import to_hf
    from megasd.convert.progress_bar import Bar

    start, source, target = time.perf_counter(), options.source, options.target
    direction = direction_of(source)
    if options.to not in (None, direction):
        wanted = "Hugging Face" if options.to == "megatron" else "Megatron"
        raise UserError(f"{source}: is no {wanted} directory; convert it with --to {direction}")
    conversion = ConversionOptions(
        dtype=None if options.dtype == "keep" else getattr(torch, options.dtype),
        file_bytes=options.file_mib << 20,
        overwrite=options.overwrite,
        allow_nonfinite=options.allow_nonfinite,
        allow_pickle=options.allow_pickle,
        check=options.check,
        teacher=options.teacher,
        hf=options.hf,
    )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f"{target}: lies in the source directory; give another target")
    with Bar() as bar:
        before = peak_mib()
        result = (to_megatron if direction == "megatron" else to_hf)(source, target, conversion, bar)
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
        print(compare_logits(source, target, direction, result.parameters, conversion))
    return 0


def compare_logits(
    source: Path, target: Path, direction: Direction, parameters: int, options: ConversionOptions
) -> str:
    """Compare the logits of both models if they fit into memory; return a line for the user.

    UserError when the logits differ by more than rounding explains.
    """
    from megasd.convert.check_logits import TOKENS, TOLERANCE, bytes_needed, logits_difference
    from megasd.convert.host_memory import available_bytes

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
