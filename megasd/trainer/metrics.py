"""Writes the metrics of a run: RUN_DIR/metrics.jsonl and TensorBoard event files in RUN_DIR/tensorboard.

Each line of metrics.jsonl is a strict JSON object:

    sink = MetricSink(run_dir, tensorboard=True)
    sink.log(3, {"train/loss": 0.71, "reward/pass_rate": 0.4})
    # {"step": 3, "time": 1767225600.0, "train/loss": 0.71, "reward/pass_rate": 0.4}

Values are already reduced over the ranks, and only rank 0 has a sink. Losses are in nats, times in
seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megasd.types import UserError

RESERVED = ("step", "time")


class MetricSink:
    """Appends metrics to a run's files.

    first_step: the step that the run starts or resumes at. Older lines of that step and of later steps
    are dropped.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool = True, first_step: int = 0) -> None:
        """Create run_dir if needed and drop a last line that a crash tore.

        OSError when run_dir cannot be written.
        """
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        if self.path.exists():
            _keep_before(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            # Imported only here: it needs torch.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line and flush it.

        A value is anything that float() takes; NaN and infinities become null. Raises ValueError for
        a reserved name (step, time).
        """
        taken = [name for name in RESERVED if name in metrics]
        if taken:
            raise ValueError(f"metric name {taken[0]!r} is reserved; rename it")
        line = {
            "step": int(step),
            "time": round(time.time(), 3),
            **{name: _number(value) for name, value in metrics.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, float(value), step)
            self._writer.flush()

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order. A last line torn by a crash is left out.

    UserError for any other line that is not JSON.
    """
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a JSON line; delete it") from error
    return rows


def _keep_before(path: Path, step: int) -> None:
    """Rewrite the file with the rows of earlier steps only.

    The new file is written next to the old one and then renamed, so a crash leaves one of the two.
    """
    kept = [row for row in read_metrics(path) if row["step"] < step]
    writing = path.with_suffix(".jsonl.tmp")
    with writing.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
