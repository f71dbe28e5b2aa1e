"""The host never waits for the device in the microbatch loop on CUDA, with TransformerEngine's layers.

Proves that no torch call in the runs of teacher and student, forward and backward, padded or
packed, synchronises: CUDA's sync debug mode is "error" inside the schedules. Packed sequences need
actor.apply_rope_fusion for that: Megatron's own rotary embedding reads their lengths. Does not
prove pipelines (Megatron reads the shapes it is sent), nor what libraries do without torch.
"""

from __future__ import annotations

from pathlib import Path

from tests.launch import torchrun
from tests.tiny_weights import tiny_checkpoint


def test_nobody_waits_for_the_gpu(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "qwen3", "qwen3")
    assert "all ok" in torchrun("tests/gpu/sync_gpu_cases.py", 1, str(model))
