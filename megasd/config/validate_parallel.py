"""How a run is split over ranks: world size, data-parallel size, samples of a rank."""

from __future__ import annotations

import math

from megasd.config.schema import Config, ConfigError, samples_per_step
from megasd.config.validate_actor import sequence_multiple


def default_world_size(config: Config) -> int:
    """run.num_processes, or if that is 0 the fewest ranks that hold TP x PP x CP.

    The ranks of a mixture of experts also hold EP x PP, with expert TP 1.
    """
    actor = config.actor
    dense = (
        actor.tensor_model_parallel_size * actor.pipeline_model_parallel_size * actor.context_parallel_size
    )
    return config.run.num_processes or math.lcm(
        dense, actor.expert_model_parallel_size * actor.pipeline_model_parallel_size
    )


def data_parallel_size(config: Config, world_size: int) -> int:
    """World size / (TP x PP x CP). ConfigError when that is no whole number."""
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


def longest_sequence(config: Config) -> int:
    """Number of tokens of the longest sequence of the student, padding included."""
    multiple = sequence_multiple(config)
    return (
        math.ceil((config.rollout.max_prompt_tokens + config.rollout.max_response_tokens) / multiple)
        * multiple
    )


def check_parallel(config: Config, world_size: int) -> None:
    """Refuse ranks that cannot share the model or the samples of a step. Raises ConfigError."""
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
    if budget is not None and budget < longest_sequence(config):
        raise ConfigError(
            f"actor.max_tokens_per_microbatch={budget}: holds not even one sample of"
            " rollout.max_prompt_tokens + rollout.max_response_tokens ="
            f" {longest_sequence(config)} (padded to {sequence_multiple(config)}); raise it"
        )
    if budget is None and local % actor.micro_batch_size:
        divisors = [n for n in range(1, min(local, actor.micro_batch_size) + 1) if local % n == 0]
        raise ConfigError(
            f"actor.micro_batch_size={actor.micro_batch_size}: does not divide the {local} samples of a"
            f" data-parallel rank; the nearest that does is {divisors[-1]}"
        )
