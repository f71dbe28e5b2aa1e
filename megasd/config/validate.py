"""What the values of a config may be together, and with the files and ranks it meets. Stdlib only:
answers before torch is imported.

`validate` raises ConfigError, one line: the key, what is wrong, what to do. Of the algorithm:
validate_algorithm.py.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megasd.config.schema import LOOPBACK, Config, ConfigError, samples_per_step
from megasd.config.validate_actor import check_actor, check_machine, check_sizes, sequence_multiple
from megasd.config.validate_algorithm import check_algorithm, check_read
from megasd.config.validate_rollout import check_overlap, check_placement
from megasd.config.values import check_values

# those of models/registry.py
MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "olmo2", "olmo3")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# of the files of a directory of rows (data/rows.py)
ROW_SUFFIXES = (".jsonl", ".parquet", ".arrow")
# any of these in run.dir: it holds a run
RUN_FILES = ("config.yaml", "metrics.jsonl", "rollouts", "checkpoints")


def validate(config: Config, world_size: int | None = None, *, rank: int = 0) -> None:
    """Refuse what cannot run on `world_size` ranks (None: the number that `megasd train` starts).
    Raises ConfigError.

    Ranks other than 0 leave out the look into run.dir, which rank 0 may already be filling.
    """
    validate_values(config, world_size or default_world_size(config))
    check_machine(config.actor)
    _check_model(config)
    _check_teacher_model(config)
    _check_sync(config)
    _check_data(config)
    if rank == 0:
        _check_run_dir(config)


def validate_values(config: Config, world_size: int) -> None:
    """The part of `validate` that looks at no file: also for a machine that has neither model nor
    data. Raises ConfigError.
    """
    check_values(config)
    check_algorithm(config, config.algorithm, data_parallel_size(config, world_size))
    # else algo/stages.py knows whether a later stage reads it
    if not config.algorithm.stages:
        check_read(config, [config.algorithm])
    check_placement(config)
    check_overlap(config)
    _check_transport(config)
    _check_run(config)
    _check_lengths(config)
    _check_parallel(config, world_size)
    check_actor(config)


def default_world_size(config: Config) -> int:
    """run.num_processes, or the fewest ranks that hold TP x PP x CP (and, for a MoE, EP x PP with
    expert TP 1).
    """
    actor = config.actor
    dense = (
        actor.tensor_model_parallel_size * actor.pipeline_model_parallel_size * actor.context_parallel_size
    )
    return config.run.num_processes or math.lcm(
        dense, actor.expert_model_parallel_size * actor.pipeline_model_parallel_size
    )


def data_parallel_size(config: Config, world_size: int) -> int:
    """World size / (TP x PP x CP); raises ConfigError when that is no whole number."""
    actor = config.actor
    dense = (
        actor.tensor_model_parallel_size * actor.pipeline_model_parallel_size * actor.context_parallel_size
    )
    if world_size % dense:
        raise ConfigError(
            f"run.num_processes: {world_size} ranks cannot be split into TP"
            f" {actor.tensor_model_parallel_size} x PP {actor.pipeline_model_parallel_size} x CP"
            f" {actor.context_parallel_size}; start a multiple of {dense}"
        )
    return world_size // dense


def needs_engine(config: Config) -> bool:
    """Whether the run samples at all: rollouts that are not replayed, an evaluation, or an estimate
    of pass rates.
    """
    algorithm = config.algorithm
    samples = algorithm.source != "dataset" or any("source=" in stage for stage in algorithm.stages)
    estimates = algorithm.question_weight.kind != "none" and algorithm.question_weight.pass_rate == "frozen"
    return config.data.eval is not None or estimates or (samples and config.rollout.replay_dir is None)


def _check_run(config: Config) -> None:
    rollout, engine = config.rollout, config.rollout.engine
    if rollout.frozen_policy and config.evaluation.every:
        raise ConfigError(
            "rollout.frozen_policy: the engine keeps the start model until the end; set evaluation.every=0"
        )
    if rollout.frozen_policy and engine.urls and config.run.resume != "none":
        raise ConfigError(
            "rollout.frozen_policy: who says that the engines at rollout.engine.urls hold the start model?"
            " Let the run start one"
        )
    if rollout.dynamic_sampling and rollout.replay_dir is not None:
        raise ConfigError("rollout.dynamic_sampling: a replay has its questions already; set it to false")
    if rollout.dynamic_sampling and rollout.num_samples == 1:
        raise ConfigError(
            "rollout.dynamic_sampling: looks for questions that are neither all right nor all wrong, and with"
            " rollout.num_samples=1 there are none; raise that, or set it to false"
        )
    optimizer, steps = config.optimizer, config.run.steps
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={optimizer.min_lr}: exceeds optimizer.lr={optimizer.lr}; lower it"
        )
    if optimizer.lr_decay_style != "constant" and optimizer.lr_warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps}: {optimizer.lr_decay_style} decay over"
            f" run.steps={steps} never begins; give fewer warm-up steps"
        )
    if config.evaluation.every and config.data.eval is None:
        raise ConfigError(
            "data.eval: evaluation.every asks for held-out rows; give a JSONL file or set evaluation.every=0"
        )


def _check_lengths(config: Config) -> None:
    rollout, engine = config.rollout, config.rollout.engine
    evaluated = config.evaluation.max_response_tokens or 0
    if (
        needs_engine(config)
        and not engine.urls
        and rollout.max_prompt_tokens + evaluated > engine.max_total_tokens
    ):
        raise ConfigError(
            f"rollout.engine.max_total_tokens={engine.max_total_tokens}: holds not even one sample of"
            " rollout.max_prompt_tokens + evaluation.max_response_tokens ="
            f" {rollout.max_prompt_tokens + evaluated}; raise it"
        )
    total = rollout.max_prompt_tokens + rollout.max_response_tokens
    if needs_engine(config) and not engine.urls and total > engine.max_total_tokens:
        raise ConfigError(
            f"rollout.engine.max_total_tokens={engine.max_total_tokens}: holds not even one sample of"
            f" rollout.max_prompt_tokens + rollout.max_response_tokens = {total}; raise it"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    actor, wanted = config.actor, config.run.num_processes
    if wanted and wanted != world_size:
        raise ConfigError(
            f"run.num_processes={wanted}: torchrun started {world_size} ranks; leave it 0 or make the two"
            " equal"
        )
    if actor.sequence_parallel and actor.tensor_model_parallel_size == 1:
        raise ConfigError(
            "actor.sequence_parallel: needs actor.tensor_model_parallel_size > 1; set it to false"
        )
    data_parallel = data_parallel_size(config, world_size)
    expert = actor.expert_model_parallel_size * actor.pipeline_model_parallel_size
    if world_size % expert:
        raise ConfigError(
            f"actor.expert_model_parallel_size={actor.expert_model_parallel_size}: {world_size} ranks cannot"
            f" be split into EP x PP = {expert}; start a multiple of {expert}"
        )
    samples = samples_per_step(config)
    size = (
        "rollout.num_prompts"
        if config.algorithm.source == "dataset"
        else "rollout.num_prompts x rollout.num_samples"
    )
    if samples % data_parallel:
        raise ConfigError(
            f"rollout.num_prompts: {size} = {samples} samples a step cannot be shared by {data_parallel}"
            f" data-parallel ranks; make it a multiple of {data_parallel}"
        )
    local, budget = samples // data_parallel, actor.max_tokens_per_microbatch
    if budget is not None and budget < _longest(config):
        raise ConfigError(
            f"actor.max_tokens_per_microbatch={budget}: holds not even one sample of"
            f" rollout.max_prompt_tokens + rollout.max_response_tokens = {_longest(config)} (padded to"
            f" {sequence_multiple(config)}); raise it"
        )
    if budget is None and local % actor.micro_batch_size:
        divisors = [n for n in range(1, min(local, actor.micro_batch_size) + 1) if local % n == 0]
        raise ConfigError(
            f"actor.micro_batch_size={actor.micro_batch_size}: does not divide the {local} samples of a"
            f" data-parallel rank; the nearest that does is {divisors[-1]}"
        )


def _check_model(config: Config) -> None:
    directory = Path(config.model.path)
    check_model_values(config, _read_model(directory, "model.path"), directory)


def check_model_values(config: Config, model: dict[str, Any], directory: Path) -> None:
    """What `validate` asks of the model's config.json: equal parts for all ranks, and its lengths.
    Looks at no file; `directory` is for the messages. Raises ConfigError.
    """
    limit = _check_split(config, model, directory, "model.path")
    rollout, evaluated = config.rollout, config.evaluation.max_response_tokens
    total = _longest(config)
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


def _check_teacher_model(config: Config) -> None:
    """A separate teacher runs on the ranks of the student, split as it is."""
    teacher = config.algorithm.teacher
    if teacher is None or teacher.model_path is None:
        return
    directory = Path(teacher.model_path)
    check_teacher_values(config, _read_model(directory, "algorithm.teacher.model_path"), directory)


def check_teacher_values(config: Config, model: dict[str, Any], directory: Path) -> None:
    """The same of a separate teacher's."""
    key = "algorithm.teacher.model_path"
    limit = _check_split(config, model, directory, key)
    if (total := _longest(config)) > limit:
        raise ConfigError(
            f"{key}: {directory} takes sequences of max_position_embeddings={limit}, and"
            f" rollout.max_prompt_tokens + rollout.max_response_tokens make {total} tokens; lower one, or"
            " take another teacher"
        )


def _longest(config: Config) -> int:
    """Tokens of the longest sequence of the student, padding included."""
    multiple = sequence_multiple(config)
    return (
        math.ceil((config.rollout.max_prompt_tokens + config.rollout.max_response_tokens) / multiple)
        * multiple
    )


def _read_model(directory: Path, key: str) -> dict[str, Any]:
    """config.json of a whole Hugging Face directory of a known family; `key` names it in errors."""
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
    """Refuse a model that the ranks cannot be given equal parts of; its max_position_embeddings."""
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
    """Refuse what SGLang 0.5.23 serves as another model without a word (seen on the CPU, log-probs
    against transformers).
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {path} is missing; give a whole Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {path} must hold a JSON object")
    return content


def _check_sync(config: Config) -> None:
    own_model = config.rollout.engine.model_path
    if own_model is not None and not (Path(own_model) / "config.json").is_file():
        raise ConfigError(
            f"rollout.engine.model_path: {own_model} holds no config.json; give a Hugging Face directory, or"
            " null"
        )


def _check_transport(config: Config) -> None:
    sync = config.sync
    if sync.delta and sync.transport == "disk":
        raise ConfigError("sync.delta: a file holds the whole model; take sync.transport=group or colocated")
    if sync.transport == "colocated":
        for url in config.rollout.engine.urls:
            if urlsplit(url).hostname not in LOOPBACK:
                raise ConfigError(
                    f"sync.transport=colocated: {url} is not on this machine; take group or disk"
                )


def _check_data(config: Config) -> None:
    for key, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is not None and not Path(path).is_file() and not _holds_rows(Path(path)):
            raise ConfigError(
                f"{key}={path}: {'not a regular' if Path(path).exists() else 'no such'} file; give a JSONL"
                " file"
            )
    replay = config.rollout.replay_dir
    if replay is not None and not (Path(replay) / "rollouts").is_dir():
        raise ConfigError(
            f"rollout.replay_dir={replay}: holds no rollouts/; give the run.dir of a finished run"
        )


def _holds_rows(directory: Path) -> bool:
    """Whether it is a directory that data/rows.py may read: of `datasets`, or of shards."""
    names = ("state.json", "dataset_dict.json")
    return directory.is_dir() and any(
        file.suffix in ROW_SUFFIXES or file.name in names for file in directory.iterdir()
    )


def _check_run_dir(config: Config) -> None:
    run, directory = config.run, Path(config.run.dir)
    if run.resume not in ("none", "auto") and not Path(run.resume).is_dir():
        raise ConfigError(
            f"run.resume={run.resume}: no such checkpoint directory; give one, or none, or auto"
        )
    if run.resume != "none" and run.overwrite:
        raise ConfigError(
            f"run.overwrite: a run cannot be resumed (run.resume={run.resume}) and overwritten at once; drop"
            " one of the two"
        )
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"run.dir={run.dir}: {existing} is not a directory that can be written to; choose another"
        )
    held = [name for name in RUN_FILES if (directory / name).exists()]
    if held and run.resume == "none" and not run.overwrite:
        raise ConfigError(
            f"run.dir={run.dir}: already holds a run ({held[0]}); set run.resume=auto, run.overwrite=true or"
            " another run.dir"
        )
