"""What a run prints: one line a step (a progress bar beside it on a terminal), and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping

# seconds/<phase>
PHASES = ("rollout", "reward", "teach", "train", "sync")


class ProgressPrinter:
    """Rank 0's standard output. On a terminal rich draws a progress bar; elsewhere lines are plain."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.progress = total, None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self.progress = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
            self.task = self.progress.add_task("train", total=total, completed=done)
            self.progress.start()

    def line(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line: pass rate, question weights, loss terms, gradient norm, speed, seconds of each phase."""
        self.line(f"step {step + 1:>{len(str(self.total))}}/{self.total} {step_line(metrics)}")
        if self.progress is not None:
            self.progress.advance(self.task)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def step_line(metrics: Mapping[str, float]) -> str:
    """The figures of a step that are there, in a fixed order."""
    shown = [
        ("pass", "reward/pass_rate", "{:.1%}"),
        ("informative", "weight/informative_questions", "{:.0f}"),
        ("weight", "weight/mean", "{:.3f}"),
        ("taught", "train/taught_samples", "{:.0f}"),
        ("div", "train/divergence", "{:.4f}"),
        ("loss", "train/loss", "{:.4f}"),
        ("gnorm", "train/grad_norm", "{:.3f}"),
        ("tok/s", "speed/tokens_per_second", "{:.0f}"),
    ]
    parts = [f"{label} {form.format(metrics[key])}" for label, key, form in shown if key in metrics]
    seconds = " ".join(
        f"{phase} {metrics[f'seconds/{phase}']:.2f}" for phase in PHASES if f"seconds/{phase}" in metrics
    )
    return " | ".join([*parts, f"s: {seconds}"])


def result_table(before: Mapping[str, float], after: Mapping[str, float], k: int) -> str:
    """Held-out figures before and after, in percent."""
    rows = [f"{'held-out':<10}{'before':>10}{'after':>10}{'gain':>10}"]
    for label, key in ((f"mean@{k}", "mean_at_k"), (f"maj@{k}", "maj_at_k")):
        gain = (after[key] - before[key]) * 100
        rows.append(f"{label:<10}{before[key]:>10.1%}{after[key]:>10.1%}{gain:>+10.1f}")
    return "\n".join(rows)
