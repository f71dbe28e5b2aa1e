"""Weights by a safetensors file."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasd.engine.pool_weights import PoolWeights
from megasd.weight_sync.transport import Done, PendingSend
from megasd.weights.block_fp8 import FP8
from megasd.weights.gather_plan import Bucket, GatherPlan
from megasd.weights.hf_files import write_hf_config

_FILE_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3"}


class DiskTransport:
    """`directories` take turns: the last confirmed one stays until the next push is, since a
    restarted engine loads it.
    """

    def __init__(self, weights: PoolWeights, device: torch.device, directories: tuple[Path, Path]) -> None:
        self.weights, self.model_path, self.device, self.directories = (
            weights,
            Path(weights.model_path),
            device,
            directories,
        )
        # pinned, so that a GPU's buckets come at the speed of the link
        self._host: Tensor | None = None
        self._turn = 0
        self._file: io.BufferedWriter | None = None

    def make_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        """Write config.json and the file's header: a bucket is a stretch of the data section, so
        nothing is known too late.
        """
        directory = self.directories[self._turn]
        directory.mkdir(parents=True, exist_ok=True)
        dtypes = {entry.dtype for entry in plan.tensors().values()}
        # the engine's own config.json says how it is quantised
        if FP8 in dtypes:
            shutil.copyfile(self.model_path / "config.json", directory / "config.json")
        else:
            write_hf_config(self.model_path, directory, max(dtypes, key=lambda dtype: dtype.itemsize))
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
        self._file = (directory / "model.safetensors.tmp").open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        if flat.is_cuda:
            if self._host is None or self._host.numel() < flat.numel():
                self._host = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
            flat = self._host[: flat.numel()].copy_(flat)
        view = memoryview(flat.numpy())
        # an unbuffered write may be partial
        while view:
            view = view[self._file.write(view) :]
        return Done()

    def commit(self, version: int) -> None:
        """The engines load the file, in one request each, restarted ones too."""
        self.cancel()
        directory = self.directories[self._turn]
        (directory / "model.safetensors.tmp").replace(directory / "model.safetensors")
        self.weights.push(str(directory), version)
        self._turn = 1 - self._turn

    def cancel(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self.cancel()
