"""`megasd eval --harness lm-eval`: a model's Hugging Face directory through EleutherAI's
lm-evaluation-harness, in a process of its own.

The harness is not a dependency: it is run where it is installed (`pip install 'megasd[eval]'`), and
named in one line where it is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from megasd.types import UserError

# name -> (module, what to install, arguments before --tasks)
HARNESSES = {"lm-eval": ("lm_eval", "pip install 'megasd[eval]' (lm-eval)", ["--model", "hf"])}


def run_harness(
    args: argparse.Namespace, model_directory: Callable[..., AbstractContextManager[Path]]
) -> None:
    """Prepare the directory and run the harness on --tasks; UserError when it is not installed or fails."""
    module, install, _ = HARNESSES[args.harness]
    if args.source.startswith(("http://", "https://")):
        raise UserError(
            "--harness reads a directory; give a Hugging Face directory or a Megatron checkpoint, not an"
            " engine URL"
        )
    if not args.tasks:
        raise UserError("--harness: give --tasks, such as --tasks gsm8k")
    if not args.dry_run and importlib.util.find_spec(module) is None:
        raise UserError(f"--harness {args.harness}: not installed here; {install}")
    with model_directory(args.source, None, convert=not args.dry_run) as model:
        command = harness_command(args, Path(args.source) if model is None else model)
        print(shlex.join(command), flush=True)
        if not args.dry_run and subprocess.run(command).returncode:
            raise UserError(f"--harness {args.harness}: failed; its messages are above")


def harness_command(args: argparse.Namespace, model: Path) -> list[str]:
    """The harness's own command line for that directory; --harness-args at its end win."""
    module, _, fixed = HARNESSES[args.harness]
    command = [
        sys.executable,
        "-m",
        module,
        *fixed,
        "--model_args",
        f"pretrained={model}",
        "--tasks",
        args.tasks,
        "--seed",
        str(args.seed),
    ]
    command += ["--output_path", args.out] if args.out else []
    command += ["--limit", str(args.limit)] if args.limit else []
    return command + shlex.split(args.harness_args or "")
