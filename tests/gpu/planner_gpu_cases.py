"""Measures the allocator's peak of a whole step on one GPU, next to the planner's number.

A step is the teacher's forward, the student's forward and backward, and the optimizer's step.

    python tests/gpu/planner_gpu_cases.py '[{"model": {...}, "items": [...]}]'

It prints a line of JSON per case: {"planned": bytes, "measured": bytes, "causes": {...}}. planned
leaves out memory that the allocator does not see: the CUDA context, NCCL, fragmentation, engines.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.algo.recipes import RECIPES
from megasd.cluster.planner import memory
from megasd.cluster.planner.hardware import GPU_KINDS
from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.shapes import Model
from megasd.config.load import load_config
from megasd.models import registry
from tests.distributed.planner_cases import QWEN3, longest_batch

UNSEEN = ("fragmentation", "NCCL", "context", "engine overhead", "engine weights", "KV cache", "sync")


def run(case: dict[str, Any], directory: Path, device: torch.device) -> dict[str, Any]:
    hf = QWEN3 | case.get("model", {})
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    shapes = registry.param_table(hf).expected_tensors()
    save_file(
        {n: (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()}, directory / "model.safetensors"
    )
    config = load_config([], [f"model.path={directory}", "data.train=none", *case["items"]], RECIPES)
    job = PlannedRun(config, Model.of(hf), GPU_KINDS["h200-141g"], gpus=1)
    actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
    batch = longest_batch(config, actor.vocab_size, job.longest_teacher - config.rollout.max_response_tokens)
    # The first step makes Adam's moments.
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        batches = actor.shard(batch)
        actor.update(batches, actor.teacher_forward(batches))
    measured = torch.cuda.max_memory_allocated()
    phases = memory.estimate_memory(job).phases
    causes = {
        phase: {k: v for k, v in found.items() if k not in UNSEEN}
        for phase, found in phases.items()
        if phase != "sampling"
    }
    worst = max(causes, key=lambda phase: sum(causes[phase].values()))
    del actor, batches
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "planned": sum(causes[worst].values()),
        "measured": measured,
        "phase": worst,
        "causes": causes[worst],
    }


def main() -> None:
    device = init_distributed(timeout_minutes=5)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(json.loads(sys.argv[1])):
            print("CASE " + json.dumps(run(case, Path(folder) / str(number), device)), flush=True)


if __name__ == "__main__":
    main()
