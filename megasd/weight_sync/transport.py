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

from typing import Protocol


class PendingSend(Protocol):
    """A bucket on its way."""

    def wait(self) -> None:
        """Until every engine has taken its copy. EngineError (refused) or Unreachable (died)."""


class Done:
    """Sent, and already there."""

    def wait(self) -> None:
        pass
