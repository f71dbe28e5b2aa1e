"""Every model family through real GPTModels on 4 gloo ranks, against transformers in float32.

Proves for each tiny model of tests/tiny_weights.py (grouped and single key heads, tied and untied,
biases, llama3 and YaRN rope, windows, post-norm layers, experts) and TP 1, 2, 4, sequence
parallelism, packing, PP 2, full recompute, EP 2, and windows under CP 2: load and export give the
file back bit for bit; logits differ from transformers' by less than 1e-4; the gradient of every
parameter by less than 1e-4 of its norm, and so does the norm of all of them as Megatron's optimizer
computes it. The same for the GPU's layer spec and parameter names, with stand-ins for
TransformerEngine's modules. For two virtual stages on each of two pipeline stages: round trip and
logits. Does not prove TransformerEngine's spec (tests/gpu/test_families_gpu.py), nor Megatron's
interleaved schedule.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.family_cases import ALL, CASES, TE_FAMILIES, TE_NAMES
from tests.families_reference import write_reference
from tests.launch import torchrun
from tests.tiny_weights import MODELS, tiny_checkpoint


# a minute; tests/unit/models/test_families.py has the names and shapes of every family in make test
@pytest.mark.nightly
def test_families_on_four_ranks(tmp_path: Path) -> None:
    for family in MODELS:
        write_reference(tiny_checkpoint(tmp_path / family, family))
    output = torchrun("tests/distributed/family_cases.py", 4, str(tmp_path), timeout=1500)
    names = [f"{family} {name}" for name, (_, chosen) in CASES.items() for family in chosen]
    names += [f"{family} {TE_NAMES}" for family in TE_FAMILIES] + [
        f"{family} pp2 x 2 virtual stages" for family in ALL
    ]
    for name in [*names, "all"]:
        assert f"ok {name}" in output, f"{name} is not in\n{output}"
    print(output)
