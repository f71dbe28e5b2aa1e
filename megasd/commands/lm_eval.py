"""`megasd eval --harness lm-eval`: run EleutherAI's lm-evaluation-harness on a model.

The harness runs in a process of its own, on the Hugging Face directory of the model. It is no
dependency of megasd: `pip install 'megasd[eval]'` installs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megasd.commands.model_directory import model_directory
from megasd.types import UserError, is_url


@dataclass(frozen=True)
class Harness:
    """One evaluation harness."""

    # the Python module that is run
    module: str
    # how to install it
    install: str
    # arguments before --model_args
    arguments: tuple[str, ...]


HARNESSES = {"lm-eval": Harness("lm_eval", "pip install 'megasd[eval]' (lm-eval)", ("--model", "hf"))}


@dataclass(frozen=True)
class HarnessOptions:
    """The options of `megasd eval SOURCE --harness NAME`."""

    # a key of HARNESSES
    name: str
    # Hugging Face directory or Megatron checkpoint
    source: str
    # names of tasks, as in "gsm8k,arc"
    tasks: str
    seed: int
    # directory of the results; None = none are written
    out: str | None
    # number of questions of each task; None = all
    limit: int | None
    # further arguments of the harness; they win over the ones that megasd gives
    more: list[str]
    # print the command, and stop
    dry_run: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> HarnessOptions:
        """The options that were parsed. UserError for a URL, or when --tasks is missing."""
        if is_url(args.source):
            raise UserError(
                "--harness reads a directory; give a Hugging Face directory or a Megatron checkpoint, not an"
                " engine URL"
            )
        if not args.tasks:
            raise UserError("--harness: give --tasks, such as --tasks gsm8k")
        return cls(
            name=args.harness,
            source=args.source,
            tasks=args.tasks,
            seed=args.seed,
            out=args.out,
            limit=args.limit,
            more=shlex.split(args.harness_args or ""),
            dry_run=args.dry_run,
        )


def run_harness(options: HarnessOptions) -> None:
    """Run the harness on --tasks. UserError when it is not installed, or when it fails."""
    harness = HARNESSES[options.name]
    if not options.dry_run and importlib.util.find_spec(harness.module) is None:
        raise UserError(f"--harness {options.name}: not installed here; {harness.install}")
    with model_directory(options.source, None, convert=not options.dry_run) as model:
        command = harness_command(options, model or Path(options.source))
        print(shlex.join(command), flush=True)
        if not options.dry_run and subprocess.run(command).returncode:
            raise UserError(f"--harness {options.name}: failed; its messages are above")


def harness_command(options: HarnessOptions, model: Path) -> list[str]:
    """The command line of the harness for the Hugging Face directory `model`."""
    harness = HARNESSES[options.name]
    command = [sys.executable, "-m", harness.module, *harness.arguments]
    command += ["--model_args", f"pretrained={model}", "--tasks", options.tasks, "--seed", str(options.seed)]
    command += ["--output_path", options.out] if options.out else []
    command += ["--limit", str(options.limit)] if options.limit else []
    return command + options.more
