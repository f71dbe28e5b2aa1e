"""Memory of this process and of this machine, from /proc."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """The largest resident memory that this process has had, mapped files included (MiB).

    NaN on a machine without /proc.
    """
    return _proc("/proc/self/status", "VmHWM:") / 1024


def available_bytes() -> float:
    """Memory that new processes can have (bytes); infinite on a machine without /proc."""
    kib = _proc("/proc/meminfo", "MemAvailable:")
    return kib * 1024 if kib == kib else float("inf")


def _proc(path: str, key: str) -> float:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return float(line.split()[1])
    except OSError:
        pass
    return float("nan")
