"""Weights into engines by a safetensors file that every engine loads by itself (sync.transport=disk)."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasd.engine.pool_weights import PoolWeights
from megasd.weight_sync.transport import AlreadySent, PendingSend
from megasd.weights.block_fp8 import FP8
from megasd.weights.gather_plan import Bucket, GatherPlan
from megasd.weights.hf_files import write_hf_config

_FILE_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3"}
_UNFINISHED, _FINISHED = "model.safetensors.tmp", "model.safetensors"


class DiskTransport:
    """Writes the buckets into a file, which the engines then load. Two directories take turns.

    The last pushed file stays until the next push has succeeded, since a restarted engine loads it.
    """

    def __init__(self, weights: PoolWeights, device: torch.device, directories: tuple[Path, Path]) -> None:
        self.weights, self.device, self.directories = weights, device, directories
        self._turn = 0
        # a GPU's buckets pass through it: pinned memory takes them at the speed of the link
        self._host = torch.empty(0, dtype=torch.uint8)
        # open from `begin` to `commit`
        self._file: io.FileIO | None = None

    def make_buffer(self, nbytes: int) -> Tensor:
        """Plain memory of the actor's device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        """Write config.json and the header of the file, whose data section is the buckets in order."""
        directory, model_path = self.directories[self._turn], Path(self.weights.model_path)
        directory.mkdir(parents=True, exist_ok=True)
        dtypes = {entry.dtype for entry in plan.tensors().values()}
        if FP8 in dtypes:
            # the engine's own config.json says how it is quantised
            shutil.copyfile(model_path / "config.json", directory / "config.json")
        else:
            write_hf_config(model_path, directory, max(dtypes, key=lambda dtype: dtype.itemsize))
        self._file = (directory / _UNFINISHED).open("wb", buffering=0)
        self._file.write(file_header(plan))

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        """Append the bucket to the file. RuntimeError before `begin`."""
        if self._file is None:
            raise RuntimeError("a bucket was sent before the push began")
        if flat.is_cuda:
            if self._host.numel() < flat.numel():
                self._host = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
            flat = self._host[: flat.numel()].copy_(flat)
        view = memoryview(flat.numpy().data)
        # an unbuffered write may be partial
        while view:
            view = view[self._file.write(view) :]
        return AlreadySent()

    def commit(self, version: int) -> None:
        """The engines load the file, in one request each, restarted ones too."""
        self.cancel()
        directory = self.directories[self._turn]
        (directory / _UNFINISHED).replace(directory / _FINISHED)
        self.weights.push(str(directory), version)
        self._turn = 1 - self._turn

    def cancel(self) -> None:
        """Close the file; the next push writes it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file. Whoever gave the directories removes them."""
        self.cancel()


def file_header(plan: GatherPlan) -> bytes:
    """The head of a safetensors file whose data section is the plan's buckets, one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for bucket in plan.buckets:
        for name, entry in bucket.tensors.items():
            offsets = [start + entry.offset, start + entry.offset + entry.nbytes]
            header[name] = {
                "dtype": _FILE_DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
        start += bucket.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
