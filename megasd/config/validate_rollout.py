"""Which values of the rollout section may stand together: engines, lengths, transport, prefetch."""

from __future__ import annotations

from urllib.parse import urlsplit

from megasd.config.schema import LOOPBACK, Config, ConfigError


def needs_engine(config: Config) -> bool:
    """Whether the run samples: rollouts that are not replayed, an evaluation, or pass rates."""
    algorithm = config.algorithm
    samples = algorithm.source != "dataset" or any("source=" in stage for stage in algorithm.stages)
    estimates = algorithm.question_weight.kind != "none" and algorithm.question_weight.pass_rate == "frozen"
    return config.data.eval is not None or estimates or (samples and config.rollout.replay_dir is None)


def check_placement(config: Config) -> None:
    """Refuse engines named twice, or unable to do what is requested. Raises ConfigError."""
    engine, frozen = config.rollout.engine, config.rollout.frozen_policy
    if engine.served and engine.urls:
        raise ConfigError(
            f"rollout.engine.served={engine.served}: rollout.engine.urls names engines already; keep one of"
            " the two"
        )
    if engine.num_engines > 1 and (engine.served or engine.urls):
        other = "served" if engine.served else "urls"
        raise ConfigError(
            f"rollout.engine.num_engines={engine.num_engines}: with rollout.engine.{other} the run starts"
            " none; set it to 1"
        )
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ConfigError("rollout.engine.urls: names one engine twice; leave one of the two")
    if engine.port and engine.port + engine.num_engines - 1 > 65535:
        raise ConfigError(
            f"rollout.engine.port={engine.port}: leaves no ports for {engine.num_engines} engines; lower it,"
            " or set it to 0"
        )
    if engine.release_memory and engine.urls:
        raise ConfigError(
            "rollout.engine.release_memory: engines at rollout.engine.urls are not the run's to empty; set it"
            " to false"
        )
    if frozen and engine.release_memory:
        raise ConfigError(
            "rollout.frozen_policy: nothing gives the engine its weights back; set"
            " rollout.engine.release_memory=false"
        )
    if engine.served and config.sync.transport == "colocated":
        raise ConfigError(
            "sync.transport=colocated: the engines of rollout.engine.served are on other machines; take group"
            " or disk"
        )


def check_overlap(config: Config) -> None:
    """Refuse rollout.overlap=1 where the next batch cannot be sampled during training.

    Samples of that batch come from weights one step old. Raises ConfigError.
    """
    rollout, algorithm = config.rollout, config.algorithm
    if not rollout.overlap:
        return
    for key, given, why in (
        ("rollout.frozen_policy", rollout.frozen_policy, "samples of the start model are of no step"),
        ("rollout.replay_dir", rollout.replay_dir is not None, "nothing is sampled"),
        (
            "rollout.engine.release_memory",
            rollout.engine.release_memory,
            "the engine samples while the actor trains",
        ),
    ):
        if given:
            raise ConfigError(f"rollout.overlap=1: {why} under {key}; set one of the two off")
    if algorithm.source != "rollout":
        raise ConfigError(f"rollout.overlap=1: algorithm.source={algorithm.source} learns rows; set it to 0")
    staged = [stage for stage in algorithm.stages if "source=" in stage or "tis_" in stage]
    if staged:
        raise ConfigError(
            f"rollout.overlap=1: the stage {staged[0]!r} changes where samples come from, or their"
            " correction; set it to 0"
        )
    if algorithm.tis_clip is None and (
        algorithm.distill is not None or algorithm.policy_gradient is not None
    ):
        raise ConfigError(
            "rollout.overlap=1: samples are of weights one step old, which only the ratio to the engine's"
            " log-probs makes up for; set algorithm.tis_clip (2.0), or rollout.overlap=0"
        )


def check_sampling(config: Config) -> None:
    """Refuse frozen_policy and dynamic_sampling where they cannot work. Raises ConfigError."""
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


def check_transport(config: Config) -> None:
    """Refuse a way of sending weights that the engines cannot take. Raises ConfigError."""
    sync = config.sync
    if sync.delta and sync.transport == "disk":
        raise ConfigError("sync.delta: a file holds the whole model; take sync.transport=group or colocated")
    if sync.transport == "colocated":
        for url in config.rollout.engine.urls:
            if urlsplit(url).hostname not in LOOPBACK:
                raise ConfigError(
                    f"sync.transport=colocated: {url} is not on this machine; take group or disk"
                )


def check_lengths(config: Config) -> None:
    """Refuse sequences that do not fit into the KV pool of an engine. Raises ConfigError."""
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
