"""README.md of a converted model: the facts of its making. No path but those that the user gave."""

from __future__ import annotations

from typing import Any


def card(facts: dict[str, Any]) -> str:
    """Markdown. `facts`: what to say -> value, in order; "title" is the heading, None values are left out."""
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
