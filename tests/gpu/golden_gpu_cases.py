"""Layouts of the golden step on CUDA.

    golden_gpu_cases.py MODEL_DIR

test_golden_gpu.py runs it under torchrun.
"""

from __future__ import annotations

import os
import sys

import torch

from megasd.actor.parallel import init_distributed
from tests.distributed.golden_cases import CP, PP, TP, check, make_batch, make_config, run, twin

CASES: dict[int, dict[str, dict]] = {
    1: {"tp1": {}},
    2: {"tp2": {TP: 2}, "pp2": {PP: 2}, "cp2": {CP: 2}, "dp2": {}},
}
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}


def main() -> None:
    device = init_distributed()
    torch.backends.cuda.matmul.allow_tf32 = False
    batch, model_dir = make_batch(), sys.argv[1]
    want = [twin(model_dir, batch, make_config(model_dir, {}))]
    for name, actor in CASES[int(os.environ["WORLD_SIZE"])].items():
        for dtype, tolerance in TOLERANCES.items():
            # packed attention has no float32 kernel
            for packing in (False, True) if dtype == "bfloat16" else (False,):
                layout = actor | {"dtype": dtype, "packing": packing}
                check(
                    f"{name} {dtype} packing={packing}",
                    run(make_config(model_dir, layout), device, batch, steps=1),
                    want,
                    tolerance,
                )
    torch.distributed.barrier()
    if int(os.environ["RANK"]) == 0:
        print("all ok", flush=True)


if __name__ == "__main__":
    main()
