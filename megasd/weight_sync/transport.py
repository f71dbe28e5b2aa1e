"""How buckets of weights reach running engines: one interface, three ways behind it.

Rank 0 has whole buckets, and calls

    transport.begin(plan, version)                   # engines paused, or a file opened
    sent = transport.send(bucket, flat, last=False)  # returns at once
    sent.wait()                                      # only then may `flat` be written again
    transport.commit(version)                        # every engine holds `version` and goes on

disk_transport       one safetensors file (in shared memory, or at a path that the engine's machine
                     sees), which the engine loads by itself
group_transport      broadcast over a process group of this rank and all engine ranks: NCCL between
                     GPUs, gloo between CPUs
colocated_transport  the engine reads this rank's memory: CUDA IPC on a GPU, a shared-memory file
                     on a CPU; same machine, same user

Wire formats are SGLang 0.5.23's: /update_weights_from_{disk,distributed,tensor}, flattened buckets.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megasd.weights.gather_plan import Bucket, GatherPlan


class PendingSend(Protocol):
    """A bucket on its way."""

    def wait(self) -> None:
        """Wait until every engine has taken its copy. EngineError (refused) or Unreachable (died)."""


class Transport(Protocol):
    """A way for buckets of weights into the engines; used by rank 0."""

    def make_buffer(self, nbytes: int) -> Tensor:
        """Memory for a flat bucket: uint8 [nbytes], which `send` takes."""

    def begin(self, plan: GatherPlan, version: int, *, lacking: bool = False) -> None:
        """Start a push of the plan's buckets. `lacking`: only to engines that do not hold `version`.

        EngineError when an engine refuses, Unreachable when one died.
        """

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> PendingSend:
        """Send a bucket, uint8 [bucket.nbytes]; returns at once. `last`: it is the push's last."""

    def commit(self, version: int) -> None:
        """End the push: every engine that takes part holds `version` when this returns."""

    def cancel(self) -> None:
        """Break off a push that failed."""

    def close(self) -> None:
        """Give back files and process groups."""


class AlreadySent:
    """A bucket that every engine can read already."""

    def wait(self) -> None:
        """Returns at once."""
