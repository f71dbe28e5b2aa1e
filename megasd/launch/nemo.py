"""nemo-run: being written."""

from __future__ import annotations

from megasd.launch.job import Job
from megasd.types import UserError


def launch(job: Job, *, executor: str, dry_run: bool, detach: bool) -> int:
    """Not there yet."""
    raise UserError("launch nemo-run: not there yet; use megasd launch slurm")
