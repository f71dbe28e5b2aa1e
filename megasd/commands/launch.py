"""`megasd launch slurm` and `megasd launch nemo-run`: check, render, then submit, or with --dry-run
print what would be submitted.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from megasd.cluster.launch import nemo, slurm
from megasd.cluster.launch.job import LaunchJob, read_job, write_job_config
from megasd.types import UserError


def run(args: argparse.Namespace, items: list[str]) -> int:
    """args.launcher slurm or nemo-run on the config of `items`, YAML files and overrides; the exit
    code. Raises UserError.
    """
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    job = read_job([item for item in items if item not in overrides], overrides)
    if args.launcher == "nemo-run":
        return nemo.launch(job, executor=args.executor, dry_run=args.dry_run, detach=args.detach)
    return submit(job, dry_run=args.dry_run)


def submit(job: LaunchJob, *, dry_run: bool) -> int:
    """Hand the job's script to sbatch, config and script beside it in job.folder; sbatch's exit
    code. dry_run: print the script.
    """
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
