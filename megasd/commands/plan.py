"""`megasd plan`: tables of memory, time and layouts, or one JSON object; exit code 2 and a key to
change where a job does not fit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megasd.algo.recipes import RECIPES
from megasd.cluster.planner.fixes import differences, refusal
from megasd.cluster.planner.hardware import GIB, gpu_kind
from megasd.cluster.planner.job import MEAN_PROMPT, MEAN_RESPONSE, PlannedRun, headline
from megasd.cluster.planner.layouts import LayoutPlan, plan_layout, search
from megasd.cluster.planner.shapes import Model
from megasd.config.load import load_config
from megasd.config.schema import Config
from megasd.types import UserError

FITS, REFUSED = 0, 2
# of a checkout
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


def run(args: argparse.Namespace, items: Sequence[str]) -> int:
    """The command. UserError where there is nothing to reckon with."""
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    files = [item for item in items if item not in overrides]
    config = load_config(files, overrides, RECIPES)
    job, source = read_planned_run(
        config, files, gpus=args.gpus, gpu=args.gpu, model_config=args.model_config
    )
    own, found = plan_layout(job), search(job)
    if args.json:
        print(json.dumps(as_json(own, found[: args.top], source), indent=2))
    else:
        print("\n".join(plan_text(own, found[: args.top], len(found), source)))
    if own.fits:
        return FITS
    sys.stdout.flush()
    print(f"megasd: {refusal(own)}", file=sys.stderr, flush=True)
    return REFUSED


def read_planned_run(
    config: Config,
    files: Sequence[str],
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    model_config: str | None = None,
) -> tuple[PlannedRun, str]:
    """The job of a config, and which config.json was read. gpus: those that train; engines' own
    come on top.
    """
    cluster = config.cluster
    kind = gpu_kind(gpu, "--gpu") if gpu else gpu_kind(cluster.gpu)
    hf, source = read_model(config.model.path, files, model_config)
    teacher, path = None, config.algorithm.teacher.model_path if config.algorithm.teacher else None
    if path is not None:
        teacher = Model.of(read_model(path, files, None, "algorithm.teacher.model_path")[0])
    count = gpus or cluster.actor_nodes * cluster.gpus_per_node
    # a part of one node
    if count < cluster.gpus_per_node:
        config = replace(config, cluster=replace(cluster, gpus_per_node=count))
    return (
        PlannedRun(config, Model.of(hf), kind, count, cluster.engine_nodes * cluster.gpus_per_node, teacher),
        source,
    )


def read_model(
    path: str, files: Sequence[str], given: str | None, key: str = "model.path"
) -> tuple[dict[str, Any], str]:
    """config.json of the model and where it lay: `given`, the model's directory, or <name>.json in
    a folder `model` beside the folder of a YAML file or in configs/model of this checkout, for a
    laptop that does not have the model.
    """
    name = f"{Path(path).name}.json"
    places = [Path(given)] if given else [Path(path) / "config.json"]
    if not given:
        folders = [folder for file in files for folder in Path(file).resolve().parents[:2]]
        places += [folder / "model" / name for folder in folders]
        places.append(MODELS / name)
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise UserError(
            f"{key}={path}: no config.json there and no {name} in {places[-1].parent}; give one with"
            " --model-config FILE"
        )
    try:
        hf = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {place} cannot be read as JSON: {error}") from error
    if not isinstance(hf, dict):
        raise UserError(f"{key}: {place} must hold a JSON object")
    return hf, str(place)


# ---- output ----


def as_json(own: LayoutPlan, found: Sequence[LayoutPlan], source: str) -> dict[str, Any]:
    """Whole figures: bytes and seconds."""
    job = own.job
    return {
        "model": {"config": source, "weights": job.model.weights},
        "gpu": job.gpu.name,
        "gpus": job.gpus,
        "engine_gpus": job.engine_gpus,
        "assumptions": {"mean_prompt": job.mean_prompt, "mean_response": job.mean_response},
        "own": _plan_json(own),
        "refusal": None if own.fits else refusal(own),
        # changes: the keys of the config that a layout needs otherwise
        "layouts": [
            _plan_json(one) | {"changes": {fix.key: fix.new for fix in differences(job, one.job)}}
            for one in found
        ],
    }


def _plan_json(one: LayoutPlan) -> dict[str, Any]:
    layout = dict(zip(COLUMNS, _layout(one.job), strict=False))
    if one.refused:
        return {"layout": layout, "fits": False, "refused": one.refused}
    memory, time = one.memory, one.time
    return {
        "layout": layout,
        "fits": one.fits,
        "memory": {
            "stage": memory.stage,
            "limit": memory.limit,
            "peak": memory.peak,
            "worst": memory.worst,
            "phases": memory.phases,
        },
        "time": {
            "seconds": time.seconds,
            "phases": {phase.name: phase.parts for phase in time.phases},
            "bottleneck": {"phase": time.bottleneck.name, "cause": time.bottleneck.cause},
            "tokens_per_second_per_gpu": time.tokens_per_gpu,
            "mfu": time.mfu,
        },
    }


def plan_text(own: LayoutPlan, found: Sequence[LayoutPlan], count: int, source: str) -> list[str]:
    """The tables."""
    job = own.job
    lines = [headline(job, job.model.hf), f"config.json read: {source}", ""]
    if own.refused is None:
        lines += [*memory_table(own), "", *time_table(own), ""]
    lines += [f"{count} layouts fit on {job.gpus} GPUs; * marks the config's own", *layout_table(own, found)]
    return lines


def memory_table(own: LayoutPlan) -> list[str]:
    memory = own.memory
    names = list(dict.fromkeys(name for causes in memory.phases.values() for name in causes))
    rows = [
        [name, *(f"{causes[name] / GIB:.2f}" if name in causes else "" for causes in memory.phases.values())]
        for name in names
    ]
    rows.append(["in all", *(f"{memory.total(phase) / GIB:.2f}" for phase in memory.phases)])
    title = (
        f"GiB of the worst rank (pipeline stage {memory.stage}), every sequence of {own.job.longest} tokens;"
        f" room: {memory.limit / GIB:.2f}"
    )
    return [title, *_aligned([["memory", *memory.phases], *rows])]


def time_table(own: LayoutPlan) -> list[str]:
    time, job = own.time, own.job
    rows = [["phase", "seconds", "waits for", "of which"]]
    for phase in time.phases:
        parts = ", ".join(
            f"{name} {seconds:.2f}"
            for name, seconds in sorted(phase.parts.items(), key=lambda item: -item[1])
        )
        rows.append([phase.name, f"{phase.seconds:.2f}", phase.cause, parts])
    rows.append(["step", f"{time.seconds:.2f}", "", ""])
    worst = time.bottleneck
    return [
        (
            f"seconds of a step, prompts of {job.mean_prompt:.0f} and responses of {job.mean_response:.0f}"
            f" tokens (assumed: {MEAN_PROMPT:g} and {MEAN_RESPONSE:g} of the longest)"
        ),
        *_aligned(rows, left=(0, 2, 3)),
        (
            f"bottleneck: {worst.name}, by {worst.cause}; {time.tokens_per_gpu:.0f} tokens/s/GPU, MFU"
            f" {100 * time.mfu:.0f} % while it trains"
        ),
    ]


COLUMNS = ("TP", "PP", "CP", "EP", "DP", "recompute", "microbatch", "engines")


def _layout(job: PlannedRun) -> list[Any]:
    actor, engine = job.config.actor, job.config.rollout.engine
    size = f"{actor.micro_batch_size} x {job.longest}"
    if actor.max_tokens_per_microbatch is not None:
        size = f"{actor.max_tokens_per_microbatch} tokens"
    engines = f"{job.engines} x TP{engine.tensor_parallel_size}" if job.samples_itself else "-"
    dp = job.gpus // (job.tp * job.pp * job.cp)
    return [job.tp, job.pp, job.cp, job.ep, dp, actor.recompute_granularity or "none", size, engines]


def layout_table(own: LayoutPlan, found: Sequence[LayoutPlan]) -> list[str]:
    head = [
        "",
        *COLUMNS,
        "peak GiB",
        "in",
        "step s",
        "sampling",
        "training",
        "tokens/s/GPU",
        "MFU %",
        "bottleneck",
    ]
    rows = [_row("*", own)] + [_row(str(number), one) for number, one in enumerate(found, 1)]
    return _aligned([head, *rows], left=(0, 6, 7, 8, 10, 16))


def _row(mark: str, one: LayoutPlan) -> list[str]:
    cells = [mark, *map(str, _layout(one.job))]
    if one.refused:
        return [*cells, "", "", "", "", "", "", "", "cannot be split so"]
    memory, time = one.memory, one.time
    sampling = sum(phase.seconds for phase in time.phases if phase.name == "sampling")
    rest = sum(phase.seconds for phase in time.phases if phase.name != "sampling")
    what = f"{time.bottleneck.name}, {time.bottleneck.cause}" if one.fits else "does not fit"
    cells += [
        f"{memory.peak / GIB:.1f}",
        memory.worst,
        f"{time.seconds:.1f}",
        f"{sampling:.1f}",
        f"{rest:.1f}",
    ]
    return [*cells, f"{time.tokens_per_gpu:.0f}", f"{100 * time.mfu:.0f}", what]


def _aligned(rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    cells = [
        [
            cell.ljust(w) if k in left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    rule = ["-" * width for width in widths]
    return ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
