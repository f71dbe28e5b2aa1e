"""The plan of a run that `megasd train --dry-run` prints."""

from __future__ import annotations

from megasd.config.schema import Config, samples_per_step
from megasd.config.validate_actor import sequence_multiple
from megasd.config.validate_parallel import data_parallel_size
from megasd.config.validate_rollout import needs_engine


def outline(config: Config, world_size: int) -> list[str]:
    """What the run will do, in lines for a reader.

    ConfigError when world_size does not fit the parallel layout.
    """
    actor, rollout, run, engine = config.actor, config.rollout, config.run, config.rollout.engine
    data_parallel = data_parallel_size(config, world_size)
    samples = samples_per_step(config)
    tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    local = samples // data_parallel
    lines = [
        (
            f"ranks        {world_size} = TP {actor.tensor_model_parallel_size} x PP"
            f" {actor.pipeline_model_parallel_size} x CP {actor.context_parallel_size} x DP {data_parallel}"
            f" (experts: EP {actor.expert_model_parallel_size})"
        ),
        f"step         {samples} samples, at most {samples * tokens} tokens of prompt and response",
        (
            f"rank         {local} samples a step{_microbatches(config, local)}; sequences padded to"
            f" {sequence_multiple(config)}"
        ),
        f"run          {run.steps} steps, {run.steps * samples} samples; resume: {run.resume}",
        f"algorithm    {config.algorithm.recipe}: {_terms(config)}",
        f"engine       {_engines(config)}",
    ]
    if engine.router is not None:
        lines.append(f"router       samples are asked of {engine.router}")
    if rollout.overlap:
        lines.append(
            "overlap      the next batch is sampled while one is learned: samples are of weights one step"
            " old, but for the first batch"
        )
    lines += [f"stage        {stage}" for stage in config.algorithm.stages]
    teacher = config.algorithm.teacher
    if teacher:
        longest = tokens + rollout.max_response_tokens
        about = (
            f"; a sequence of about {longest} tokens at most" if teacher.context.endswith("_success") else ""
        )
        lines.append(f"teacher      {teacher.weights} weights, reads {teacher.context}{about}")
    every = f"every {config.evaluation.every} steps, " if config.evaluation.every else ""
    lines.append(
        f"evaluation   {f'{every}before and after, {config.data.eval}' if config.data.eval else 'none'}"
    )
    files = ["config.yaml", "metrics.jsonl", "summary.json"]
    files += ["tensorboard/"] if run.tensorboard else []
    files += ["rollouts/"] if needs_engine(config) else []
    files += ["checkpoints/"] if config.checkpoint.every or config.checkpoint.save_at_end else []
    files += ["hf/"] if run.export else []
    return [*lines, f"writes       {run.dir}: {', '.join(files)}"]


def _engines(config: Config) -> str:
    """Where samples come from."""
    actor, rollout, run, engine = config.actor, config.rollout, config.run, config.rollout.engine
    if not needs_engine(config):
        return f"none (replays {rollout.replay_dir})" if rollout.replay_dir else "none"
    if engine.urls:
        return f"SGLang at {', '.join(engine.urls)}"
    if engine.served:
        return (
            f"{engine.served} of SGLang that `megasd serve` starts elsewhere and announces in"
            f" {run.dir}/engines"
        )
    dtype = actor.dtype if engine.dtype == "auto" else engine.dtype
    port = engine.port or "a free port"
    several = f"{engine.num_engines} x " if engine.num_engines > 1 else ""
    return (
        several + f"SGLang started on {engine.host}, {port}; TP {engine.tensor_parallel_size}, {dtype},"
        f" {engine.max_total_tokens} KV tokens"
    )


def _microbatches(config: Config, local: int) -> str:
    actor = config.actor
    if actor.max_tokens_per_microbatch is None:
        return f" = {local // actor.micro_batch_size} microbatches of {actor.micro_batch_size}"
    return (
        f" or so, microbatches of at most {actor.max_tokens_per_microbatch}"
        f" tokens{', packed' if actor.packing else ''}"
    )


def _terms(config: Config) -> str:
    algorithm = config.algorithm
    names = [
        f"{n} x {t.coefficient}"
        for n in ("distill", "policy_gradient", "nll")
        if (t := getattr(algorithm, n))
    ]
    return f"{' + '.join(names)}; question weight {algorithm.question_weight.kind}, {algorithm.aggregation}"
