"""Tiny random checkpoints as transformers writes them, and the local parameters that a Megatron
model of them has (plain tensors).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("qwen3", "qwen3_tied", "qwen3_moe")
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = PLAIN | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = PLAIN | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.3,
}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": PLAIN,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_parameters": PLAIN | {"rope_theta": 1e6},
}
OLMO: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
# name -> what its config.json has besides COMMON
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": QWEN3,
    "qwen3_tied": QWEN3 | {"tie_word_embeddings": True},
    "qwen3_moe": QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_tied": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "mistral_window": {"model_type": "mistral", "sliding_window": 3},
    "olmo2": OLMO | {"model_type": "olmo2"},
    "olmo3": OLMO
    | {
        "model_type": "olmo3",
        "sliding_window": 3,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
}


def tiny_checkpoint(directory: Path, family: str) -> Path:
    """Save a random 4-layer model of MODELS (96 tokens, hidden 32 or 64) in float32 as transformers
    writes it; norms and biases too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(COMMON | MODELS[family])))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                param.uniform_(-0.5, 0.5)
    model.save_pretrained(directory)
    return directory


def local_params(
    hf: Mapping[str, Any],
    *,
    tp_size: int,
    ep_size: int = 1,
    layers: Iterable[int] = range(4),
    first: bool = True,
    last: bool = True,
    padded_vocab: int | None = None,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """What dict(GPTModel.named_parameters()) of one rank looks like (the shapes written out by
    hand), filled with NaN.
    """
    hidden, heads, groups, dim = (
        hf["hidden_size"],
        hf["num_attention_heads"],
        hf["num_key_value_heads"],
        hf["head_dim"],
    )
    rows = (padded_vocab or hf["vocab_size"]) // tp_size
    shapes: dict[str, tuple[int, ...]] = {}
    if first:
        shapes["embedding.word_embeddings.weight"] = (rows, hidden)
    for layer in layers:
        mlp: dict[str, tuple[int, ...]]
        if hf["model_type"] == "qwen3_moe":
            num_experts, width = hf["num_local_experts"], hf["moe_intermediate_size"]
            mlp = {"mlp.router.weight": (num_experts, hidden)}
            for expert in range(num_experts // ep_size):
                mlp[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * width, hidden)
                mlp[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (hidden, width)
        else:
            width = hf["intermediate_size"] // tp_size
            mlp = {"mlp.linear_fc1.weight": (2 * width, hidden), "mlp.linear_fc2.weight": (hidden, width)}
        shapes |= {
            f"decoder.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,),
                "self_attention.linear_proj.weight": (hidden, heads * dim // tp_size),
                "self_attention.linear_qkv.weight": ((heads + 2 * groups) * dim // tp_size, hidden),
                "self_attention.q_layernorm.weight": (dim,),
                "self_attention.k_layernorm.weight": (dim,),
                "pre_mlp_layernorm.weight": (hidden,),
                **mlp,
            }.items()
        }
    if last:
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        if not hf["tie_word_embeddings"] or not first:
            shapes["output_layer.weight"] = (rows, hidden)
    return {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


def transformers_logps(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Log-probs (nats) of ids[1:]."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1).tolist()
