"""Tables as CSV and markdown, and plots as PNG if matplotlib is installed.

A table is a list of rows, a row a dict of column -> value; None is a value that could not be
measured ("-" in markdown, empty in CSV).
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TableRow = dict[str, Any]
NO_PLOTS = (
    "plots skipped: matplotlib is not installed; pip install 'matplotlib>=3.9,<4' draws them on the next call"
)
# A longer table is thinned out in markdown. The CSV holds every row.
MAX_MARKDOWN_ROWS = 60


def mean(values: Sequence[float]) -> float | None:
    """The mean of the values; None when there are none."""
    return sum(values) / len(values) if values else None


def ratio(value: float | None, of: float | None) -> float | None:
    """value / of; None when one of them is unknown or `of` is 0."""
    return value / of if value is not None and of else None


def columns(rows: Sequence[TableRow]) -> list[str]:
    """The names of all columns, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in row))


def pivot(rows: Sequence[TableRow], index: str, across: str, values: Sequence[str]) -> list[TableRow]:
    """Turn a long table into a wide table with a row for each value of `index`.

    Each value of `across` gets a column for each of `values`, named "across value".

    pivot([{"m": "wait", "s": "none", "n": 3}], "m", "s", ["n"]) == [{"m": "wait", "none n": 3}]
    """
    found: dict[Any, TableRow] = {}
    for row in rows:
        found.setdefault(row[index], {index: row[index]}).update(
            {f"{row[across]} {name}": row[name] for name in values}
        )
    return list(found.values())


def write_csv(path: Path, rows: Sequence[TableRow]) -> None:
    """Write all rows with all digits; the file gets its name only when it is whole."""
    writing = path.with_name(path.name + ".writing")
    with writing.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns(rows), restval="")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    os.replace(writing, path)


def markdown(rows: Sequence[TableRow], *, limit: int | None = MAX_MARKDOWN_ROWS) -> str:
    """The rows as a markdown table.

    More rows than `limit` are thinned out evenly; the first and the last stay, and a line says so.
    """
    if not rows:
        return "(no rows)\n"
    chosen = list(rows)
    if limit is not None and len(rows) > limit:
        chosen = [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]
    names = columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in chosen]
    if len(chosen) < len(rows):
        lines += ["", f"{len(chosen)} of {len(rows)} rows; the CSV holds all of them."]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """A value as text for a reader: four significant digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_lines(
    path: Path,
    panels: Sequence[tuple[str, dict[str, tuple[list[float], list[float | None]]]]],
    *,
    x_label: str,
) -> None:
    """Plot lines in panels, one panel below the other.

    A panel is (y label, {line: (x values, y values)}). Points without a value are left out.
    """
    figure, axes = _figure(len(panels), height=2.6)
    for axis, (label, lines) in zip(axes, panels, strict=True):
        for name, (xs, ys) in lines.items():
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=name,
                marker="." if len(points) < 30 else None,
            )
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7, ncols=2)
    axes[-1].set_xlabel(x_label)
    _save(figure, path)


def plot_bars(
    path: Path, panels: Sequence[tuple[str, dict[str, list[float | None]]]], groups: Sequence[str]
) -> None:
    """Plot grouped bars in panels.

    A panel is (y label, {series: a value for each of `groups`}). A missing value has no bar.
    """
    figure, axes = _figure(len(panels), height=2.8)
    for axis, (label, series) in zip(axes, panels, strict=True):
        width = 0.8 / max(len(series), 1)
        for k, (name, values) in enumerate(series.items()):
            places = [i - 0.4 + (k + 0.5) * width for i in range(len(groups))]
            axis.bar(places, [value or 0.0 for value in values], width, label=name)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _figure(panels: int, *, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # pyplot is avoided: it would look for a display, and keep every plot in memory.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _save(figure: Any, path: Path) -> None:
    writing = path.with_name(path.name + ".writing")
    figure.savefig(writing, dpi=130, format="png")
    os.replace(writing, path)
