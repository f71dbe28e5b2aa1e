"""Measure score, length and epistemic markers of kept rollouts, by step and by verdict.

After Kim et al. (arXiv 2603.24472). Plain Python.

A run keeps its rollouts in <run.dir>/rollouts/step-*.jsonl, one file a step. The score is the
fraction of right answers among the answers that could be judged. Verifier errors and timeouts are
counted separately. They do not enter the score, as they do not enter pass rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megasd.data.rollout_log import load_groups
from megasd.evaluation.analysis.markers import MARKERS, substring_counts, word_counts
from megasd.evaluation.analysis.tables import TableRow, mean, ratio
from megasd.types import Sample, UserError, Verdict

STEP = re.compile(r"step-(\d+)\.jsonl$")
UNSCORED = "unscored"
VERDICTS = (*(verdict.value for verdict in Verdict), UNSCORED)


@dataclass(frozen=True, slots=True)
class MeasuredResponse:
    """A measured response.

    `words` counts markers as whole words; `substrings` counts them as the paper does.
    """

    source: str
    step: int | None
    # right | wrong | error | timeout | unscored
    verdict: str
    tokens: int
    truncated: bool
    substrings: dict[str, int]
    words: dict[str, int]

    @property
    def epistemic(self) -> int:
        """The paper's E(y): substring counts of all markers."""
        return sum(self.substrings.values())


def measure_response(sample: Sample, *, source: str = "", step: int | None = None) -> MeasuredResponse:
    """Measure the tokens and markers of a response.

    The tokens include the stop token. Markers are counted in the whole text, thinking included.
    """
    return MeasuredResponse(
        source=source,
        step=step,
        verdict=UNSCORED if sample.verdict is None else sample.verdict.value,
        tokens=len(sample.response_ids),
        truncated=sample.finish_reason == "length",
        substrings=substring_counts(sample.text),
        words=word_counts(sample.text),
    )


def rollout_files(source: Path) -> list[Path]:
    """The rollout files of a run directory or of its rollouts/, in the order of their steps.

    If `source` is a file, the list holds that file. UserError if there are no rollout files.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source}: no such file or directory; give a run's directory, or a rollouts/*.jsonl of one"
        )
    directory = source / "rollouts" if (source / "rollouts").is_dir() else source
    files = sorted(
        (path for path in directory.glob("step-*.jsonl") if STEP.match(path.name)),
        key=lambda path: step_of(path) or 0,
    )
    if not files:
        raise UserError(
            f"{directory}: holds no step-*.jsonl; give the directory of a run that sampled (run.dir), or a"
            " JSONL file of it"
        )
    return files


def step_of(path: Path) -> int | None:
    """The step in a file name such as step-000012.jsonl; None for a name without a step."""
    found = STEP.search(path.name)
    return int(found[1]) if found else None


def read_responses(sources: Sequence[Path]) -> list[MeasuredResponse]:
    """Measure every response of the sources. UserError for a file that holds no rollouts."""
    return [
        measure_response(sample, source=str(source), step=step_of(path))
        for source in sources
        for path in rollout_files(source)
        for group in load_groups(path)
        for sample in group.samples
    ]


def response_metrics(rows: Sequence[MeasuredResponse]) -> TableRow:
    """A table row with the metrics of the given responses.

    It holds the number of responses, the score, mean tokens (of all, of right, of wrong), and
    markers a response and per 1000 tokens.
    """
    scored = [row for row in rows if row.verdict in ("right", "wrong")]
    tokens = sum(row.tokens for row in rows)
    epistemic, words = sum(row.epistemic for row in rows), sum(sum(row.words.values()) for row in rows)
    return {
        "samples": len(rows),
        "not_judged": len(rows) - len(scored),
        "score": mean([float(row.verdict == "right") for row in scored]),
        "tokens": ratio(tokens, len(rows)),
        "tokens_right": mean([row.tokens for row in rows if row.verdict == "right"]),
        "tokens_wrong": mean([row.tokens for row in rows if row.verdict == "wrong"]),
        "truncated": sum(row.truncated for row in rows),
        "epistemic": ratio(epistemic, len(rows)),
        "epistemic_words": ratio(words, len(rows)),
        "epistemic_per_1000_tokens": ratio(1000 * epistemic, tokens),
    }


def by_step(rows: Sequence[MeasuredResponse]) -> list[TableRow]:
    """Table rows for each source and step, ordered by source and then by step."""
    return [
        {"source": source, "step": step, **response_metrics(chosen)}
        for (source, step), chosen in _grouped(rows)
    ]


def by_verdict(rows: Sequence[MeasuredResponse]) -> list[TableRow]:
    """Table rows for each source and verdict that occurs, and for all verdicts of a source."""
    table = []
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        for verdict in ("all", *VERDICTS):
            chosen = [row for row in own if verdict in ("all", row.verdict)]
            if chosen:
                line = {
                    name: value
                    for name, value in response_metrics(chosen).items()
                    if name in ("samples", "tokens") or name.startswith("epist")
                }
                table.append({"source": source, "verdict": verdict, "share": len(chosen) / len(own), **line})
    return table


def by_marker(rows: Sequence[MeasuredResponse]) -> list[TableRow]:
    """Marker counts in long form: a row for each source, step, verdict and marker.

    The step "all" and the verdict "all" are sums over steps and verdicts.
    """
    table: list[TableRow] = []
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        for step, at_step in [("all", own), *((step, chosen) for (_, step), chosen in _grouped(own))]:
            for verdict in ("all", *VERDICTS):
                chosen = [row for row in at_step if verdict in ("all", row.verdict)]
                head = {"source": source, "step": step, "verdict": verdict, "samples": len(chosen)}
                table += [{**head, **line} for line in marker_rows(chosen)] if chosen else []
    return table


def marker_rows(rows: Sequence[MeasuredResponse]) -> list[TableRow]:
    """A row for each marker: substring and whole-word counts, in total and per response."""
    table = []
    for marker in MARKERS:
        substrings, words = (
            sum(row.substrings[marker] for row in rows),
            sum(row.words[marker] for row in rows),
        )
        table.append(
            {
                "marker": marker,
                "substrings": substrings,
                "words": words,
                "substrings_per_response": ratio(substrings, len(rows)),
                "words_per_response": ratio(words, len(rows)),
            }
        )
    return table


def _grouped(rows: Iterable[MeasuredResponse]) -> list[tuple[tuple[str, int | None], list[MeasuredResponse]]]:
    groups: dict[tuple[str, int | None], list[MeasuredResponse]] = {}
    for row in rows:
        groups.setdefault((row.source, row.step), []).append(row)
    return list(groups.items())
