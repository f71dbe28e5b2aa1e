"""The results of an evaluation: metrics of scored groups, as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from megasd.evaluation.estimators import COVERAGE, NUM_RESAMPLES, metrics_with_intervals
from megasd.rewards.verifiers import extract_answer, find_verifier
from megasd.types import Group

# files of an evaluation: every sample, how the samples were made, the metrics
SAMPLES, SETTINGS, METRICS = "samples.jsonl", "eval.json", "metrics.json"


def write_results(
    out: Path, groups: list[Group], settings: dict[str, Any], ks: list[int], seconds: float
) -> None:
    """Write metrics.json into `out` and print the table.

    settings: the content of eval.json. ks: the k of pass@k. seconds: the time that all took.
    """
    result = measure_groups(groups, settings, ks)
    write_json(out / METRICS, settings | result | {"seconds": round(seconds, 1)})
    print(results_table(result, settings["num_samples"]))
    print(f"{seconds:.1f} s; everything is in {out}")


def measure_groups(groups: list[Group], settings: dict[str, Any], ks: list[int]) -> dict[str, Any]:
    """The content of metrics.json of scored groups, without the settings.

    {"questions", "samples", "verdicts", "no_answer", "truncated", "mean_response_tokens",
    "mean_score", "interval", "metrics"}
    """
    verifier, seed = settings["verifier"]["verifier"], settings["seed"]
    samples = [s for g in groups for s in g.samples]

    def answer_of(text: str) -> str | None:
        return extract_answer(verifier, text)

    scores = [s.score for s in samples if s.score is not None]
    return {
        "questions": len(groups),
        "samples": len(samples),
        "verdicts": dict(Counter(s.verdict.value for s in samples if s.verdict is not None)),
        "no_answer": sum(answer_of(s.text) is None for s in samples),
        "truncated": sum(s.finish_reason == "length" for s in samples),
        "mean_response_tokens": sum(len(s.response_ids) for s in samples) / max(1, len(samples)),
        "mean_score": sum(scores) / len(scores) if scores else None,
        "interval": {"coverage": COVERAGE, "resamples": NUM_RESAMPLES, "over": "questions", "seed": seed},
        "metrics": metrics_with_intervals(
            groups,
            answer_of if find_verifier(verifier).can_vote else None,
            ks=ks,
            num_samples=settings["num_samples"],
            seed=seed,
        ),
    }


def results_table(result: dict[str, Any], num_samples: int) -> str:
    """The metrics as plain text: a line for each, then counts and the questions left out."""
    lines = [f"{'figure':<18}{'value':>9}{'95% interval':>19}{'questions':>11}"]
    notes = []
    for name, row in result["metrics"].items():
        value = "none" if row["value"] is None else f"{row['value']:.2%}"
        between = "" if row["low"] is None else f"{row['low']:.2%} - {row['high']:.2%}"
        lines.append(f"{name:<18}{value:>9}{between:>19}{row['questions']:>11}")
        if row["left_out"]:
            notes.append((len(row["left_out"]), name))
    verdicts = result["verdicts"]
    counts = ", ".join(f"{verdicts.get(name, 0)} {name}" for name in ("right", "wrong", "error", "timeout"))
    lines.append(
        f"{result['samples']} samples: {counts}; {result['no_answer']} without an answer,"
        f" {result['truncated']} cut off"
    )
    for count in sorted({count for count, _ in notes}):
        names = ", ".join(name for number, name in notes if number == count)
        lines.append(
            f"{count} of {result['questions']} questions are left out of {names}: too few of their"
            f" {num_samples} samples were scored"
        )
    if result["mean_score"] is not None:
        lines.append(f"mean score {result['mean_score']:.4f}")
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; under another name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    writing.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(writing, path)
