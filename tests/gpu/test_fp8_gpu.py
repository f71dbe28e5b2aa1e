"""FP8 training, CUDA graphs, recomputation and the layer spec on one GPU with TransformerEngine.

The cases are in fp8_gpu_cases.py.

Proves, where a Hopper GPU with the `te` extra is: a step in FP8 (each recipe, parameters kept in
bf16 or FP8) has bf16's loss to 2 percent and the loss falls; TransformerEngine's layers give the
local ones' logits; FP8 parameters take less memory than bf16's; graphs change no loss; every
recompute setting gives the same loss, full in less memory; what an FP8 model exports are its main
parameters to FP8's rounding; the average teacher stays the average of the student and leaves its
bytes alone; checkpoints of FP8 models resume. Does not prove anything over several ranks, nor speed
(tools/bench_step.py). Never run so far.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import torchrun

CASES = ("losses", "spec", "memory", "graph", "recompute", "export", "teacher", "checkpoint")
NEEDS_FP8 = ("losses", "memory", "export", "teacher", "checkpoint")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformer_engine")
    from tests.gpu.fp8_gpu_cases import small_checkpoint

    return small_checkpoint(tmp_path_factory.mktemp("fp8") / "model")


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, model: Path) -> None:
    """A process each: TransformerEngine's FP8 state and Megatron's CUDA graphs are global."""
    if case in NEEDS_FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs a GPU of compute capability 8.9 or later")
    print(output := torchrun("tests/gpu/fp8_gpu_cases.py", 1, str(model), case))
    assert "all ok" in output
