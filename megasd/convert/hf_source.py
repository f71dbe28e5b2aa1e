"""The tensors of a Hugging Face directory for a conversion, checked before the first is read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from megasd.models import registry
from megasd.models.param_table import ParamTable
from megasd.types import UserError
from megasd.weights.hf_files import Source, read_hf_config
from megasd.weights.load import check_hf, check_names
from megasd.weights.safetensors_io import DTYPE_NAMES, INDEX, RawShards, TensorLocation


def open_source(hf_dir: Path, stack: ExitStack, *, allow_pickle: bool = False) -> RawShards | PickleShards:
    """Open a Hugging Face directory, to read its tensors by rows.

    UserError: a broken, incomplete or unsupported directory, or pickles that are not allowed.
    """
    if not any((hf_dir / name).is_file() for name in ("model.safetensors", INDEX)) and any(
        hf_dir.glob("pytorch_model*.bin")
    ):
        if not allow_pickle:
            raise UserError(
                f"{hf_dir}: holds pickled weights (pytorch_model.bin), and unpickling can run code; take"
                " safetensors, or give --allow-pickle if you trust whoever made it (it is then read with"
                " torch's weights_only)"
            )
        return PickleShards(hf_dir, registry.param_table(read_hf_config(hf_dir)))
    check_hf(hf_dir)
    listed = Source(hf_dir, stack).file_of
    shards = RawShards(hf_dir, set(listed.values()), stack)
    for name, file in shards.file_of.items():
        if listed.get(name) != file:
            says = f"says that it lies in {listed[name]}" if name in listed else "does not name it"
            raise UserError(
                f"{hf_dir / file}: holds tensor {name}, but {INDEX} {says}; fetch the directory again"
            )
    return shards


class PickleShards:
    """The tensors of pytorch_model.bin, one file or many; one file is open at a time.

    Read with torch.load(weights_only=True, mmap=True).
    """

    def __init__(self, hf_dir: Path, table: ParamTable) -> None:
        index = hf_dir / "pytorch_model.bin.index.json"
        try:
            listed = (
                sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if index.is_file()
                else ["pytorch_model.bin"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index ({error!r}); fetch the directory again") from error
        self.directory = hf_dir
        self.places: dict[str, TensorLocation] = {}
        self.file_of: dict[str, str] = {}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        for file in listed:
            if Path(file).name != file:
                raise UserError(f"{index}: file {file!r} lies outside the directory")
            for name, tensor in self._load(file).items():
                if isinstance(tensor, Tensor) and tensor.dtype in DTYPE_NAMES:
                    self.file_of[name], self.places[name] = (
                        file,
                        TensorLocation(0, tensor.dtype, tuple(tensor.shape)),
                    )
        check_names(self.places, table, hf_dir)
        for name, shape in table.expected_tensors().items():
            if self.places[name].shape != shape:
                raise UserError(
                    f"{hf_dir / self.file_of[name]}: {name} has shape {self.places[name].shape}, config.json"
                    f" asks for {shape}"
                )

    def _load(self, file: str) -> dict[str, Tensor]:
        if self._last[0] != file:
            self._last = ("", {})
            try:
                self._last = (
                    file,
                    torch.load(self.directory / file, map_location="cpu", weights_only=True, mmap=True),
                )
            except Exception as error:
                # Damaged files and refused classes raise several kinds of errors.
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"{self.directory / file}: cannot be read as plain weights ({reason}); fetch it again"
                ) from error
        return self._last[1]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in the dtype of the file."""
        return self._load(self.file_of[name])[name][start:stop].clone(memory_format=torch.contiguous_format)
