"""Weights through real GPTModels on 4 gloo ranks.

Proves for TP, PP, EP, DP and their products that load_hf fills every parameter of megatron-core's
own model, that export_hf gives the file bit for bit on world rank 0, in one bucket and in many, and
that the log-probs are those of transformers (layouts without pipelining; fp32, 2e-5 nats). Does not
prove TransformerEngine's spec nor NCCL; sampling engines are in tests/integration.
"""

from __future__ import annotations

from pathlib import Path

from tests.distributed.weights_cases import CASES
from tests.launch import torchrun
from tests.tiny_weights import FAMILIES, tiny_checkpoint


def test_weights_on_four_ranks(tmp_path: Path) -> None:
    for family in FAMILIES:
        tiny_checkpoint(tmp_path / family, family)
    output = torchrun("tests/distributed/weights_cases.py", 4, str(tmp_path), timeout=1500)
    for name in [*CASES, "all"]:
        assert f"ok {name}" in output, output
