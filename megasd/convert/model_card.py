"""README.md of a converted model. It names no path except the paths that the user gave."""

from __future__ import annotations

from typing import Any


def card(facts: dict[str, Any]) -> str:
    """The text of README.md.

    `facts`: name -> value, in order. "title" is the heading; values that are None are left out.
    """
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None and name != "title"]
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {facts['title']}",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
