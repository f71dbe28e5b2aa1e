"""Where engines run and how far sampling runs ahead: what those values may be together. Stdlib only."""

from __future__ import annotations

from megasd.config.schema import Config, ConfigError


def check_placement(config: Config) -> None:
    """One way to engines, and what that way can do. Raises ConfigError."""
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
    """A batch that is sampled while another is learned is of weights one step old, and needs an
    engine of its own. Raises ConfigError.
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
