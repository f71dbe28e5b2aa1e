"""What nvidia-smi says: the GPUs, their health and their links. Its text is read by pure functions."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

from megasd.cluster.doctor.report import command, one_line

QUERY = "index,name,memory.total,memory.used,driver_version,compute_cap"
HEALTH = "index,ecc.errors.uncorrected.volatile.total,{0}.hw_slowdown,{0}.sw_thermal_slowdown"
# the second is what older drivers call them
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")


@dataclass(frozen=True)
class InstalledGpu:
    index: int
    name: str
    # bytes
    total: int
    # bytes
    used: int
    driver: str
    capability: tuple[int, int] | None


def parse_gpus(text: str) -> list[InstalledGpu]:
    """The rows of nvidia-smi --query-gpu=QUERY --format=csv,noheader,nounits. ValueError for
    anything else.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not cells[0].isdecimal():
            raise ValueError(f"nvidia-smi said {one_line(line, 120)!r}")
        # [N/A] where memory is shared with the host
        memory = [int(cell) << 20 if cell.isdecimal() else 0 for cell in cells[2:4]]
        major, _, minor = cells[5].partition(".")
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        found.append(InstalledGpu(int(cells[0]), cells[1], *memory, cells[4], capability))
    return found


def parse_health(text: str) -> list[str]:
    """What is wrong, a phrase each, from the rows of nvidia-smi --query-gpu=HEALTH."""
    wrong = []
    for line in filter(None, map(str.strip, text.splitlines())):
        index, errors, slowdown, hot = (cell.strip() for cell in line.split(","))
        if errors.isdecimal() and int(errors):
            wrong.append(f"GPU {index}: {errors} uncorrected memory errors")
        if slowdown == "Active":
            wrong.append(f"GPU {index}: clocks held down by the hardware")
        if hot == "Active":
            wrong.append(f"GPU {index}: clocks held down for heat")
    return wrong


def parse_topology(text: str) -> Counter[str]:
    """Kind of link -> pairs of GPUs, from nvidia-smi topo -m: NV18, PIX, PXB, PHB, NODE, SYS."""
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    header = next((row for row in rows if len(row) > 1 and row[1].startswith("GPU")), [])
    order = [row[0] for row in rows if row is not header]
    pairs: Counter[str] = Counter()
    for row in (row for row in rows if row is not header):
        place = order.index(row[0])
        # right of the diagonal
        pairs.update(row[1 + place + 1 : 1 + len(order)])
    return pairs


@functools.cache
def smi_says(smi: str = "nvidia-smi") -> tuple[tuple[InstalledGpu, ...], str]:
    """(GPUs, what went wrong) by nvidia-smi; ((), "") where there is none of either."""
    status, text = command([smi, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"])
    if status == 127:
        return (), ""
    if status:
        return (), one_line(text)
    return tuple(parse_gpus(text)), ""
