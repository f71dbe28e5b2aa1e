"""Weights by broadcast."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.config.schema import LOOPBACK
from megasd.engine.client import EngineClient, EngineError, Unreachable
from megasd.engine.pool_weights import InFlight, PoolWeights
from megasd.weight_sync.transport import PendingSend
from megasd.weights.gather_plan import Bucket, GatherPlan

CONNECT_TIMEOUT = timedelta(seconds=120)


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
