"""Whether the actor, the teacher and the engines can take the model that a config names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megasd.config.schema import Config, ConfigError
from megasd.config.validate_actor import check_sizes, sequence_multiple
from megasd.config.validate_parallel import longest_sequence

# model_type of the families of models/registry.py
MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "olmo2", "olmo3")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model(config: Config) -> None:
    """Read model.path; refuse a model that this config cannot train. Raises ConfigError."""
    directory = Path(config.model.path)
    check_model_values(config, _read_model(directory, "model.path"), directory)


def check_model_values(config: Config, model: dict[str, Any], directory: Path) -> None:
    """Refuse a model whose ranks get unequal parts, or whose positions do not suffice.

    model: the content of its config.json. directory: where it is, for the messages; no file is read.
    Raises ConfigError.
    """
    limit = _check_split(config, model, directory, "model.path")
    rollout, evaluated = config.rollout, config.evaluation.max_response_tokens
    total = longest_sequence(config)
    if total > limit:
        raise ConfigError(
            f"rollout.max_response_tokens={rollout.max_response_tokens}: with"
            f" rollout.max_prompt_tokens={rollout.max_prompt_tokens} a sequence takes {total} tokens (padded"
            f" to {sequence_multiple(config)}), above max_position_embeddings={limit} of the model; lower one"
        )
    _check_engine_reads(model, directory, max(total, rollout.max_prompt_tokens + (evaluated or 0)))
    if evaluated and rollout.max_prompt_tokens + evaluated > limit:
        raise ConfigError(
            f"evaluation.max_response_tokens={evaluated}: with"
            f" rollout.max_prompt_tokens={rollout.max_prompt_tokens} it exceeds"
            f" max_position_embeddings={limit} of the model; lower it"
        )


def check_teacher_model(config: Config) -> None:
    """Read the model of a separate teacher and refuse one that cannot be used. Raises ConfigError.

    The teacher runs on the ranks of the student and is split like the student.
    """
    teacher = config.algorithm.teacher
    if teacher is None or teacher.model_path is None:
        return
    directory = Path(teacher.model_path)
    check_teacher_values(config, _read_model(directory, "algorithm.teacher.model_path"), directory)


def check_teacher_values(config: Config, model: dict[str, Any], directory: Path) -> None:
    """Like `check_model_values`, for the model of a separate teacher. Raises ConfigError."""
    key = "algorithm.teacher.model_path"
    limit = _check_split(config, model, directory, key)
    if (total := longest_sequence(config)) > limit:
        raise ConfigError(
            f"{key}: {directory} takes sequences of max_position_embeddings={limit}, and"
            f" rollout.max_prompt_tokens + rollout.max_response_tokens make {total} tokens; lower one, or"
            " take another teacher"
        )


def _read_model(directory: Path, key: str) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory; `key` is the config key that errors name.

    ConfigError for an unknown family, and when weights or tokenizer are missing.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"{key}={directory}: no such directory; give a Hugging Face model directory on this machine"
        )
    model = _read_json(directory / "config.json", key)
    if model.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"{key}: {directory}/config.json says model_type={model.get('model_type')!r}; supported are"
            f" {', '.join(MODEL_TYPES)}"
        )
    _check_weight_files(directory, key)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{key}={directory}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the"
            " model's own"
        )
    return model


def _check_split(config: Config, model: dict[str, Any], directory: Path, key: str) -> int:
    """Refuse a model of which the ranks cannot get equal parts; return max_position_embeddings."""
    lead = "" if key == "model.path" else f"{key}: "

    def number(name: str) -> int:
        if type(model.get(name)) is not int or model[name] < 1:
            raise ConfigError(
                f"{key}: {directory}/config.json: {name} must be a positive integer, not {model.get(name)!r}"
            )
        return model[name]

    def divides(axis: str, size: int, *names: str) -> None:
        for name in names:
            if number(name) % size:
                raise ConfigError(
                    f"{lead}actor.{axis}={size}: does not divide {name}={model[name]} of"
                    f" {directory}/config.json; choose a divisor"
                )

    actor, model_type = config.actor, model["model_type"]
    is_moe, tensor = model_type == "qwen3_moe", actor.tensor_model_parallel_size
    width = "moe_intermediate_size" if is_moe else "intermediate_size"
    # Expert parallelism runs its experts without tensor parallelism (actor/parallel.py).
    split = () if is_moe and actor.expert_model_parallel_size > 1 else (width,)
    divides("tensor_model_parallel_size", tensor, "num_attention_heads", *split)
    if is_moe and tensor > 1 and not actor.sequence_parallel:
        raise ConfigError(
            f"{lead}actor.sequence_parallel: Megatron trains a mixture of experts under TP only with it; set"
            " it to true"
        )
    groups = number(
        "num_key_value_heads" if model.get("num_key_value_heads") is not None else "num_attention_heads"
    )
    if model_type in ("olmo2", "olmo3") and groups % tensor:
        raise ConfigError(
            f"{lead}actor.tensor_model_parallel_size={tensor}: {directory} normalises all key heads together,"
            f" so it must divide num_key_value_heads={groups}; choose a divisor"
        )
    if groups % tensor and tensor % groups:
        raise ConfigError(
            f"{lead}actor.tensor_model_parallel_size={tensor}: is neither a divisor nor a multiple of"
            f" num_key_value_heads={groups} of {directory}/config.json; choose one that is"
        )
    divides("pipeline_model_parallel_size", actor.pipeline_model_parallel_size, "num_hidden_layers")
    if actor.expert_model_parallel_size > 1:
        if not is_moe:
            raise ConfigError(
                f"{lead}actor.expert_model_parallel_size: {directory} is no mixture of experts"
                f" ({model_type}); set it to 1"
            )
        divides("expert_model_parallel_size", actor.expert_model_parallel_size, "num_experts")
    check_sizes(config, model, f"{directory}/config.json")
    return number("max_position_embeddings")


def _check_engine_reads(model: dict[str, Any], directory: Path, tokens: int) -> None:
    """Refuse a model that SGLang 0.5.23 serves wrongly and without an error.

    Seen on the CPU: its log-probs differ from those of transformers. tokens: the longest sequence.
    """
    where = f"model.path: {directory}/config.json"
    window, new, old = (
        model.get("sliding_window"),
        model.get("rope_parameters") or {},
        model.get("rope_scaling") or {},
    )
    if model.get("model_type") == "mistral" and window is not None and tokens > window:
        raise ConfigError(
            f"{where}: sliding_window={window}, which SGLang does not apply to Mistral; keep"
            f" rollout.max_prompt_tokens + max_response_tokens ({tokens}) within it, or take a model"
            " without one"
        )
    if any(isinstance(value, dict) for value in new.values()):
        raise ConfigError(
            f"{where}: rope_parameters by layer type, which SGLang does not read; write rope_theta and"
            " rope_scaling instead, as published"
        )
    rope = new or old
    factor, given = rope.get("factor") or 1.0, rope.get("attention_factor")
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if (
        rope.get("rope_type", rope.get("type")) == "yarn"
        and given is not None
        and not math.isclose(given, default, rel_tol=1e-6)
    ):
        raise ConfigError(
            f"{where}: attention_factor={given}, of which SGLang knows only the default {default:.6g} for"
            f" factor={factor}"
        )


def _check_weight_files(directory: Path, key: str) -> None:
    """Refuse a directory without safetensors, or whose index names a file that is missing."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index, key).get("weight_map")
        if not isinstance(shards, dict):
            raise ConfigError(f"{key}: {index}: holds no weight_map; download the model again")
        missing = sorted({name for name in shards.values() if not (directory / str(name)).is_file()})
        if missing:
            raise ConfigError(
                f"{key}: {index} names {missing[0]}, which is missing ({len(missing)} in all); download the"
                " model again"
            )
    elif not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{key}={directory}: holds no *.safetensors; convert the weights or give another directory"
        )


def _read_json(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object; `key` is the config key that errors name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {path} is missing; give a whole Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {path} must hold a JSON object")
    return content
