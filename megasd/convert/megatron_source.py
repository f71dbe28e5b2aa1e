"""The model of a Megatron checkpoint for a conversion: which config.json it belongs to, all keys
checked before the first value is read.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megasd.convert import torch_dist_keys
from megasd.convert.torch_dist import METADATA, TorchDist
from megasd.models import registry
from megasd.types import UserError
from megasd.weights.hf_files import read_hf_config

# of a run's checkpoint
STATE = "megasd.json"


class MegatronSource:
    """Parameters under global names, by rows."""

    def __init__(
        self,
        directory: Path,
        hf_dir: Path,
        stack: ExitStack,
        *,
        teacher: bool,
        step: int | None,
        recipe: str | None,
    ) -> None:
        """UserError for a damaged or incomplete checkpoint, or one of another model than hf_dir's
        config.json.
        """
        self.directory, self.hf_dir, self.step, self.recipe = directory, hf_dir, step, recipe
        self.hf = read_hf_config(hf_dir)
        try:
            self.table = registry.param_table(self.hf)
        except UserError as error:
            raise UserError(f"{hf_dir}/{error}") from error
        self.stored = TorchDist(directory, stack)
        prefix = "teacher." if teacher else ""
        if teacher and not any(key.startswith(prefix) for key in self.stored.tensors):
            raise UserError(
                f"{directory}: holds no teacher (--teacher); its run had none, or had live weights"
            )
        shapes = {key: tensor.shape for key, tensor in self.stored.tensors.items()}
        self._keys = torch_dist_keys.check_keys(shapes, self.table, str(directory / METADATA), prefix)

    def key(self, name: str) -> str:
        """The checkpoint's key of a parameter."""
        return self._keys[torch_dist_keys.slot(name, self.table).key]

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.tensors[self.key(name)].dtype

    def row_bytes(self, name: str) -> int:
        tensor, depth = self.stored.tensors[self.key(name)], len(torch_dist_keys.slot(name, self.table).stack)
        return prod(tensor.shape[depth + 1 :]) * tensor.dtype.itemsize

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the whole parameter of a global name."""
        return self.stored.read(self.key(name), torch_dist_keys.slot(name, self.table).prefix, start, stop)


def open_checkpoint(
    directory: Path, hf_dir: Path | None, stack: ExitStack, *, teacher: bool = False
) -> MegatronSource:
    """A converted directory (config.json in its hf/), a run's checkpoint (in its run's model.path),
    or any with hf_dir given.
    """
    step, run = None, {}
    if (directory / STATE).is_file():
        step = _mapping(directory / STATE, json.loads).get("step")
        config = directory.absolute().parent.parent / "config.yaml"
        run = _mapping(config, yaml.safe_load) if config.is_file() else {}
    if hf_dir is None:
        path = (run.get("model") or {}).get("path")
        hf_dir = (
            directory / "hf" if (directory / "hf" / "config.json").is_file() else Path(path) if path else None
        )
    if hf_dir is None or not (hf_dir / "config.json").is_file():
        raise UserError(
            f"{directory}: no config.json{f' in {hf_dir}' if hf_dir else ''}; give the model's Hugging Face"
            " directory with --hf"
        )
    recipe = (run.get("algorithm") or {}).get("recipe")
    return MegatronSource(directory, hf_dir, stack, teacher=teacher, step=step, recipe=recipe)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})".replace("\n", " ")) from error
    return found if isinstance(found, dict) else {}
