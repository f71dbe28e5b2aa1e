"""What nvidia-smi says about GPUs, their health and their links; pure functions read its text."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

from megasd.cluster.doctor.report import command, one_line

QUERY = "index,name,memory.total,memory.used,driver_version,compute_cap"
HEALTH = "index,ecc.errors.uncorrected.volatile.total,{0}.hw_slowdown,{0}.sw_thermal_slowdown"
# Names of HEALTH's clock columns; older drivers know the second.
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU of this machine. total, used: bytes of its memory. capability: compute capability."""

    index: int
    name: str
    total: int
    used: int
    driver: str
    capability: tuple[int, int] | None


def parse_gpus(text: str) -> list[InstalledGpu]:
    """Parse the rows of nvidia-smi --query-gpu=QUERY --format=csv,noheader,nounits.

    ValueError if the text is something else.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not cells[0].isdecimal():
            raise ValueError(f"nvidia-smi said {one_line(line, 120)!r}")
        # Memory is [N/A] if the GPU shares it with the host.
        total, used = (int(cell) << 20 if cell.isdecimal() else 0 for cell in cells[2:4])
        major, _, minor = cells[5].partition(".")
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        found.append(InstalledGpu(int(cells[0]), cells[1], total, used, cells[4], capability))
    return found


def parse_health(text: str) -> list[str]:
    """Faults as phrases, from the rows of nvidia-smi --query-gpu=HEALTH; [] if all is well."""
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
    """Count pairs of GPUs by link (NV18, PIX, PHB, NODE, SYS ...), from nvidia-smi topo -m."""
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    header = next((row for row in rows if len(row) > 1 and row[1].startswith("GPU")), [])
    order = [row[0] for row in rows if row is not header]
    pairs: Counter[str] = Counter()
    for row in (row for row in rows if row is not header):
        place = order.index(row[0])
        # Each pair stands twice in the table; the cells right of the diagonal count it once.
        pairs.update(row[1 + place + 1 : 1 + len(order)])
    return pairs


@functools.cache
def smi_says(smi: str = "nvidia-smi") -> tuple[tuple[InstalledGpu, ...], str]:
    """Return (GPUs, what went wrong) as nvidia-smi says; ((), "") if there is no nvidia-smi."""
    status, text = command([smi, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"])
    if status == 127:
        return (), ""
    if status:
        return (), one_line(text)
    return tuple(parse_gpus(text)), ""
