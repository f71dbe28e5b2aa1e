"""`megasd launch`: submit a run to a cluster, or with --dry-run print what would be submitted."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megasd.commands.parser import Parser, SubCommands, add_items, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.config.load import split_items
from megasd.types import UserError

if TYPE_CHECKING:
    from megasd.cluster.launch.job import LaunchJob


@dataclass(frozen=True)
class SlurmOptions:
    """The options of `megasd launch slurm`."""

    # YAML files and key=value
    items: list[str]
    # print the script, and stop
    dry_run: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SlurmOptions:
        """The options that were parsed."""
        return cls(items=args.items, dry_run=args.dry_run)


@dataclass(frozen=True)
class NemoOptions:
    """The options of `megasd launch nemo-run`."""

    # YAML files and key=value
    items: list[str]
    # "slurm" or "local" (torchrun on this machine)
    executor: str
    # print what would be run, and stop
    dry_run: bool
    # do not wait for the end
    detach: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> NemoOptions:
        """The options that were parsed."""
        return cls(items=args.items, executor=args.executor, dry_run=args.dry_run, detach=args.detach)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd launch slurm` and `megasd launch nemo-run` to the command line."""
    parser = commands.add_parser(
        "launch",
        help="submit a run to a cluster",
        description="Submit a run; cluster.* says to which machines.",
    )
    kinds = parser.add_subparsers(dest="launcher", required=True, metavar="LAUNCHER", parser_class=Parser)
    slurm = kinds.add_parser(
        "slurm", help="one sbatch script", description="Write the sbatch script of a run and submit it."
    )
    add_items(slurm)
    slurm.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted, and stop"
    )
    start_with(slurm, lambda args: run_slurm(SlurmOptions.from_args(args)), more="items")
    nemo = kinds.add_parser(
        "nemo-run", help="a nemo-run experiment", description="Run through nemo_run: here, or on Slurm."
    )
    add_items(nemo)
    nemo.add_argument(
        "--executor",
        choices=("slurm", "local"),
        default="slurm",
        help="local: torchrun on this machine (default: slurm)",
    )
    nemo.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    nemo.add_argument("--detach", action="store_true", help="do not wait for the end")
    start_with(nemo, lambda args: run_nemo(NemoOptions.from_args(args)), more="items")


def run_slurm(options: SlurmOptions) -> int:
    """Hand the run to sbatch; returns the exit code of sbatch. Raises UserError."""
    quiet_libraries()
    return submit(_read_job(options.items), dry_run=options.dry_run)


def run_nemo(options: NemoOptions) -> int:
    """Hand the run to nemo_run; returns the exit code. Raises UserError."""
    quiet_libraries()
    from megasd.cluster.launch import nemo

    return nemo.launch(
        _read_job(options.items),
        executor=options.executor,
        dry_run=options.dry_run,
        detach=options.detach,
    )


def _read_job(items: list[str]) -> LaunchJob:
    from megasd.cluster.launch.job import read_job

    return read_job(*split_items(items))


def submit(job: LaunchJob, *, dry_run: bool) -> int:
    """Hand the job's script to sbatch and return the exit code of sbatch.

    The resolved config and the script are also written, into job.folder. dry_run: print the script
    and do nothing else.
    """
    from megasd.cluster.launch import slurm
    from megasd.cluster.launch.job import write_job_config

    script = slurm.render(job)
    if dry_run:
        sys.stdout.write(script)
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found on this machine; run this where Slurm is, or see the script with --dry-run"
        )
    write_job_config(job)
    Path(job.script).write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch"], input=script.encode(), check=False)
    return done.returncode
