"""The progress of a conversion on a terminal."""

from __future__ import annotations

import sys

from megasd.convert.common import ConversionProgress


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
