"""Meters of the benchmarks: bytes that a rank receives from other ranks, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Collective -> (argument that is measured, bytes that one of n ranks receives per byte of that
# argument by a ring algorithm).
RULES: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_reduce": ("tensor", lambda n: 2 * (n - 1) / n),
    "all_gather_into_tensor": ("output_tensor", lambda n: (n - 1) / n),
    "all_gather": ("tensor_list", lambda n: (n - 1) / n),
    "reduce_scatter_tensor": ("input", lambda n: (n - 1) / n),
    "reduce_scatter": ("input_list", lambda n: (n - 1) / n),
    "all_to_all_single": ("input", lambda n: (n - 1) / n),
    "broadcast": ("tensor", lambda n: float(n > 1)),
}
# Later versions of torch have new names for two collectives.
for _new, _old in (
    ("all_gather_single", "all_gather_into_tensor"),
    ("reduce_scatter_single", "reduce_scatter_tensor"),
):
    if hasattr(dist, _new):
        RULES[_new] = RULES[_old]


class RingBytes:
    """Counts the bytes that the collectives of torch.distributed bring to this rank.

    `with RingBytes() as meter:` adds bytes to meter.received[meter.phase], and calls to
    meter.calls[meter.phase].

    Collectives that are not in RULES (barrier, object collectives, point to point) are not counted.
    """

    def __init__(self) -> None:
        self.phase = "forward"
        self.received = {"forward": 0.0, "backward": 0.0}
        self.calls = {"forward": 0, "backward": 0}

    def __enter__(self) -> RingBytes:
        self._real = {name: getattr(dist, name) for name in RULES}
        for name, real in self._real.items():
            setattr(dist, name, self._counted(real, *RULES[name]))
        return self

    def _counted(self, real: Callable, argument: str, factor: Callable[[int], float]) -> Callable:
        signature = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            tensors = [bound[argument]] if isinstance(bound[argument], Tensor) else bound[argument]
            num_ranks = dist.get_world_size(bound.get("group"))
            self.calls[self.phase] += 1
            self.received[self.phase] += factor(num_ranks) * sum(
                t.numel() * t.element_size() for t in tensors
            )
            return real(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)


class PeakMemory:
    """Measures by how many bytes memory rises between start() and stop().

    CPU: resident memory of the process (Linux: VmHWM, reset by writing 5 to clear_refs). CUDA:
    bytes that the caching allocator gave out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Free what can be freed, and take the present level as the base."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
            return
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            # Freed memory that glibc keeps would hide what a call takes.
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._base = _resident("VmRSS")

    def stop(self) -> int:
        """Bytes of the peak since start() above the base."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._base
        return max(0, _resident("VmHWM") - self._base)


def _resident(field: str) -> int:
    """A size of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status; peak memory on a CPU is read on Linux alone")
