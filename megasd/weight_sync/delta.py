"""Which parameters have changed since the last push (sync.delta).

Each rank keeps a fingerprint of every shard that it owns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.weights.gather_plan import GatherPlan
from megasd.weights.te_fp8 import plain

# odd, from the golden ratio, as a signed 64-bit number
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
# 64-bit words hashed at a time
_CHUNK = 1 << 20


def tensor_fingerprint(tensor: Tensor) -> int:
    """64 bits that depend on every byte of a tensor; equal bytes give an equal number.

    It is the sum of the 64-bit words, each times an odd number of its place, modulo 2**64.
    """
    data = plain(tensor).contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    total = 0
    for first in range(0, words.numel(), _CHUNK):
        chunk = words[first : first + _CHUNK]
        place = torch.arange(first, first + chunk.numel(), device=chunk.device) * 2 + 1
        mixed = chunk ^ (chunk >> 29)
        total += int((mixed * (place * _FACTOR | 1)).sum().item())
    return total & ((1 << 64) - 1)


class Fingerprints:
    """Fingerprints of this rank's shards: call `take` before a push, and `keep` after it succeeded."""

    def __init__(self) -> None:
        # of the weights that the engines hold
        self._applied: dict[str, int] = {}
        # of the weights that are being pushed
        self._taken: dict[str, int] = {}

    def take(
        self, plan: GatherPlan, params: Mapping[str, Tensor], *, whole: bool = False
    ) -> frozenset[str] | None:
        """Names of the parameters that have changed on any rank since `keep`.

        None (send all) when nothing was kept yet, or when a rank says `whole`. Collective: one
        all-reduce over the world, of a byte a parameter and one more.
        """
        names = [param.name for bucket in plan.buckets for param in bucket.params]
        self._taken = {name: tensor_fingerprint(params[name]) for name in names if name in params}
        device = next(iter(params.values())).device
        flags = [name in params and self._applied.get(name) != self._taken[name] for name in names]
        changed = torch.tensor([*flags, whole or not self._applied], dtype=torch.uint8, device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(changed, dist.ReduceOp.MAX)
        *found, everything = changed.tolist()
        return (
            None if everything else frozenset(name for name, flag in zip(names, found, strict=True) if flag)
        )

    def keep(self) -> None:
        """The push succeeded: the engines hold what was taken."""
        self._applied = self._taken

    def forget(self) -> None:
        """Forget what the engines hold, after a failed push: the next push sends every parameter."""
        self._applied = {}
