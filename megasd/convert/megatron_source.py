"""The parameters of a Megatron checkpoint for a conversion.

All keys are compared with config.json before the first value is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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

# The checkpoint of a run has this file.
STATE = "megasd.json"


class MegatronSource:
    """A checkpoint, to read parameters by rows, under global names."""

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
        """Open the checkpoint. `step` and `recipe`: of the run that wrote it, if any.

        UserError: the checkpoint is damaged or incomplete, or config.json of hf_dir is of another model.
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
        """The key under which the checkpoint holds a parameter."""
        return self._keys[torch_dist_keys.slot(name, self.table).key]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in the checkpoint."""
        return self.stored.tensors[self.key(name)].dtype

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a parameter."""
        tensor, depth = self.stored.tensors[self.key(name)], len(torch_dist_keys.slot(name, self.table).stack)
        return prod(tensor.shape[depth + 1 :]) * tensor.dtype.itemsize

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a whole parameter."""
        return self.stored.read(self.key(name), torch_dist_keys.slot(name, self.table).prefix, start, stop)


def open_checkpoint(
    directory: Path, hf_dir: Path | None, stack: ExitStack, *, teacher: bool = False
) -> MegatronSource:
    """Open a checkpoint with the config.json of its model.

    config.json is in `hf_dir` if it is given, in `hf/` of a converted directory, or in model.path of
    the run that wrote the checkpoint. UserError: there is none, or see MegatronSource.
    """
    step: int | None = None
    run: dict[str, Any] = {}
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


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})".replace("\n", " ")) from error
    return found if isinstance(found, dict) else {}
