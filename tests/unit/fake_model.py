"""A model directory and a data file that pass every check the command line makes before torch; no
weights are in it.
"""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
}
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 48, "num_experts": 6}


def write_model(directory: Path, **changes: object) -> Path:
    """config.json with `changes` (None drops a key), an empty model.safetensors, a tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").touch()
    (directory / "tokenizer.json").write_text("{}")
    return directory


def write_inputs(directory: Path, **changes: object) -> list[str]:
    """A model, train.jsonl and an unused run.dir below `directory`; returns the overrides that name them."""
    model = write_model(directory / "model", **changes)
    train = directory / "train.jsonl"
    train.write_text('{"prompt": "2+3=", "answer": "5"}\n')
    return [f"model.path={model}", f"data.train={train}", f"run.dir={directory / 'run'}"]
