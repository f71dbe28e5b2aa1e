"""Steps under CUDA's sync debug mode.

    sync_gpu_cases.py MODEL_DIR

test_sync_gpu.py runs it under torchrun.
"""

from __future__ import annotations

import sys

import torch

from megasd.actor import student as student_module
from megasd.actor import teacher as teacher_module
from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import DistillTerm, PolicyGradientTerm, TeacherConfig
from tests.distributed.golden_cases import TOP_K, credit, make_batch, make_config, methods_batch

PACKED = {"packing": True, "max_tokens_per_microbatch": 256, "apply_rope_fusion": True}
CASES: dict[str, tuple[dict, dict]] = {
    "bucket": ({}, {}),
    "packed, budget": (PACKED, {}),
    "full": ({}, {"distill": DistillTerm(support="full", beta=0.0)}),
    "record": (
        PACKED,
        {
            "distill": DistillTerm(support="teacher", top_k=TOP_K, beta=0.0),
            "teacher": TeacherConfig(transport="record"),
        },
    ),
    "policy gradient": ({}, {"policy_gradient": PolicyGradientTerm(coefficient=0.3)}),
    "credit": ({}, credit("cepo")),
}


def watch() -> None:
    """From here on a wait inside the schedules is an error."""
    real = student_module.run_microbatches

    def watched(*args: object, **kwargs: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for module in (student_module, teacher_module):
        module.run_microbatches = watched


def main() -> None:
    device, real = init_distributed(), student_module.run_microbatches
    for name, (layout, algorithm) in CASES.items():
        config = make_config(sys.argv[1], {"dtype": "bfloat16"} | layout, **algorithm)
        actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
        batch = methods_batch() if name == "credit" else make_batch()
        # the first compiles kernels and makes workspaces
        for step in range(2):
            if step == 1:
                watch()
            batches = actor.shard(batch)
            actor.update(batches, actor.teacher_forward(batches))
        for module in (student_module, teacher_module):
            module.run_microbatches = real
        print(f"ok {name}", flush=True)
    print("all ok", flush=True)


if __name__ == "__main__":
    main()
