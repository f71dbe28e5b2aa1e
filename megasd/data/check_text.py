"""What can be wrong with the text of a prompt that reads well: damage, and odd turns.

    # ("encoding", '"answer" holds the character U+FFFD, ...')
    damaged_text(Prompt("a", [{"role": "user", "content": "7+8="}], "1\\ufffd5"))

A finding is (kind, message) or None. A rule here finds what is wrong in every task. What may be meant
is a warning or nothing. Plain Python, a few regular expressions a row.
"""

from __future__ import annotations

import json
import re

from megasd.data.rows import short
from megasd.types import Prompt

TextFinding = tuple[str, str] | None

DAMAGED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufeff\ufffd\ufffe\uffff]")
LOST_BACKSLASH = re.compile(
    r"\t(?=imes\b|ext\{|heta\b|frac\b)|\r(?=ight\b|angle\b)|\n(?=abla\b)|[\x08\x0c](?=[a-z])"
)
# UTF-8 that was read as Latin-1 or Windows-1252: é, typographic quotes and dashes, a replacement
# character, a byte order mark.
MOJIBAKE = re.compile("[ÂÃ][\u00a0-\u00bf‰œ]|â€[\u0080-\u00ff–—‘-„†-•…‰‹›€™œŸ¦]|ï¿½|ï»¿")
NO_VALUE = {
    "nan",
    "null",
    "n/a",
    "#n/a",
    "<na>",
    "todo",
    "tbd",
    "[object object]",
    "-",
    "--",
    "?",
    "???",
    "...",
    "…",
    "—",
}
CHAT_MARK = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\u00ad]")
UNFILLED = re.compile(r"\{\{?\s*[A-Za-z_]{4,}\s*\}?\}|\$\{\w+\}|<[a-z_]{4,}>|%\(\w+\)s")


def damaged_text(prompt: Prompt) -> TextFinding:
    """Characters that no text should hold, wrongly decoded text, and placeholders for no value."""
    texts = [(f'"{message["role"]}" text', message["content"]) for message in prompt.messages]
    texts += [('"answer"', prompt.answer), ('"solution"', prompt.solution or ""), ('"id"', prompt.id)]
    for name, text in texts:
        if text.isascii() and text.replace("\n", "").isprintable() and "\nabla" not in text:
            continue
        if found := LOST_BACKSLASH.search(text):
            return (
                "encoding",
                (
                    f"{name} holds {short(text[found.start() : found.start() + 8])}, LaTeX that lost its"
                    " backslash; write \\\\ in JSON"
                ),
            )
        if found := DAMAGED.search(text):
            return (
                "encoding",
                (
                    f"{name} holds the character U+{ord(found[0]):04X}, damage from an earlier conversion;"
                    " restore the text"
                ),
            )
        if found := MOJIBAKE.search(text):
            return (
                "encoding",
                f"{name} holds {short(found[0])}, UTF-8 that was read as another encoding; decode it again",
            )
    if found := INVISIBLE.search(prompt.answer):
        return "encoding", f'"answer" holds the invisible character U+{ord(found[0]):04X}; remove it'
    for name, text in ((texts[len(prompt.messages) - 1]), *texts[-3:-1]):
        text = text.strip()
        if text.lower() in NO_VALUE or text == "None" or UNFILLED.fullmatch(text):
            return "empty", f"{name} is {short(text)}, which stands for no value; fill it in or drop the row"
    return None


def odd_turns(prompt: Prompt) -> TextFinding:
    """Turns out of order, and text of a turn that is JSON of messages or a rendered template."""
    roles = [message["role"] for message in prompt.messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return "role", f"turns of {', '.join(roles)}; user and assistant must alternate, from user to user"
    for message in prompt.messages:
        text = message["content"]
        if found := CHAT_MARK.search(text):
            return (
                "template",
                f"the text holds {short(found[0])}, a mark of a chat template; give the messages without it",
            )
        if text.lstrip()[:1] in "[{" and '"role"' in text and '"content"' in text and _json(text) is not None:
            return "messages", "the text is JSON of messages; give the messages themselves"
    text = prompt.messages[-1]["content"]
    if not any(character.isalnum() for character in text):
        return "empty", f"the prompt is {short(text)}, without a letter or digit; fill it in or drop the row"
    return None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
