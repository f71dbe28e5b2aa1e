"""Weights into engines by broadcast over a process group (sync.transport=group).

The group has this process as rank 0, then the ranks of every engine. Each bucket is announced to
the engines by HTTP, and they join in its broadcast.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.config.schema import LOOPBACK
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.pool_weights import InFlight, PoolWeights
from megasd.weight_sync.transport import PendingSend
from megasd.weights.gather_plan import Bucket, GatherPlan

T = TypeVar("T")
CONNECT_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class _Connection:
    """A process group with engines."""

    group: dist.ProcessGroup
    name: str
    # (URL, incarnation) of the engines
    members: tuple[tuple[str, int], ...]


class GroupTransport:
    """Broadcasts buckets to the engines. The group is formed again when an engine was restarted."""

    def __init__(self, weights: PoolWeights, device: torch.device, in_flight: InFlight) -> None:
        self.weights, self.device, self.in_flight = weights, device, in_flight
        self._connection: _Connection | None = None
        # groups formed so far; no two have the same name
        self._num_groups = 0

    def make_buffer(self, nbytes: int) -> Tensor:
        """Plain memory of the actor's device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        """Pause the engines, and form the group if it is not there."""
        engines = self.weights.open_update(version, self.in_flight, lacking=lacking)
        members = tuple((engine.url, engine.incarnation) for engine in engines)
        if self._connection is None or members != self._connection.members:
            self._disconnect()
            self._connect(engines, members)

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        """Announce the bucket to the engines, and begin its broadcast. RuntimeError before `begin`."""
        connection = self._connection
        if connection is None:
            raise RuntimeError("a bucket was sent before the push began")
        body = {
            "names": list(bucket.tensors),
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.tensors.values()],
            "shapes": [list(entry.shape) for entry in bucket.tensors.values()],
            "group_name": connection.name,
            "load_format": "flattened_bucket",
            "flush_cache": last,
        }
        bodies = [body] * len(connection.members)
        answer = self.weights.update("/update_weights_from_distributed", bodies)
        return _Broadcast(answer, connection.group.broadcast(flat, 0))

    def commit(self, version: int) -> None:
        """Let the engines go on with `version`."""
        self.weights.close_update(version)

    def cancel(self) -> None:
        """Leave the group, which may be waiting for an engine that is gone."""
        self._disconnect()

    def close(self) -> None:
        """Leave the group."""
        self._disconnect()

    def _connect(self, engines: list[EngineClient], members: tuple[tuple[str, int], ...]) -> None:
        """Form a group with these engines. EngineError with an engine's answer, Unreachable if it fails."""
        self._num_groups += 1
        name, world = f"megasd-{os.getpid()}-{self._num_groups}", 1 + sum(one.tp_size for one in engines)
        address = _address_seen_by([engine.url for engine in engines])
        # bound to that address alone: a TCPStore by itself listens on all of them
        listener = socket.create_server((address, 0))
        tcp_store = dist.TCPStore(
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
                    "master_port": tcp_store.port,
                    "rank_offset": offset,
                    "world_size": world,
                    "group_name": name,
                    "backend": backend,
                }
            )
            offset += engine.tp_size
        answer = self.weights.update("/init_weights_update_group", bodies)
        store = dist.PrefixStore(name, tcp_store)
        # in a thread: joining waits for every engine, and one may refuse or die
        joined = _in_thread(lambda: _join(store, world, name, backend))
        while not joined.done():
            _raise_failure(answer)
            time.sleep(0.001)
        if joined.exception() is not None:
            raise Unreachable(f"no process group with the engines: {joined.exception()}")
        self._connection = _Connection(joined.result(), name, members)
        answer.result()

    def _disconnect(self) -> None:
        """Close this side first, which frees engines that wait in a broadcast.

        Nobody waits for the closing: gloo sits out a broadcast that broke.
        """
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                connection.group.abort()
        _in_thread(lambda: dist.destroy_process_group(connection.group))
        # The living engines forget the group. A dead one has forgotten it already.
        with contextlib.suppress(Exception):
            self.weights.leave_group(connection.name)


class _Broadcast:
    """The broadcast of one bucket, and the engines' answer to the request that announced it."""

    def __init__(self, answer: concurrent.futures.Future[None], work: dist.Work) -> None:
        self.answer, self.work = answer, work

    def wait(self) -> None:
        """Wait until the broadcast is done and every engine has answered.

        EngineError with the answer of an engine that refused; Unreachable when one died.
        """
        while not self.work.is_completed():
            # an engine that refused, or died, never joins in
            _raise_failure(self.answer)
            time.sleep(0.0002)
        try:
            self.work.wait()
        except RuntimeError as error:
            # if an engine died, its own error comes first
            with contextlib.suppress(EngineError):
                self.answer.result()
            raise Unreachable(
                f"the process group to the engines broke: {str(error).splitlines()[0]}"
            ) from error
        self.answer.result()


def _raise_failure(answer: concurrent.futures.Future[None]) -> None:
    """Raise what an answer failed with, if it is there."""
    if answer.done():
        failure = answer.exception()
        if failure is not None:
            raise failure


def _in_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run `work` in a thread that does not keep the process alive."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

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
    """Become rank 0 of a group outside the trainer's world.

    SGLang's side makes it in the same way: srt/utils/common.py, init_custom_process_group.
    """
    from torch.distributed import distributed_c10d as c10d

    group_name: Any = name
    group, _ = c10d._new_process_group_helper(
        world, 0, [], dist.Backend(backend), store, group_name=group_name, timeout=CONNECT_TIMEOUT
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group
