"""A plan as tables for a reader, and as JSON for a program (`megasd plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megasd.cluster.planner.fixes import differences, refusal
from megasd.cluster.planner.hardware import GIB
from megasd.cluster.planner.job import MEAN_PROMPT, MEAN_RESPONSE, PlannedRun, headline
from megasd.cluster.planner.labels import MEMORY_CAUSES, MEMORY_PHASES, TIME_CAUSES, TIME_PHASES
from megasd.cluster.planner.layouts import LayoutPlan, RefusedLayout
from megasd.cluster.planner.memory import MemoryEstimate
from megasd.cluster.planner.time import Phase, Time


def plan_json(own: LayoutPlan | RefusedLayout, found: Sequence[LayoutPlan], source: str) -> dict[str, Any]:
    """The plan as JSON values, not rounded: bytes and seconds. The keys are an interface.

    own: the layout of the config. found: other layouts that fit, the best first. source: the
    config.json that was read.
    """
    job = own.job
    return {
        "model": {"config": source, "weights": job.model.weights},
        "gpu": job.gpu.name,
        "gpus": job.gpus,
        "engine_gpus": job.engine_gpus,
        "assumptions": {"mean_prompt": job.mean_prompt, "mean_response": job.mean_response},
        "own": _layout_json(own),
        "refusal": None if own.fits else refusal(own),
        # changes: config key -> the value that the layout needs.
        "layouts": [
            _layout_json(plan) | {"changes": {fix.key: fix.new for fix in differences(job, plan.job)}}
            for plan in found
        ],
    }


def _layout_json(plan: LayoutPlan | RefusedLayout) -> dict[str, Any]:
    layout = dict(zip(COLUMNS, _layout(plan.job), strict=False))
    if isinstance(plan, RefusedLayout):
        return {"layout": layout, "fits": False, "refused": plan.reason}
    memory, time = plan.memory, plan.time
    return {
        "layout": layout,
        "fits": plan.fits,
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


def plan_text(
    own: LayoutPlan | RefusedLayout, found: Sequence[LayoutPlan], count: int, source: str
) -> list[str]:
    """The plan as lines of tables.

    own: the layout of the config. found: the layouts shown, the best first, of `count` that fit.
    source: the config.json that was read.
    """
    job = own.job
    lines = [headline(job, job.model.hf), f"config.json read: {source}", ""]
    if isinstance(own, LayoutPlan):
        lines += [*memory_table(own.memory, job), "", *time_table(own.time, job), ""]
    lines += [f"{count} layouts fit on {job.gpus} GPUs; * marks the config's own", *layout_table(own, found)]
    return lines


def memory_table(memory: MemoryEstimate, job: PlannedRun) -> list[str]:
    """Memory of the worst rank: a row for each cause, a column for each phase."""
    keys = list(dict.fromkeys(key for causes in memory.phases.values() for key in causes))
    rows = [
        [
            MEMORY_CAUSES[key].text,
            *(f"{causes[key] / GIB:.2f}" if key in causes else "" for causes in memory.phases.values()),
        ]
        for key in keys
    ]
    rows.append(["in all", *(f"{memory.total(phase) / GIB:.2f}" for phase in memory.phases)])
    title = (
        f"GiB of the worst rank (pipeline stage {memory.stage}), every sequence of {job.longest} tokens;"
        f" room: {memory.limit / GIB:.2f}"
    )
    return [title, *_aligned([["memory", *(MEMORY_PHASES[key].text for key in memory.phases)], *rows])]


def time_table(time: Time, job: PlannedRun) -> list[str]:
    """Seconds of a step: a row for each phase, and the bottleneck."""
    rows = [["phase", "seconds", "waits for", "of which"]]
    for phase in time.phases:
        parts = ", ".join(
            f"{TIME_CAUSES[key].text} {seconds:.2f}"
            for key, seconds in sorted(phase.parts.items(), key=lambda item: -item[1])
        )
        label, cause = TIME_PHASES[phase.name].text, TIME_CAUSES[phase.cause].text
        rows.append([label, f"{phase.seconds:.2f}", cause, parts])
    rows.append(["step", f"{time.seconds:.2f}", "", ""])
    return [
        (
            f"seconds of a step, prompts of {job.mean_prompt:.0f} and responses of {job.mean_response:.0f}"
            f" tokens (assumed: {MEAN_PROMPT:g} and {MEAN_RESPONSE:g} of the longest)"
        ),
        *_aligned(rows, left=(0, 2, 3)),
        (
            f"bottleneck: {_bottleneck(time.bottleneck)}; {time.tokens_per_gpu:.0f} tokens/s/GPU, MFU"
            f" {100 * time.mfu:.0f} % while it trains"
        ),
    ]


def _bottleneck(phase: Phase) -> str:
    return f"{TIME_PHASES[phase.name].text}, by {TIME_CAUSES[phase.cause].text}"


# Columns that say how the run is cut; keys of "layout" in --json too.
COLUMNS = ("TP", "PP", "CP", "EP", "DP", "recompute", "microbatch", "engines")


def _layout(job: PlannedRun) -> list[Any]:
    actor, engine = job.config.actor, job.config.rollout.engine
    size = f"{actor.micro_batch_size} x {job.longest}"
    if actor.max_tokens_per_microbatch is not None:
        size = f"{actor.max_tokens_per_microbatch} tokens"
    engines = f"{job.engines} x TP{engine.tensor_parallel_size}" if job.samples_itself else "-"
    dp = job.gpus // (job.tp * job.pp * job.cp)
    return [job.tp, job.pp, job.cp, job.ep, dp, actor.recompute_granularity or "none", size, engines]


def layout_table(own: LayoutPlan | RefusedLayout, found: Sequence[LayoutPlan]) -> list[str]:
    """A row for the layout of the config and for each of `found`."""
    head = [
        "",
        *COLUMNS,
        "peak GiB",
        "in phase",
        "step s",
        "sampling",
        "training",
        "tokens/s/GPU",
        "MFU %",
        "bottleneck",
    ]
    rows = [_row("*", own)] + [_row(str(number), plan) for number, plan in enumerate(found, 1)]
    return _aligned([head, *rows], left=(0, 6, 7, 8, 10, 16))


def _row(mark: str, plan: LayoutPlan | RefusedLayout) -> list[str]:
    cells = [mark, *map(str, _layout(plan.job))]
    if isinstance(plan, RefusedLayout):
        return [*cells, "", "", "", "", "", "", "", "cannot be split this way"]
    memory, time = plan.memory, plan.time
    sampling = sum(phase.seconds for phase in time.phases if phase.name == "sampling")
    rest = sum(phase.seconds for phase in time.phases if phase.name != "sampling")
    what = _bottleneck(time.bottleneck) if plan.fits else "does not fit"
    cells += [
        f"{memory.peak / GIB:.1f}",
        MEMORY_PHASES[memory.worst].text,
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
