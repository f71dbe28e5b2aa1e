"""Checks of the files that a config names: rows, rollouts, engine's model, run directory."""

from __future__ import annotations

import os
from pathlib import Path

from megasd.config.schema import Config, ConfigError

# suffixes of the files in a directory of rows (data/rows.py)
ROW_SUFFIXES = (".jsonl", ".parquet", ".arrow")
# A run.dir with one of these holds a run.
RUN_FILES = ("config.yaml", "metrics.jsonl", "rollouts", "checkpoints")


def check_engine_model(config: Config) -> None:
    """Refuse a rollout.engine.model_path that is no model directory. Raises ConfigError."""
    own_model = config.rollout.engine.model_path
    if own_model is not None and not (Path(own_model) / "config.json").is_file():
        raise ConfigError(
            f"rollout.engine.model_path: {own_model} holds no config.json; give a Hugging Face directory, or"
            " null"
        )


def check_data(config: Config) -> None:
    """Refuse rows or rollouts that do not exist. Raises ConfigError."""
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
    """Whether data/rows.py may read the directory: one of `datasets`, or one of shards."""
    names = ("state.json", "dataset_dict.json")
    return directory.is_dir() and any(
        file.suffix in ROW_SUFFIXES or file.name in names for file in directory.iterdir()
    )


def check_run_dir(config: Config) -> None:
    """Refuse a run.dir that cannot be written to, or that holds another run. Raises ConfigError."""
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
