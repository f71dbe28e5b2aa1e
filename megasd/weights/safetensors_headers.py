"""Names and shapes of a directory's safetensors, from the headers alone. No torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from megasd.types import UserError


def read_headers(directory: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor in the *.safetensors of a directory.

    UserError: the directory has no such file, or a file is cut off.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: holds no *.safetensors; give a Hugging Face directory")
    found = {}
    for path in files:
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); write it again") from error
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes where its header promises {8 + length + end}; write it"
                " again"
            )
        found.update({name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()})
    return found


def tensor_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the *.safetensors of a directory; see read_headers."""
    return {name: shape for name, (_, shape) in read_headers(directory).items()}


def check_same_tensors(directory: str | Path, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Raise UserError naming the first tensor that is missing, unknown or of another shape.

    SGLang ignores unknown names and dies of wrong shapes. With tied embeddings, either side may leave
    out lm_head.weight.
    """
    found = tensor_shapes(directory)
    optional = {"lm_head.weight"} if tied else set()
    for name in sorted(expected.keys() - found.keys() - optional):
        raise UserError(f"{directory}: tensor {name} is missing; export every tensor of the start model")
    for name in sorted(found.keys() - expected.keys() - optional):
        raise UserError(f"{directory}: tensor {name} is not in the start model; the engine would ignore it")
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise UserError(
                f"{directory}: tensor {name} has shape {list(found[name])}, the engine holds"
                f" {list(expected[name])}"
            )
