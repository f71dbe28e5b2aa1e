"""Live weights from Megatron shards into running SGLang servers, on a CPU.

Proves, with real servers of tensor-parallel size 1 and 2 and actors of TP2, PP2, TP2 x PP2 (dense)
and EP2 (MoE) on 4 ranks: by disk, process group and shared memory alike, every parameter's checksum
in the engine is the actor's, greedy tokens are equal and log-probs too; the plan is made once; a
push while 64 requests run loses none and leaves none of two versions unmarked; a corrupted tensor,
a name that the engine lacks, two pushes at once and the engine's death in the middle end in a clear
error or a whole version, and the next push heals. Does not prove NCCL, CUDA IPC, fp8 nor freeing
memory in colocation (tests/gpu).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import torchrun


def make_models(root: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "dtype": torch.float32,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**common)).float().save_pretrained(root / "dense")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts)).float().save_pretrained(root / "moe")


@pytest.mark.timeout(2500)
# three minutes; test_train.py pushes to a live engine, and to one that died, in make test
@pytest.mark.nightly
def test_pushes(tmp_path: Path) -> None:
    make_models(tmp_path)
    output = torchrun("tests/integration/push_cases.py", 4, str(tmp_path), timeout=2400)
    print("\n".join(line for line in output.splitlines() if line.startswith("ok")))
    for words in (
        "TP2 disk",
        "PP2 group",
        "TP2 x PP2 colocated",
        "EP2 group",
        "delta",
        "64 requests, retract",
        "healed",
        "killed",
        "all",
    ):
        assert f"ok {words}" in output, output
