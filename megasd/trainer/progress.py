"""What a run prints on standard output: a line for each step, and a table of held-out metrics at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol

# The phases of a step whose seconds/<phase> are printed, in this order.
PHASES = ("rollout", "reward", "teach", "train", "sync")
# (printed label, metric, format) of a step's line, in this order.
STEP_LINE = (
    ("pass", "reward/pass_rate", "{:.1%}"),
    ("informative", "weight/informative_questions", "{:.0f}"),
    ("weight", "weight/mean", "{:.3f}"),
    ("taught", "train/taught_samples", "{:.0f}"),
    ("div", "train/divergence", "{:.4f}"),
    ("loss", "train/loss", "{:.4f}"),
    ("gnorm", "train/grad_norm", "{:.3f}"),
    ("tok/s", "speed/tokens_per_second", "{:.0f}"),
)


class _Screen(Protocol):
    """Where lines go."""

    def line(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def close(self) -> None: ...


class _PlainScreen:
    """Lines on standard output, for a file or a pipe."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def advance(self) -> None:
        pass

    def close(self) -> None:
        pass


class _TerminalScreen:
    """Lines above a progress bar, on a terminal."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
        self._task = self._progress.add_task("train", total=total, completed=done)
        self._progress.start()

    def line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def close(self) -> None:
        self._progress.stop()


class ProgressPrinter:
    """Rank 0's standard output: plain lines, and on a terminal a progress bar below them.

    total: optimizer steps of the run; done: steps that are done already.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total = total
        self._screen: _Screen = _TerminalScreen(total, done) if sys.stdout.isatty() else _PlainScreen()

    def line(self, text: str) -> None:
        """Print a line."""
        self._screen.line(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a step's line and advance the bar. step: counted from 0."""
        self.line(f"step {step + 1:>{len(str(self.total))}}/{self.total} {step_line(metrics)}")
        self._screen.advance()

    def close(self) -> None:
        """Remove the bar; lines are plain afterwards. A second call does nothing."""
        self._screen.close()
        self._screen = _PlainScreen()


def step_line(metrics: Mapping[str, float]) -> str:
    """The metrics of STEP_LINE that a step has, then the seconds of its phases."""
    parts = [f"{label} {form.format(metrics[name])}" for label, name, form in STEP_LINE if name in metrics]
    seconds = " ".join(
        f"{phase} {metrics[f'seconds/{phase}']:.2f}" for phase in PHASES if f"seconds/{phase}" in metrics
    )
    return " | ".join([*parts, f"s: {seconds}"])


def result_table(before: Mapping[str, float], after: Mapping[str, float], k: int) -> str:
    """Table of held-out metrics before and after training, in percent. k: samples of each question."""
    rows = [f"{'held-out':<10}{'before':>10}{'after':>10}{'gain':>10}"]
    for label, key in ((f"mean@{k}", "mean_at_k"), (f"maj@{k}", "maj_at_k")):
        gain = (after[key] - before[key]) * 100
        rows.append(f"{label:<10}{before[key]:>10.1%}{after[key]:>10.1%}{gain:>+10.1f}")
    return "\n".join(rows)
