"""All checks of a config, in one order. Needs the standard library alone, so it answers at once.

Every check raises ConfigError, one line: the key, what is wrong, what to do. The checks are in

    values.py               one value against the bound of its field
    validate_algorithm.py   terms, teacher, credit, minibatches
    validate_rollout.py     engines, lengths, transport
    validate_parallel.py    ranks and microbatches
    validate_actor.py       precision, recomputation, overlap
    validate_model.py       the model's config.json and files
    validate_files.py       data, rollouts, run directory
"""

from __future__ import annotations

from megasd.config.schema import Config, ConfigError
from megasd.config.validate_actor import check_actor, check_machine
from megasd.config.validate_algorithm import check_algorithm, check_read
from megasd.config.validate_files import check_data, check_engine_model, check_run_dir
from megasd.config.validate_model import check_model, check_teacher_model
from megasd.config.validate_parallel import check_parallel, data_parallel_size, default_world_size
from megasd.config.validate_rollout import (
    check_lengths,
    check_overlap,
    check_placement,
    check_sampling,
    check_transport,
)
from megasd.config.values import check_values


def validate(config: Config, world_size: int | None = None, *, rank: int = 0) -> None:
    """Refuse a config that cannot run on `world_size` ranks. Raises ConfigError.

    world_size None: the number of ranks that `megasd train` starts. Ranks other than 0 do not look
    into run.dir, which rank 0 may already be filling.
    """
    validate_values(config, world_size or default_world_size(config))
    check_machine(config.actor)
    check_model(config)
    check_teacher_model(config)
    check_engine_model(config)
    check_data(config)
    if rank == 0:
        check_run_dir(config)


def validate_values(config: Config, world_size: int) -> None:
    """The part of `validate` that reads no file, for a machine without model and data.

    Raises ConfigError.
    """
    check_values(config)
    check_algorithm(config, config.algorithm, data_parallel_size(config, world_size))
    # With stages, algo/stages.py checks it: a later stage may read what the first does not.
    if not config.algorithm.stages:
        check_read(config, [config.algorithm])
    check_placement(config)
    check_overlap(config)
    check_transport(config)
    check_sampling(config)
    _check_schedule(config)
    check_lengths(config)
    check_parallel(config, world_size)
    check_actor(config)


def _check_schedule(config: Config) -> None:
    """Refuse a learning rate or an evaluation that never takes place."""
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
