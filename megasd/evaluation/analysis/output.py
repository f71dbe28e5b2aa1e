"""Helpers for all reports of `megasd analyze`: directory, marker table, last lines."""

from __future__ import annotations

import os
from pathlib import Path

from megasd.evaluation.analysis import tables
from megasd.types import UserError

MARKER_NOTE = (
    "`epistemic` is the paper's count (arXiv 2603.24472): occurrences of ten words of doubt a response, as"
    ' substrings, so "unlikely" counts for "likely". `epistemic_words` counts whole words only. `score` is'
    " the share of right answers among those that were judged; `not_judged` are verifier errors and timeouts."
    " Tokens and counts are means over responses.\n"
)


def marker_table(rows: list[tables.TableRow], across: str) -> str:
    """A markdown table of markers: a row for each marker, two columns for each value of `across`.

    The columns are substrings and whole words, as means over responses.
    """
    named = [
        {**row, "substrings": row["substrings_per_response"], "words": row["words_per_response"]}
        for row in rows
    ]
    return tables.markdown(tables.pivot(named, "marker", across, ["substrings", "words"]))


def output_directory(path: Path) -> Path:
    """Make the directory `path` if it is missing; return it. UserError if it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be made ({error.strerror}); choose another directory"
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--out {path}: cannot be written to; choose another directory")
    return path


def say_where(out: Path, samples: int, table: str) -> None:
    """Print a table and the directory of the report. samples: number of measured responses."""
    print(table, end="")
    if not tables.can_plot():
        print(tables.NO_PLOTS)
    print(f"{samples} responses; tables in {out}, begin with {out / 'summary.md'}")
