"""The run directory: which checkpoint a run resumes from, what a fresh run clears, the summary at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasd.actor import checkpoint
from megasd.config.load import to_yaml
from megasd.config.schema import Config
from megasd.preemption import PREEMPTED_MARKER

# What a fresh run with run.overwrite=true removes from run.dir.
OUTPUTS = ("rollouts", "checkpoints", "tensorboard", "hf", "metrics.jsonl", "summary.json")
# The held-out metrics that summary.json keeps.
SUMMARY_METRICS = ("mean_at_k", "maj_at_k", "pass_at_k", "unscored_samples")


def find_resume(config: Config) -> Path | None:
    """Checkpoint directory that the run resumes from (run.resume), None for a fresh start."""
    resume = config.run.resume
    if resume == "auto":
        found = checkpoint.list_checkpoints(Path(config.run.dir) / "checkpoints")
        return found[-1] if found else None
    return None if resume == "none" else Path(resume)


def open_run_dir(config: Config, *, is_fresh: bool) -> None:
    """Create run.dir and write the resolved config into it; a fresh run may clear an older one first.

    Called once nothing can be refused any more: a run that never began neither leaves a trace nor
    spoils an older run. Rank 0 only.
    """
    directory = Path(config.run.dir)
    if is_fresh and config.run.overwrite:
        for name in OUTPUTS:
            path = directory / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PREEMPTED_MARKER).unlink(missing_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config))


def mark_preempted(run_dir: Path, *, step: int, signal: int | None) -> None:
    """Write the marker of a preempted run: the step that was saved and the number of the signal."""
    (run_dir / PREEMPTED_MARKER).write_text(json.dumps({"step": step, "signal": signal}) + "\n")


def write_summary(
    run_dir: Path,
    *,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    """Write run.dir/summary.json and return its content.

    before, after: held-out metrics of the start model and of the trained one, None without
    data.eval. seconds: wall time of this process. Only whole files appear under the name.
    """
    summary = {
        "before": _kept(before),
        "after": _kept(after),
        "seconds": round(seconds, 1),
        "steps": steps,
        "commit": source_commit(),
    }
    writing = run_dir / ".summary.json"
    writing.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(writing, run_dir / "summary.json")
    return summary


def _kept(metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if metrics is None else {name: metrics[name] for name in SUMMARY_METRICS}


def source_commit() -> str | None:
    """Commit of megasd's source tree, None outside of a git repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
