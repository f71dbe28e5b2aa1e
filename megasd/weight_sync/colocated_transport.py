"""Weights into engines on this machine that read this process's memory (sync.transport=colocated).

The memory is a CUDA IPC buffer on a GPU and a shared-memory file on a CPU.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import os
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megasd.config.schema import LOOPBACK
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError
from megasd.engine.pool_weights import InFlight, PoolWeights
from megasd.weight_sync.transport import PendingSend
from megasd.weights.gather_plan import Bucket, GatherPlan


class ColocatedTransport:
    """The engine maps this process's buffer and copies out of it.

    Only a handle of the buffer travels, over loopback HTTP, to processes of this user.
    """

    def __init__(self, weights: PoolWeights, device: torch.device, in_flight: InFlight) -> None:
        self.weights, self.device, self.in_flight = weights, device, in_flight
        for engine in weights.pool.engines:
            _require_loopback(engine)
        self._engines: list[EngineClient] = []

    def make_buffer(self, nbytes: int) -> Tensor:
        """Memory that the engines can map."""
        if self.device.type == "cuda":
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        with _quiet(), _sharing_by_name():
            return torch.empty(nbytes, dtype=torch.uint8).share_memory_()

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        """Pause the engines."""
        self._engines = self.weights.open_update(version, self.in_flight, lacking=lacking)

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        """Give each engine a handle of the bucket for each of its ranks."""
        bodies = [
            {
                "serialized_named_tensors": [handle(bucket, flat) for _ in range(engine.tp_size)],
                "load_format": "flattened_bucket",
                "flush_cache": last,
            }
            for engine in self._engines
        ]
        return _Copied(
            self.weights, self.weights.update("/update_weights_from_tensor", bodies), fence=flat.is_cuda
        )

    def commit(self, version: int) -> None:
        """Let the engines go on with `version`."""
        self.weights.close_update(version)

    def cancel(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class _Copied:
    """A bucket that the engines copy out of this process's memory."""

    def __init__(self, weights: PoolWeights, answer: concurrent.futures.Future[None], *, fence: bool) -> None:
        self.weights, self.answer, self.fence = weights, answer, fence

    def wait(self) -> None:
        """Wait until every engine has its copy. EngineError (refused) or Unreachable (died)."""
        self.answer.result()
        if self.fence:
            # SGLang answers when its copies are queued, not when they are done. Its checksum call
            # waits for the device. Every name contains "", so the call does nothing more.
            self.weights.checksums(skip=[""])


def handle(bucket: Bucket, flat: Tensor) -> str:
    """What SGLang's flattened-bucket loader reads, as base64.

    It holds a handle of the memory of `flat`, and the place of each tensor in it.

    Every handle must be read exactly once, since torch counts the readers of shared memory. SGLang's
    unpickler admits only data classes, among them SimpleNamespace: no sglang is needed to write one.
    """
    metadata = [
        SimpleNamespace(
            name=name, shape=torch.Size(entry.shape), dtype=entry.dtype, start_idx=entry.offset,
            end_idx=entry.offset + entry.nbytes, numel=entry.nbytes,
        )
        for name, entry in bucket.tensors.items()
    ]  # fmt: skip
    if flat.is_cuda:
        # wait until the kernels that fill the buffer are done
        torch.cuda.current_stream(flat.device).synchronize()
    out = io.BytesIO()
    with _sharing_by_name():
        ForkingPickler(out, 4).dump(
            {"flattened_tensor": _Handle(flat) if flat.is_cuda else flat, "metadata": metadata}
        )
    return base64.b64encode(out.getvalue()).decode()


class _Handle:
    """A CUDA tensor that is pickled as an IPC handle, with the UUID of its GPU.

    The engine may number its devices differently (CUDA_VISIBLE_DEVICES).
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self.flat)
        uuid = str(torch.cuda.get_device_properties(self.flat.device).uuid)
        # the 7th argument of rebuild_cuda_tensor is storage_device
        return rebuild, (*arguments[:6], uuid, *arguments[7:])


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Share CPU memory by name: a file descriptor would need both processes to have one key."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Close stdout and stderr to a process that is started in the block.

    The first shared buffer starts torch's manager process. It would hold this process's stdout open.
    """
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1), os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)


def _require_loopback(engine: EngineClient) -> None:
    host = urlsplit(engine.url).hostname if engine.url else engine.config.host
    if host not in LOOPBACK:
        raise EngineError(
            f"sync.transport=colocated: {engine.url} is not on this machine; take group or disk"
        )
