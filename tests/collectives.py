"""Counts the collectives of torch.distributed and the bytes that a rank receives, by ring algorithms."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

NAMES = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast", "all_to_all_single")


class Collectives:
    """`with Collectives() as seen:` seen.count calls, seen.received bytes on this rank (all_reduce 2 (n-1)/n, all_gather (n-1)/n of the
    output). A collective of another kind counts, and its bytes are unknown: reading `received` then fails."""

    def __enter__(self) -> Collectives:
        self.count, self._bytes, self._real = 0, [], {name: getattr(dist, name) for name in NAMES}
        for name, real in self._real.items():
            setattr(dist, name, self._counted(name, real))
        return self

    def _counted(self, name, real):
        def call(first: Tensor, *args, **kwargs):
            self.count += 1
            n = dist.get_world_size(kwargs.get("group"))
            factor = {"all_reduce": 2 * (n - 1) / n, "all_gather_into_tensor": (n - 1) / n}.get(name)
            self._bytes.append(None if factor is None else factor * first.numel() * first.element_size())
            return real(first, *args, **kwargs)

        return call

    @property
    def received(self) -> float:
        return sum(self._bytes)

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)
