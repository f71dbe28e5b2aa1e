"""The direction of a conversion, from the files of its source directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megasd.types import UserError
from megasd.weights.safetensors_io import INDEX

Direction = Literal["megatron", "hf"]


def direction_of(source: Path) -> Direction:
    """Return "megatron" for a Hugging Face directory and "hf" for a Megatron one.

    UserError for a path that is neither.
    """
    if not source.is_dir():
        raise UserError(
            f"{source}: {'is no directory' if source.exists() else 'not found'}; give a Hugging Face or"
            " Megatron directory"
        )
    if (source / "metadata.json").is_file() or (source / ".metadata").is_file():
        return "hf"
    weights = any((source / name).is_file() for name in ("model.safetensors", INDEX)) or any(
        source.glob("pytorch_model*.bin")
    )
    if (source / "config.json").is_file() or weights:
        return "megatron"
    raise UserError(
        f"{source}: neither a Hugging Face directory (config.json) nor a Megatron one (metadata.json,"
        " .metadata)"
    )
