"""Converted directories and Megatron itself, on 4 gloo ranks.

Proves, for every tiny model: plain megatron.core.dist_checkpointing.load fills real GPTModels at TP
2 x PP 2 from a converted directory with what load_hf reads from the Hugging Face file, bit for bit,
and their export equals the file; for some also at TP 4 and with virtual stages, for experts at TP 2
x EP 2 and PP 2 x EP 2 (padded vocabulary everywhere), and for the parameter names of the GPU spec.
What such models save with dist_checkpointing.save is converted back into the file. Does not prove
TransformerEngine's own extra states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megasd.convert.common import ConversionOptions
from megasd.convert.hf_to_megatron import to_megatron
from megasd.convert.megatron_to_hf import to_hf
from tests.distributed.conversion_cases import CASES, SAVING, TE_FAMILIES, TE_NAMES
from tests.launch import torchrun
from tests.tiny_weights import MODELS, tiny_checkpoint


def test_megatron_loads_and_saves_what_is_converted(tmp_path: Path) -> None:
    for family in MODELS:
        to_megatron(
            tiny_checkpoint(tmp_path / "hf" / family, family),
            tmp_path / "megatron" / family,
            ConversionOptions(file_bytes=50_000),
        )
    output = torchrun("tests/distributed/conversion_cases.py", 4, str(tmp_path), timeout=1500)
    names = [f"{family} {name}" for name, (_, _, chosen) in CASES.items() for family in chosen]
    for name in names + [f"{family} {TE_NAMES}" for family in TE_FAMILIES]:
        assert f"ok {name}" in output, f"{name} is not in\n{output}"
    for family in (family for chosen in SAVING.values() for family in chosen):
        to_hf(
            tmp_path / "saved" / family,
            tmp_path / "back" / family,
            ConversionOptions(hf=tmp_path / "hf" / family, check=True),
        )
        found, wanted = (load_file(tmp_path / d / family / "model.safetensors") for d in ("back", "hf"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), family
