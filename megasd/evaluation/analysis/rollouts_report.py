"""The report of `megasd analyze rollouts`: tables (CSV, markdown) and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megasd.evaluation.analysis import rollouts, tables
from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.analysis.output import MARKER_NOTE, marker_table, say_where


def write_rollouts(out: Path, rows: Sequence[rollouts.MeasuredResponse]) -> None:
    """Write by_step.csv, by_verdict.csv, markers.csv, summary.md and the plots into `out`."""
    by_step, by_verdict, by_marker = (
        rollouts.by_step(rows),
        rollouts.by_verdict(rows),
        rollouts.by_marker(rows),
    )
    for name, table in (("by_step", by_step), ("by_verdict", by_verdict), ("markers", by_marker)):
        tables.write_csv(out / f"{name}.csv", table)
    totals = [row for row in by_marker if row["step"] == "all"]
    per_marker = [
        text
        for source in dict.fromkeys(row["source"] for row in totals)
        for text in (
            f"`{source}`, a response:\n",
            marker_table([row for row in totals if row["source"] == source], "verdict"),
        )
    ]
    text = [
        "# Rollouts\n",
        MARKER_NOTE,
        "## By verdict\n",
        tables.markdown(by_verdict),
        "## By step\n",
        tables.markdown(by_step),
    ]
    (out / "summary.md").write_text(
        "\n".join([*text, "## Markers, all steps\n", *per_marker]), encoding="utf-8"
    )
    if tables.can_plot():
        plot_rollouts(out, by_step, by_marker)
    say_where(out, len(rows), tables.markdown(by_verdict))


def plot_rollouts(out: Path, by_step: list[tables.TableRow], by_marker: list[tables.TableRow]) -> None:
    """Plot score, tokens and markers over steps (by_step.png, markers.png), if there are steps."""
    stepped = [row for row in by_step if row["step"] is not None]
    sources = list(dict.fromkeys(row["source"] for row in stepped))
    if not stepped:
        return

    def lines(name: str) -> dict[str, tuple[list[float], list[float | None]]]:
        own = {source: [row for row in stepped if row["source"] == source] for source in sources}
        return {
            source: ([row["step"] for row in rows], [row[name] for row in rows])
            for source, rows in own.items()
        }

    panels = [
        ("score", lines("score")),
        ("tokens a response", lines("tokens")),
        ("epistemic markers a response", lines("epistemic")),
    ]
    tables.plot_lines(out / "by_step.png", panels, x_label="step")
    for number, source in enumerate(sources):
        chosen = [
            row
            for row in by_marker
            if row["source"] == source and row["verdict"] == "all" and isinstance(row["step"], int)
        ]
        own = {marker: [row for row in chosen if row["marker"] == marker] for marker in MARKERS}
        marked = {
            m: ([r["step"] for r in rows], [r["substrings_per_response"] for r in rows])
            for m, rows in own.items()
        }
        name = "markers.png" if len(sources) == 1 else f"markers-{number}.png"
        tables.plot_lines(out / name, [(f"substrings a response, {source}", marked)], x_label="step")
