"""The metric names that docs/metrics.md explains."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented() -> set[str]:
    """Names in the first column of the page's tables, such as "train/loss"."""
    return set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
