"""The progress of a conversion on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from megasd.convert.common import ConversionProgress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Bar(ConversionProgress):
    """Draws a progress bar on standard error if it is a terminal; prints lines on standard output."""

    def __init__(self) -> None:
        # the bar and the id of its only task; None: standard error is no terminal
        self._bar: tuple[RichProgress, TaskID] | None = None
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
            progress = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar = progress, progress.add_task("")

    def start(self, what: str, total_bytes: int) -> None:
        """Begin a part of the work: the bar starts from 0."""
        if self._bar is not None:
            progress, task = self._bar
            progress.reset(task, total=total_bytes, description=what)

    def advance(self, nbytes: int) -> None:
        """Move the bar by so many bytes."""
        if self._bar is not None:
            progress, task = self._bar
            progress.advance(task, nbytes)

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()
