"""Three ways for a bucket of weights into running engines, behind one interface, used by the rank
that has whole buckets (rank 0).

    transport.begin(plan, version)                  # engines paused, or a file opened
    sent = transport.send(bucket, flat, last=False) # returns at once; `flat` must not be written before sent.wait() has returned
    transport.commit(version)                       # every engine holds `version` and goes on

DiskTransport         one safetensors file (shared memory, or a path that the engine's machine
                      sees); the engine loads it by itself
GroupTransport        broadcast over a process group of this rank and all engine ranks: NCCL between
                      GPUs, gloo between CPUs
ColocatedTransport    the engine reads this rank's memory: CUDA IPC on a GPU, a shared-memory file
                      on a CPU; same machine, same user

Wire formats are SGLang 0.5.23's: /update_weights_from_{disk,distributed,tensor}, flattened buckets.
"""  # noqa: E501

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from megasd.config.schema import LOOPBACK
from megasd.engine.client import EngineClient, EngineError, Unreachable
from megasd.engine.pool_weights import InFlight, PoolWeights
from megasd.weights.block_fp8 import FP8
from megasd.weights.gather_plan import Bucket, GatherPlan
from megasd.weights.hf_files import write_hf_config

CONNECT_TIMEOUT = timedelta(seconds=120)
_FILE_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3"}


class PendingSend(Protocol):
    """A bucket on its way."""

    def wait(self) -> None:
        """Until every engine has taken its copy. EngineError (refused) or Unreachable (died)."""


class Done:
    """Sent, and already there."""

    def wait(self) -> None:
        pass


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


class GroupTransport:
    """A process group of its own: this rank is its rank 0, then come every engine's ranks. Formed
    anew when an engine was restarted.
    """

    def __init__(self, weights: PoolWeights, device: torch.device, in_flight: InFlight) -> None:
        self.weights, self.device, self.in_flight = weights, device, in_flight
        self._group: dist.ProcessGroup | None = None
        self._group_name, self._members = "", ()

    def make_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        engines = self.weights.open_update(version, self.in_flight, lacking=lacking)
        members = tuple((engine.url, engine.incarnation) for engine in engines)
        if self._group is None or members != self._members:
            self._disconnect()
            self._connect(engines)
            self._members = members

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        body = {
            "names": list(bucket.tensors),
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.tensors.values()],
            "shapes": [list(entry.shape) for entry in bucket.tensors.values()],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            "flush_cache": last,
        }
        answer = self.weights.update("/update_weights_from_distributed", [body] * len(self._members))
        return _Broadcast(self, flat, answer)

    def commit(self, version: int) -> None:
        self.weights.close_update(version)

    def cancel(self) -> None:
        """After a failure: the group may be waiting for somebody who is gone."""
        self._disconnect()

    def close(self) -> None:
        self._disconnect()

    def _connect(self, engines: list[EngineClient]) -> None:
        world, serial = (
            1 + sum(engine.tp_size for engine in engines),
            int(self._group_name.rpartition("-")[2] or 0) + 1,
        )
        self._group_name = f"megasd-{os.getpid()}-{serial}"
        address = _address_seen_by([engine.url for engine in engines])
        # bound to that address alone: a TCPStore by itself listens on all of them
        listener = socket.create_server((address, 0))
        store = dist.TCPStore(
            address,
            listener.getsockname()[1],
            world,
            is_master=True,
            timeout=CONNECT_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        backend, bodies, offset = "nccl" if self.device.type == "cuda" else "gloo", [], 1
        for engine in engines:
            bodies.append(
                {
                    "master_address": address,
                    "master_port": store.port,
                    "rank_offset": offset,
                    "world_size": world,
                    "group_name": self._group_name,
                    "backend": backend,
                }
            )
            offset += engine.tp_size
        answer = self.weights.update("/init_weights_update_group", bodies)
        store, name = dist.PrefixStore(self._group_name, store), self._group_name
        # it would wait for an engine that refuses, or dies
        joined = _in_thread(lambda: _join(store, world, name, backend))
        while not joined.done():
            if answer.done() and answer.exception() is not None:
                raise answer.exception()
            time.sleep(0.001)
        if joined.exception() is not None:
            raise Unreachable(f"no process group with the engines: {joined.exception()}")
        self._group = joined.result()
        answer.result()

    def _disconnect(self) -> None:
        """Close this side first, which frees engines that wait in a broadcast; not waited for,
        since gloo sits a broken one out.
        """
        group, self._group, self._members = self._group, None, ()
        if group is None:
            return
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                group.abort()
        _in_thread(lambda: dist.destroy_process_group(group))
        # the engines that are left forget it; a dead one has
        with contextlib.suppress(Exception):
            self.weights.leave_group(self._group_name)


class _Broadcast:
    """One bucket's broadcast beside the engines' answers to the request that announced it."""

    def __init__(
        self, transport: GroupTransport, flat: Tensor, answer: concurrent.futures.Future[None]
    ) -> None:
        self.answer = answer
        self.work = transport._group.broadcast(flat, 0)

    def wait(self) -> None:
        # an engine that refused, or died, never joins in
        while not self.work.is_completed():
            if self.answer.done() and self.answer.exception() is not None:
                raise self.answer.exception()
            time.sleep(0.0002)
        try:
            self.work.wait()
        except RuntimeError as error:
            # what the engine has to say comes first, if it is a death
            with contextlib.suppress(EngineError):
                self.answer.result()
            raise Unreachable(
                f"the process group to the engines broke: {str(error).splitlines()[0]}"
            ) from error
        self.answer.result()


class ColocatedTransport:
    """The engine maps this process's buffer and copies out of it; only a handle travels, over
    loopback HTTP, to processes of this user.
    """

    def __init__(self, weights: PoolWeights, device: torch.device, in_flight: InFlight) -> None:
        self.weights, self.device, self.in_flight = weights, device, in_flight
        for engine in weights.pool.engines:
            _require_loopback(engine)
        self._engines: list[EngineClient] = []

    def make_buffer(self, nbytes: int) -> Tensor:
        if self.device.type == "cuda":
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        with _quiet(), _sharing_by_name():
            return torch.empty(nbytes, dtype=torch.uint8).share_memory_()

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        self._engines = self.weights.open_update(version, self.in_flight, lacking=lacking)

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        bodies = [
            {
                "serialized_named_tensors": [handle(bucket, flat) for _ in range(engine.tp_size)],
                "load_format": "flattened_bucket",
                "flush_cache": last,
            }
            for engine in self._engines
        ]
        return _Applied(
            self.weights, self.weights.update("/update_weights_from_tensor", bodies), fence=flat.is_cuda
        )

    def commit(self, version: int) -> None:
        self.weights.close_update(version)

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Applied:
    def __init__(self, weights: PoolWeights, answer: concurrent.futures.Future[None], *, fence: bool) -> None:
        self.weights, self.answer, self.fence = weights, answer, fence

    def wait(self) -> None:
        self.answer.result()
        if self.fence:
            # SGLang answers when its copies are queued, not when they are done. Its checksum call
            # waits for the device; with every name left out ("" is part of each) it does nothing
            # else.
            self.weights.checksums(skip=[""])


def handle(bucket: Bucket, flat: Tensor) -> str:
    """Base64 of what SGLang's flattened-bucket loader reads: a handle of `flat`'s memory and the
    place of each tensor in it.

    Every handle is read exactly once: torch counts the readers of shared memory. SGLang's unpickler
    admits only data classes, among them SimpleNamespace, so the trainer needs no sglang to write
    one.
    """
    metadata = [
        SimpleNamespace(
            name=name, shape=torch.Size(entry.shape), dtype=entry.dtype, start_idx=entry.offset,
            end_idx=entry.offset + entry.nbytes, numel=entry.nbytes,
        )
        for name, entry in bucket.tensors.items()
    ]  # fmt: skip
    if flat.is_cuda:
        # what fills the buffer is done
        torch.cuda.current_stream(flat.device).synchronize()
    out = io.BytesIO()
    with _sharing_by_name():
        ForkingPickler(out, 4).dump(
            {"flattened_tensor": _Handle(flat) if flat.is_cuda else flat, "metadata": metadata}
        )
    return base64.b64encode(out.getvalue()).decode()


class _Handle:
    """A CUDA tensor's IPC handle that names its GPU by UUID: the engine may count its devices
    differently (CUDA_VISIBLE_DEVICES).
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self.flat)
        uuid = str(torch.cuda.get_device_properties(self.flat.device).uuid)
        # rebuild_cuda_tensor's storage_device
        return rebuild, (*arguments[:6], uuid, *arguments[7:])


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """CPU memory is shared by name: a file descriptor would need both processes to have the same
    multiprocessing key.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The first buffer that is shared starts torch's manager process, which would hold this
    process's stdout open after it.
    """
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1), os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)


def _in_thread(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run `work` in a thread that does not keep the process alive."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _require_loopback(engine: EngineClient) -> None:
    host = urlsplit(engine.url).hostname if engine.url else engine.config.host
    if host not in LOOPBACK:
        raise EngineError(
            f"sync.transport=colocated: {engine.url} is not on this machine; take group or disk"
        )


def _address_seen_by(urls: Sequence[str]) -> str:
    """This machine's address on the way to the engines: loopback where all of them are here."""
    hosts = [urlsplit(url) for url in urls]
    parts = next((host for host in hosts if host.hostname not in LOOPBACK), hosts[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _join(store: dist.Store, world: int, name: str, backend: str) -> dist.ProcessGroup:
    """Rank 0 of a group outside the trainer's world, as SGLang's side makes it (srt/utils/common.py
    init_custom_process_group).
    """
    from torch.distributed import distributed_c10d as c10d

    group, _ = c10d._new_process_group_helper(
        world, 0, [], dist.Backend(backend), store, group_name=name, timeout=CONNECT_TIMEOUT
    )  # fmt: skip
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group
