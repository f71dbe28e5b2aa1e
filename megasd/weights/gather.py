"""Carries out a gather plan: the pieces of each bucket travel from their owners to rank 0.

While the caller sends one bucket on, the pieces of the next bucket travel.

    gather = Gather(plan, params, rank=rank)
    # on every rank; flat is None on all ranks but rank 0
    for bucket, flat in gather.replay():
        # flat (uint8) is overwritten two buckets later
        ...

There is one point-to-point message for each bucket and owner, and no collective: gloo's gather is 18
times slower than its send. There are two buffers of each kind, kept from push to push: fresh memory
costs more in page faults than the copy itself (0.29 s against 0.03 s for 250 MiB, measured).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.models import tp_layouts
from megasd.models.tp_layouts import Shape
from megasd.weights.gather_plan import ALIGNMENT, Bucket, GatherPlan, Holding, Param, Piece
from megasd.weights.te_fp8 import plain


def exchange(mine: Holding, world_size: int) -> list[Holding]:
    """The holdings of all ranks, in rank order.

    Collectives: two all_gathers of bytes (JSON) over the CPU backend of the world.
    """
    if world_size == 1:
        return [mine]
    params = [
        [name, list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in mine.params.items()
    ]
    text = json.dumps([mine.rank, mine.tp_rank, mine.tp_size, mine.ep_size, params]).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(texts, padded)
    found = []
    for received in texts:
        rank, tp_rank, tp_size, ep_size, params = json.loads(bytes(received.numpy()))
        found.append(
            Holding(rank, tp_rank, tp_size, ep_size, {n: (tuple(s), getattr(torch, d)) for n, s, d in params})
        )
    return found


@dataclass
class _Slot:
    """The buffers of every second bucket."""

    # message to rank 0; empty until the first message
    outgoing: Tensor
    # on rank 0: owner -> message
    incoming: dict[int, Tensor] = field(default_factory=dict)
    # on rank 0: the whole bucket
    flat: Tensor | None = None


@dataclass(frozen=True)
class _Transfer:
    """A bucket whose messages are on their way into the buffers of a slot."""

    bucket: Bucket
    slot: _Slot
    works: list[dist.Work]


class Gather:
    """One rank's part of the transfers to rank 0.

    Every rank of the world makes a Gather of the same plan, and all ranks replay together.

    `params`: the live parameters of this rank, under global names. `device`: where whole buckets are
    put together. `make_buffer(nbytes)`: makes the memory of a flat bucket (uint8) on rank 0, called
    twice in all; None: plain memory on `device`.
    """

    def __init__(
        self,
        plan: GatherPlan,
        params: Mapping[str, Tensor],
        *,
        rank: int = 0,
        device: torch.device | str = "cpu",
        make_buffer: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.plan, self.params, self.rank = plan, params, rank
        self.device = torch.device(device)
        self._make = make_buffer or (
            lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        )
        self._slots = [_Slot(_empty(0, self.device)), _Slot(_empty(0, self.device))]

    def replay(
        self, only: frozenset[str] | None = None, ready: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Bucket, Tensor | None]]:
        """Buckets in order, with the flat buffer on rank 0 and None on other ranks.

        `only`: gather these parameters alone (the same set on every rank). `ready(i)` is called before
        the buffer of bucket i - 2 is written again: wait there until nobody reads this buffer.
        """
        buckets = [b if only is None else b.only(only) for b in self.plan.buckets]
        buckets = [bucket for bucket in buckets if bucket.params]
        transfers: deque[_Transfer] = deque()
        for i, bucket in enumerate(buckets):
            if i == 0:
                transfers.append(self._start(bucket, self._slots[0]))
            if i + 1 < len(buckets):
                transfers.append(self._start(buckets[i + 1], self._slots[(i + 1) % 2]))
            if ready is not None:
                ready(i)
            yield bucket, self._finish(transfers.popleft())

    def reserve(self) -> None:
        """Make the buffers of whole buckets now, on rank 0; without a call, the first bucket does."""
        if self.rank == 0:
            for slot in self._slots:
                self._flat(slot)

    def _flat(self, slot: _Slot) -> Tensor:
        """The whole-bucket buffer of a slot."""
        if slot.flat is None:
            slot.flat = self._make(self.plan.max_bucket_bytes)
        return slot.flat

    @torch.no_grad()
    def _start(self, bucket: Bucket, slot: _Slot) -> _Transfer:
        """Post the messages of a bucket. Earlier messages of the slot are done: `_finish` waited."""
        by_owner = _by_owner(bucket)
        operations = []
        if self.rank == 0:
            for owner, pieces in by_owner.items():
                if owner != self.rank:
                    nbytes = _message_bytes(pieces)
                    slot.incoming[owner] = _room(slot.incoming.get(owner), nbytes, self.device)
                    operations.append(dist.P2POp(dist.irecv, slot.incoming[owner][:nbytes], owner))
        elif self.rank in by_owner:
            pieces = by_owner[self.rank]
            nbytes = _message_bytes(pieces)
            slot.outgoing = _room(slot.outgoing, nbytes, self.device)
            for (param, _), view in zip(pieces, _views(slot.outgoing, pieces), strict=True):
                view.copy_(plain(self.params[param.name]))
            operations.append(dist.P2POp(dist.isend, slot.outgoing[:nbytes], 0))
        return _Transfer(bucket, slot, dist.batch_isend_irecv(operations) if operations else [])

    @torch.no_grad()
    def _finish(self, transfer: _Transfer) -> Tensor | None:
        """Wait for the messages, and put the bucket together on rank 0."""
        for work in transfer.works:
            work.wait()
        if self.rank != 0:
            return None
        self.reserve()
        bucket, slot = transfer.bucket, transfer.slot
        flat = self._flat(slot)[: bucket.nbytes]
        tensors = bucket.views(flat)
        for owner, pieces in _by_owner(bucket).items():
            mine = owner == self.rank
            shards = (
                (plain(self.params[p.name]) for p, _ in pieces)
                if mine
                else _views(slot.incoming[owner], pieces)
            )
            for (param, piece), shard in zip(pieces, shards, strict=True):
                tp_layouts.merge([shard], [piece.layout], [tensors[part] for part in param.parts])
        return flat


def _by_owner(bucket: Bucket) -> dict[int, list[tuple[Param, Piece]]]:
    found: dict[int, list[tuple[Param, Piece]]] = {}
    for param in bucket.params:
        for piece in param.pieces:
            found.setdefault(piece.owner, []).append((param, piece))
    return found


def _size(shape: Shape, dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _message_bytes(pieces: Sequence[tuple[Param, Piece]]) -> int:
    return sum(_size(piece.layout.shape, param.dtype) for param, piece in pieces)


def _views(message: Tensor, pieces: Sequence[tuple[Param, Piece]]) -> Iterator[Tensor]:
    """The shards that lie one after another in a message."""
    offset = 0
    for param, piece in pieces:
        nbytes = torch.Size(piece.layout.shape).numel() * param.dtype.itemsize
        yield message[offset : offset + nbytes].view(param.dtype).view(piece.layout.shape)
        offset += _size(piece.layout.shape, param.dtype)


def _room(kept: Tensor | None, nbytes: int, device: torch.device) -> Tensor:
    """The kept buffer if it is long enough, otherwise a new buffer."""
    return kept if kept is not None and kept.numel() >= nbytes else _empty(nbytes, device)


def _empty(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
