"""The golden SC-SDPO step on CUDA with TransformerEngine's layer spec, against the float64 twin on the CPU.

Proves that the GPU path computes the same loss and gradient norm (fp32 to 1e-3: TF32 off, other
attention kernels; bf16 to 5e-2) at TP=1 and, where two devices are, TP=2, PP=2, CP=2 and DP=2 over
NCCL. Does not prove FP8.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.launch import torchrun
from tests.tiny_weights import tiny_checkpoint


def test_golden_step_on_gpus(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "qwen3", "qwen3")
    for ranks in (1, 2):
        if ranks <= torch.cuda.device_count():
            assert "all ok" in torchrun("tests/gpu/golden_gpu_cases.py", ranks, str(model))
