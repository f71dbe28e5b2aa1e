"""Every model family on CUDA with TransformerEngine's layer spec, against transformers on the CPU.

Where megatron-bridge is installed, also against it.

Proves, where a GPU with the `te` extra is: post-norm layers, norms over all heads, windows, rotary
tables and biases in TransformerEngine's modules give transformers' logits and gradients (float32 to
1e-3; bfloat16 to its rounding, packed too) at TP=1 and, on two devices, TP=2 with and without
sequence parallelism, PP=2 and CP=2; files come back bit for bit. With megatron-bridge: both fill
the same Megatron parameters. Does not prove FP8 parameters. tests/te_stand_ins.py runs the same
layer spec with torch modules on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families_reference import write_reference
from tests.launch import torchrun
from tests.tiny_weights import MODELS, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformer_engine")
    root = tmp_path_factory.mktemp("families")
    for family in MODELS:
        write_reference(tiny_checkpoint(root / family, family))
    return root


def test_families_on_gpus(checkpoints: Path) -> None:
    for ranks in (1, 2):
        if ranks <= torch.cuda.device_count():
            assert "all ok" in torchrun("tests/gpu/family_gpu_cases.py", ranks, str(checkpoints))


# megatron-bridge knows these; it must be installed with a transformers that it accepts.
BRIDGED = ("qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "llama", "mistral")


@pytest.mark.parametrize("family", BRIDGED)
def test_megatron_bridge_fills_the_same_parameters(checkpoints: Path, family: str) -> None:
    bridge = pytest.importorskip("megatron.bridge")
    from megasd.actor.parallel import init_distributed, init_model_parallel
    from megasd.config.schema import ActorConfig
    from megasd.models.param_table import global_params
    from tests.distributed.family_cases import FamilyModel

    mesh = init_model_parallel(ActorConfig(), init_distributed(timeout_minutes=10), seed=1)
    ours = FamilyModel(
        checkpoints / family, {"dtype": "bfloat16", "make_vocab_size_divisible_by": 1}, mesh
    ).params
    provider = bridge.AutoBridge.from_hf_pretrained(str(checkpoints / family)).to_megatron_provider()
    provider.make_vocab_size_divisible_by = 1
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    theirs = global_params({name.removeprefix("module."): param for name, param in model.named_parameters()})
    assert theirs.keys() == ours.keys()
    for name, param in ours.items():
        assert torch.equal(param, theirs[name]), name
