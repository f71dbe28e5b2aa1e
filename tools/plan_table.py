"""Print the planner's best layouts of three models on 8, 32 and 64 GPUs, as a markdown table.

    python tools/plan_table.py [--gpu h100-80g] [--models Qwen3-8B ...]

The table is in benchmarks/README.md. On 8 GPUs actor and engines share them. On 32 and 64 half of
the nodes train, and the others serve engines. The run is SC-SDPO (an EMA teacher) on 32 questions
of 8 samples, with prompts of at most 2,048 and responses of at most 4,096 tokens, in packed
microbatches. NOTHING HERE WAS MEASURED ON A GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from megasd.algo.recipes import RECIPES
from megasd.cluster.planner.fixes import enough_nodes
from megasd.cluster.planner.hardware import GIB, GPU_KINDS
from megasd.cluster.planner.layouts import LayoutPlan, search
from megasd.commands.plan import MODELS, read_planned_run
from megasd.config.load import load_config

# Number of GPUs -> (nodes that train, nodes of engines).
NODES = {8: (1, 0), 32: (2, 2), 64: (4, 4)}
ITEMS = (
    "data.train=none",
    "rollout.num_prompts=32",
    "rollout.max_prompt_tokens=2048",
    "rollout.max_response_tokens=4096",
    "rollout.max_concurrency=512",
    "rollout.engine.max_total_tokens=196608",
    "actor.packing=true",
    "actor.max_tokens_per_microbatch=8192",
)
COLUMNS = (
    "model",
    "GPUs",
    "actor",
    "recompute",
    "engines",
    "peak GiB",
    "of",
    "step s",
    "sampling s",
    "MFU %",
    "bottleneck",
)


def best(model: str, gpus: int, gpu: str) -> tuple[LayoutPlan | None, str]:
    """The fastest layout that fits, or None and what would help."""
    train, serve = NODES[gpus]
    items = [
        f"model.path={model}",
        f"cluster.gpu={gpu}",
        f"cluster.actor_nodes={train}",
        f"cluster.engine_nodes={serve}",
        *ITEMS,
    ]
    items.append(f"sync.transport={'group' if serve else 'colocated'}")
    job, _ = read_planned_run(load_config([], items, RECIPES), [])
    found = search(job)
    if found:
        return found[0], ""
    nodes = enough_nodes(replace(job.change(sync__transport="group"), engine_gpus=job.engine_gpus or 8))
    return (
        None,
        (
            f"no layout fits; {nodes} nodes that train would do, engines elsewhere"
            if nodes
            else "no layout fits"
        ),
    )


def row(model: str, gpus: int, gpu: str) -> list[str]:
    plan, why = best(model, gpus, gpu)
    if plan is None:
        return [model, str(gpus), why, *[""] * (len(COLUMNS) - 3)]
    job, memory, time = plan.job, plan.memory, plan.time
    actor = (
        f"TP{job.tp} PP{job.pp} CP{job.cp} DP{job.dp}, {job.config.actor.max_tokens_per_microbatch} tokens"
    )
    engines = f"{job.engines} x TP{job.config.rollout.engine.tensor_parallel_size}"
    sampling = next(phase.seconds for phase in time.phases if phase.name == "sampling")
    where = f"{time.bottleneck.name}, {time.bottleneck.cause}"
    recompute = job.config.actor.recompute_granularity or "none"
    numbers = [
        f"{memory.peak / GIB:.1f}",
        memory.worst,
        f"{time.seconds:.0f}",
        f"{sampling:.0f}",
        f"{100 * time.mfu:.0f}",
        where,
    ]
    return [model, str(gpus), actor, recompute, engines, *numbers]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[name for name in GPU_KINDS if name != "cpu"], default="h100-80g")
    parser.add_argument(
        "--models", nargs="+", default=["Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B"], help=f"files of {MODELS}"
    )
    arguments = parser.parse_args(argv)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for model in arguments.models:
        for gpus in NODES:
            print("| " + " | ".join(row(model, gpus, arguments.gpu)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
