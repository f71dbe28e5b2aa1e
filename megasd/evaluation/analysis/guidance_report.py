"""The report of `megasd analyze guidance`: tables, plots, and a record of how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasd.evaluation.analysis import guidance, tables
from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.analysis.output import MARKER_NOTE, marker_table, say_where

if TYPE_CHECKING:
    from megasd.evaluation.analysis.study import Bounds, Study

# A new analysis removes these files of an earlier analysis.
GUIDANCE_FILES = (
    "analysis.json",
    "summary.md",
    "guidance.csv",
    "markers.csv",
    "kl.csv",
    "guidance.png",
    "kl.png",
)
# The panels of guidance.png: (label, column).
PANELS = (("score", "score"), ("tokens a response", "tokens"), ("epistemic markers a response", "epistemic"))
GUIDANCE_NOTE = (
    "Settings (arXiv 2603.24472): `none` the question alone; `solution` with a correct rollout, thinking"
    " included; `solution_without_thinking`; `regenerated` with a response that was written under `solution`."
    " The score of `none` is that of the samples by which the questions were chosen, so it lies within the"
    " bounds of that choice.\n"
)
KL_NOTE = (
    "T reads the guided prompt, S the question; both read S's own unguided responses, without the one that"
    " was shown to T. `kl` is a mean over tokens in nats, temperature 1; `ratio_to_mean` divides it by that"
    " of all tokens. A marker's tokens are those that write a character of one of its occurrences; `any` are"
    " those of all markers together, `others` all that are of none.\n"
)


def write_guidance(
    out: Path,
    study: Study,
    kl: list[tables.TableRow],
    *,
    source: str,
    bounds: Bounds,
    kl_by: str,
    seconds: float,
) -> None:
    """Write guidance.csv, markers.csv, kl.csv, summary.md, the plots and analysis.json into `out`.

    analysis.json is written last: if it is there, all other files are whole. kl: rows of the KL
    table, [] if no KL was measured. source: the model or URL that was sampled. kl_by: the value of
    --kl.
    """
    samples = study.samples
    table, markers = guidance.guidance_table(samples), guidance.guidance_by_marker(samples)
    for name, rows in (("guidance", table), ("markers", markers), *([("kl", kl)] if kl else [])):
        tables.write_csv(out / f"{name}.csv", rows)
    (out / "summary.md").write_text(_summary(study, table, markers, kl), encoding="utf-8")
    if tables.can_plot():
        plot_guidance(out, table, kl)
    record = _record(study, kl, source=source, bounds=bounds, kl_by=kl_by, seconds=seconds)
    (out / "analysis.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shown = ("setting", "questions", "samples", "score", "tokens", "epistemic", "epistemic_words")
    say_where(
        out,
        sum(row["samples"] for row in table),
        tables.markdown([{name: row[name] for name in shown} for row in table]),
    )


def _summary(
    study: Study,
    table: list[tables.TableRow],
    markers: list[tables.TableRow],
    kl: list[tables.TableRow],
) -> str:
    """The text of summary.md."""
    per_setting = [{name: value for name, value in row.items() if name not in MARKERS} for row in table]
    text = [
        "# Guidance\n",
        GUIDANCE_NOTE,
        MARKER_NOTE,
        tables.markdown(per_setting),
        "## Markers a response\n",
    ]
    text += [marker_table(markers, "setting")]
    text += ["## KL between teacher and student\n", KL_NOTE] if kl else []
    for direction in dict.fromkeys(row["divergence"] for row in kl):
        own = [row for row in kl if row["divergence"] == direction]
        wide = tables.pivot(own, "marker", "setting", ["kl", "ratio_to_mean"])
        # A marker has the same tokens under every setting.
        counts = {row["marker"]: row["tokens"] for row in own}
        rows = [
            {"marker": row.pop("marker"), "tokens": counts[name], **row}
            for name, row in zip(counts, wide, strict=True)
        ]
        text += [f"{direction}, {own[0]['support']}, nats:\n", tables.markdown(rows)]
    if study.left_out:
        text += ["## Left out\n", *(f"- {name}: {why}" for name, why in study.left_out.items()), ""]
    return "\n".join(text)


def _record(
    study: Study,
    kl: list[tables.TableRow],
    *,
    source: str,
    bounds: Bounds,
    kl_by: str,
    seconds: float,
) -> dict[str, Any]:
    """The content of analysis.json: how the tables were made."""
    config, samples = study.config, study.samples
    return {
        "source": source,
        "model": config.model.path,
        "data": config.data.train,
        "seed": config.run.seed,
        "bounds": [bounds.low, bounds.high],
        "num_samples": config.rollout.num_samples,
        "template": study.template,
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "top_k": config.rollout.top_k,
        "max_response_tokens": config.rollout.max_response_tokens,
        "verifier": config.reward.verifier,
        "questions": [group.prompt.id for group in samples["none"]],
        "left_out": study.left_out,
        "solutions_of_rows": sum(study.demonstrations[g.prompt.id].index is None for g in samples["none"]),
        "kl": {"by": kl_by, "support": kl[0]["support"], "responses": study.kl_responses} if kl else None,
        "seconds": round(seconds, 1),
        "accuracy": study.accuracy,
    }


def plot_guidance(out: Path, table: list[tables.TableRow], kl: list[tables.TableRow]) -> None:
    """Plot the settings side by side (guidance.png) and the KL of markers, if any (kl.png)."""
    panels = [(label, {label: [row[name] for row in table]}) for label, name in PANELS]
    tables.plot_bars(out / "guidance.png", panels, [row["setting"] for row in table])
    own = [row for row in kl if row["divergence"] == "KL(T||S)"]
    if own:
        names = list(dict.fromkeys(row["marker"] for row in own if row["marker"] != "all"))
        by = {
            s: {row["marker"]: row["ratio_to_mean"] for row in own if row["setting"] == s}
            for s in guidance.GUIDED
        }
        tables.plot_bars(
            out / "kl.png",
            [("KL(T||S), ratio to the mean", {s: [by[s][n] for n in names] for s in by})],
            names,
        )
