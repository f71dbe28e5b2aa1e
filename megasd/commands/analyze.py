"""What `megasd analyze` does: measure kept rollouts, measure a live model under guidance, lay out a
sweep of task coverage.

After Kim et al. (arXiv 2603.24472). Tables are CSV and markdown, plots are PNG where matplotlib is
installed, samples are kept, so that every figure can be computed again without the model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config
from megasd.config.schema import Config
from megasd.config.validate import validate
from megasd.evaluation.analysis import coverage, guidance, rollouts, tables
from megasd.evaluation.analysis.markers import MARKERS
from megasd.types import Group, UserError

if TYPE_CHECKING:
    from megasd.evaluation.analysis.study import Study


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """One `megasd analyze` command. `rest`: positionals that stood behind an option."""
    {"rollouts": analyze_rollouts, "guidance": analyze_guidance, "coverage": write_coverage}[args.what](
        args, rest
    )


# ---- rollouts ------------------------------------------------------------------------------------


def analyze_rollouts(args: argparse.Namespace, rest: list[str]) -> None:
    """Tables and plots of kept rollouts, by step and by verdict, into --out."""
    sources = [Path(source) for source in args.sources + rest]
    if args.out is None and (len(sources) > 1 or sources[0].is_file()):
        raise UserError(
            "--out: give a directory for the tables; only for one run directory it has a default,"
            " RUN_DIR/analysis"
        )
    rows = rollouts.read_responses(sources)
    if not rows:
        raise UserError(f"{sources[0]}: its rollout files hold no samples")
    out = _directory(Path(args.out or sources[0] / "analysis"))
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
            _marker_table([row for row in totals if row["source"] == source], "verdict"),
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
        _plot_rollouts(out, by_step, by_marker)
    _say_where(out, len(rows), tables.markdown(by_verdict))


MARKER_NOTE = (
    "`epistemic` is the paper's count (arXiv 2603.24472): occurrences of ten words of doubt a response, as"
    ' substrings, so "unlikely" counts for "likely". `epistemic_words` counts whole words only. `score` is'
    " the share of right answers among those that were judged; `not_judged` are verifier errors and timeouts."
    " Tokens and counts are means over responses.\n"
)


def _marker_table(rows: list[tables.TableRow], across: str) -> str:
    """Markers down, `across` to the right: substrings and whole words a response."""
    named = [
        {**row, "substrings": row["substrings_per_response"], "words": row["words_per_response"]}
        for row in rows
    ]
    return tables.markdown(tables.pivot(named, "marker", across, ["substrings", "words"]))


def _plot_rollouts(out: Path, by_step: list[tables.TableRow], by_marker: list[tables.TableRow]) -> None:
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


# ---- guidance ------------------------------------------------------------------------------------


GUIDANCE_FILES = (
    "analysis.json",
    "summary.md",
    "guidance.csv",
    "markers.csv",
    "kl.csv",
    "guidance.png",
    "kl.png",
)
PANELS = (("score", "score"), ("tokens a response", "tokens"), ("epistemic markers a response", "epistemic"))


def analyze_guidance(args: argparse.Namespace, rest: list[str]) -> None:
    """The four guidance settings on a live engine, and the KL between teacher and student, into --out."""
    from megasd.data.chat import Chat
    from megasd.data.prompts import load_prompts
    from megasd.data.rollout_log import save_groups
    from megasd.evaluation.analysis.study import Bounds, Study
    from megasd.evaluation.engine_for import open_guest_engine
    from megasd.rewards.reward_pool import RewardPool

    began, config = time.monotonic(), guidance_config(args, args.items + rest)
    out = Path(args.out)
    if (out / "analysis.json").exists() and not args.overwrite:
        raise UserError(
            f"--out {out}: already holds an analysis (analysis.json); give another directory, or --overwrite"
        )
    chat = Chat(config.model.path, enable_thinking=config.model.enable_thinking)
    prompts = load_prompts(
        config.data.train, max_row_bytes=config.data.max_row_bytes, mapping=config.data.mapping
    )
    _directory(out)
    # what is there at the end is of this one
    for old in [out / name for name in GUIDANCE_FILES] + list(out.glob("samples-*.jsonl")):
        old.unlink(missing_ok=True)

    def keep(samples: dict[str, list[Group]]) -> None:
        for setting, groups in samples.items():
            save_groups(out / f"samples-{setting}.jsonl", groups)

    kl: list[tables.TableRow] = []
    with open_guest_engine(config, chat=chat, out=out) as engine, RewardPool(config.reward) as rewards:
        study = Study(config, chat, engine, rewards, say=lambda line: print(line, flush=True))
        study.sample(prompts, Bounds(args.min_accuracy, args.max_accuracy, args.num_questions), keep)
        if args.kl == "engine":
            kl = study.engine_kl(per_question=args.kl_samples, top_k=args.top_k)
    # the engine has gone, and its memory with it
    if args.kl == "transformers":
        kl = study.full_kl(per_question=args.kl_samples)
    write_guidance(out, study, kl, args, seconds=time.monotonic() - began)


def guidance_config(args: argparse.Namespace, items: list[str]) -> Config:
    """The config of an analysis: YAML files, key=value, and what the options say. Sets args.kl.
    UserError for options that clash.
    """
    by_url = args.source.startswith(("http://", "https://"))
    if by_url and args.model is None:
        raise UserError(
            f"{args.source}: also give --model DIR, the Hugging Face directory (tokenizer, config.json) of"
            " what it serves"
        )
    if not by_url and args.model is not None:
        raise UserError("--model: goes with a URL; SOURCE is a directory, and the model")
    if not 0 <= args.min_accuracy <= args.max_accuracy <= 1:
        raise UserError(
            f"--min-accuracy {args.min_accuracy:g} --max-accuracy {args.max_accuracy:g}: give 0 <= least <="
            " most <= 1"
        )
    for name in ("num_samples", "num_questions", "top_k", "kl_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    args.kl = args.kl or ("engine" if by_url else "transformers")
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    own = [f"model.path={args.model or args.source}", f"data.train={args.data}", f"run.dir={args.out}"]
    own += [
        f"rollout.num_samples={args.num_samples}",
        f"rollout.engine.urls=[{args.source if by_url else ''}]",
        "rollout.engine.model_path=null",
    ]
    return load_config([item for item in items if item not in overrides], [*overrides, *own], RECIPES)


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
    out: Path, study: Study, kl: list[tables.TableRow], args: argparse.Namespace, *, seconds: float
) -> None:
    """guidance.csv, markers.csv, kl.csv, summary.md, analysis.json (last: it says that the rest is
    whole), and plots.
    """
    samples = study.samples
    table, markers = guidance.guidance_table(samples), guidance.guidance_by_marker(samples)
    for name, rows in (("guidance", table), ("markers", markers), *([("kl", kl)] if kl else [])):
        tables.write_csv(out / f"{name}.csv", rows)
    figures = [{name: value for name, value in row.items() if name not in MARKERS} for row in table]
    text = ["# Guidance\n", GUIDANCE_NOTE, MARKER_NOTE, tables.markdown(figures), "## Markers a response\n"]
    text += [_marker_table(markers, "setting")]
    text += ["## KL between teacher and student\n", KL_NOTE] if kl else []
    for direction in dict.fromkeys(row["divergence"] for row in kl):
        own = [row for row in kl if row["divergence"] == direction]
        wide = tables.pivot(own, "marker", "setting", ["kl", "ratio_to_mean"])
        # the same tokens under every setting
        counts = {row["marker"]: row["tokens"] for row in own}
        rows = [
            {"marker": row.pop("marker"), "tokens": counts[name], **row}
            for name, row in zip(counts, wide, strict=True)
        ]
        text += [f"{direction}, {own[0]['support']}, nats:\n", tables.markdown(rows)]
    if study.left_out:
        text += ["## Left out\n", *(f"- {name}: {why}" for name, why in study.left_out.items()), ""]
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")
    if tables.can_plot():
        _plot_guidance(out, table, kl)
    config = study.config
    record: dict[str, Any] = {
        "source": args.source,
        "model": config.model.path,
        "data": config.data.train,
        "seed": config.run.seed,
        "bounds": [args.min_accuracy, args.max_accuracy],
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
        "kl": {"by": args.kl, "support": kl[0]["support"], "responses": study.kl_responses} if kl else None,
        "seconds": round(seconds, 1),
        "accuracy": study.accuracy,
    }
    (out / "analysis.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shown = ("setting", "questions", "samples", "score", "tokens", "epistemic", "epistemic_words")
    _say_where(
        out,
        sum(row["samples"] for row in table),
        tables.markdown([{name: row[name] for name in shown} for row in table]),
    )


def _plot_guidance(out: Path, table: list[tables.TableRow], kl: list[tables.TableRow]) -> None:
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


# ---- coverage ------------------------------------------------------------------------------------


def write_coverage(args: argparse.Namespace, rest: list[str]) -> None:
    """The rows and the overlay of each size into --out; prints the commands. Each overlay has
    passed the checks of `megasd train`.
    """
    from megasd.algo.stages import check_stages
    from megasd.data.prompts import load_prompts

    files = args.configs + rest
    for item in files:
        if re.match(r"[\w.]+=", item):
            raise UserError(
                f"{item}: a sweep takes YAML files, so that its commands say everything; put the key into a"
                " file"
            )
    config, out = load_config(files, [], RECIPES), Path(args.out)
    prompts = load_prompts(
        config.data.train, max_row_bytes=config.data.max_row_bytes, mapping=config.data.mapping
    )
    sizes = coverage.parse_sizes(args.sizes)
    seed = config.run.seed if args.seed is None else args.seed
    _directory(out)
    commands = []
    for size, chosen in coverage.nested(prompts, sizes, seed=seed, source=config.data.train).items():
        data, target = out / f"coverage-{size}.jsonl", out / f"coverage-{size}.yaml"
        rows = [coverage.coverage_row(prompt) for prompt in chosen]
        longest = max(len(line.encode()) for line in rows)
        tree = coverage.overlay(config, size, data=data, run_dir=out / f"run-{size}", row_bytes=longest)
        data.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
        _write_yaml(
            target,
            tree,
            f"{size} of the {len(prompts)} rows of {config.data.train}, seed {seed}; on top of"
            f" {' '.join(files)}",
        )
        try:
            sized = load_config([*files, str(target)], [], RECIPES)
            check_stages(sized)
            validate(sized)
        except UserError as error:
            raise UserError(f"size {size} ({target}): {error}") from error
        commands.append(shlex.join(["megasd", "train", *files, str(target)]))
    print("\n".join(commands))


def _write_yaml(path: Path, tree: dict[str, Any], comment: str) -> None:
    import yaml

    path.write_text(
        f"# {comment}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}", encoding="utf-8"
    )


# ---- files ---------------------------------------------------------------------------------------


def _directory(path: Path) -> Path:
    """`path`, made if it is missing. UserError where it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be made ({error.strerror}); choose another directory"
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--out {path}: cannot be written to; choose another directory")
    return path


def _say_where(out: Path, samples: int, table: str) -> None:
    print(table, end="")
    if not tables.can_plot():
        print(tables.NO_PLOTS)
    print(f"{samples} responses; tables in {out}, begin with {out / 'summary.md'}")
