"""One golden SC-SDPO run under every layout, on gloo with real Megatron models.

Proves: loss and gradient norm of 4 steps (fp32, distributed optimizer, EMA teacher, padded
vocabulary, samples without a teacher, uninformative questions) agree with TP=1 to 1e-5 relative for
TP, PP, CP, DP, SP, EP, tied embeddings, packing, recomputation and microbatch splits; the first
step agrees with a float64 twin; bf16 parameters stay within 5 percent of it; log-probs, top-k and
entropy agree with transformers to 1e-4 (fp32). Does not prove CUDA, NCCL or TransformerEngine
(tests/gpu).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import torchrun
from tests.tiny_weights import tiny_checkpoint


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """(dense, MoE and tied model, trace file), the trace written by one rank."""
    root: Path = tmp_path_factory.mktemp("golden")
    models = [str(tiny_checkpoint(root / family, family)) for family in ("qwen3", "qwen3_moe", "qwen3_tied")]
    arguments = (*models, str(root / "trace.json"))
    output = torchrun("tests/distributed/golden_cases.py", 1, *arguments)
    assert "ok float64 twin" in output and "all ok" in output, output
    return arguments


# eight are slow on two cores
@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.nightly)])
def test_every_layout_gives_the_same_run(golden: tuple[str, ...], ranks: int) -> None:
    assert "all ok" in torchrun("tests/distributed/golden_cases.py", ranks, *golden)
