"""Every family on CUDA with TransformerEngine's layer spec.

    family_gpu_cases.py DIRECTORY

test_families_gpu.py runs it under torchrun.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import ActorConfig
from tests.distributed.family_cases import CP, PP, SP, TP, FamilyModel, same
from tests.tiny_weights import MODELS

CASES: dict[int, dict[str, dict]] = {
    1: {"tp1": {}},
    2: {"tp2": {TP: 2}, "tp2 sp": {TP: 2, **SP}, "pp2": {PP: 2}, "cp2": {CP: 2}},
}
# dtype -> packing, largest relative difference (Frobenius) of the logits, of a parameter's gradient
TOLERANCES = {"float32": ((False,), 1e-3, 1e-3), "bfloat16": ((False, True), 0.08, 0.3)}


def main(root: Path) -> None:
    device = init_distributed(timeout_minutes=10)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, actor in CASES[int(os.environ["WORLD_SIZE"])].items():
        mesh = init_model_parallel(ActorConfig(**actor), device, seed=1)
        for family in MODELS:
            stored, reference = (
                load_file(root / family / f"{file}.safetensors") for file in ("model", "reference")
            )
            for dtype, (packings, logits_tolerance, gradient_tolerance) in TOLERANCES.items():
                # rounding may send a token to another expert
                if dtype == "bfloat16" and "moe" in family:
                    continue
                for packing in packings:
                    case, start = f"{family} {name} {dtype} packing={packing}", time.perf_counter()
                    model = FamilyModel(root / family, actor | {"dtype": dtype, "packing": packing}, mesh)
                    wanted = {n: t.to(getattr(torch, dtype)) for n, t in stored.items()}
                    same(
                        {n: t.cpu() for n, t in model.export().items()},
                        wanted if mesh.rank == 0 else {},
                        case,
                    )
                    found = model.forward_and_gradients().cpu()
                    logits = (
                        float((found - reference["logits"]).norm() / reference["logits"].norm())
                        if mesh.is_last_stage
                        else 0.0
                    )
                    gradient = model.worst_gradient(reference)
                    assert logits < logits_tolerance, f"{case}: logits differ by {logits:.1e}"
                    assert gradient[0] < gradient_tolerance, (
                        f"{case}: gradient of {gradient[1]} differs by {gradient[0]:.1e}"
                    )
                    if mesh.rank == 0:
                        seconds = time.perf_counter() - start
                        print(
                            f"ok {case}: logits {logits:.1e}, gradients {gradient[0]:.1e}, {seconds:.1f} s",
                            flush=True,
                        )
    torch.distributed.barrier()
    if int(os.environ["RANK"]) == 0:
        print("all ok", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
