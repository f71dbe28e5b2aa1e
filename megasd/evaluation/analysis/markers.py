"""Epistemic markers: the ten words of doubt that Kim et al. (arXiv 2603.24472) count, in texts and
on tokens. Plain Python.

    # as the paper's code counts: any substring, case aside
    substring_counts("Unlikely, but wait...")["likely"] == 1
    word_counts("Unlikely, but wait...")["likely"] == 0          # whole words only

The paper's number is the sum of the substring counts: "unlikely" and "checking" are in it. Whole
words are counted next to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MARKERS = (
    "wait",
    "hmm",
    "perhaps",
    "maybe",
    "actually",
    "alternatively",
    "seems",
    "might",
    "likely",
    "check",
)
WORDS = {marker: re.compile(rf"\b{marker}\b") for marker in MARKERS}
# what a decoder writes for bytes that are no character yet
REPLACEMENT = "\ufffd"
# tokens decoded before a new one: a decoder may strip the space of the first token it is given
CONTEXT = 4
# tokens put off until their bytes are characters; more come only of bytes that never will be
MAX_PENDING = 16

# characters [start, end) of a text
Span = tuple[int, int]


def substring_counts(text: str) -> dict[str, int]:
    """Marker -> occurrences as a substring, case aside (upstream's rule; markers do not overlap
    themselves).
    """
    lowered = _lower(text)
    return {marker: lowered.count(marker) for marker in MARKERS}


def word_counts(text: str) -> dict[str, int]:
    """Marker -> occurrences as a whole word, case aside; letters, digits and _ make a word."""
    lowered = _lower(text)
    return {marker: sum(1 for _ in pattern.finditer(lowered)) for marker, pattern in WORDS.items()}


def marker_spans(text: str, marker: str) -> list[Span]:
    """Where a marker occurs as a substring, in order; as many as `substring_counts` says."""
    return [match.span() for match in re.finditer(marker, _lower(text))]


def token_spans(ids: list[int], decode: Callable[[list[int]], str]) -> tuple[str, list[Span]]:
    """(text, the characters of it that each token wrote), by decoding one token more at a time.

    A special token writes none: an empty span. Tokens that make a character together (bytes of
    UTF-8) all have its span. The text is `decode(ids)` for byte-level and character tokenizers;
    each token is decoded with a few before it, so time is linear in the tokens.
    """
    pieces: list[str] = []
    spans: list[Span] = []
    # characters written; tokens that wrote them
    length = known = 0
    for i in range(len(ids)):
        begin = max(0, known - CONTEXT)
        before, after = decode(ids[begin:known]), decode(ids[begin : i + 1])
        new = after[len(before) :]
        if new.endswith(REPLACEMENT) and i + 1 < len(ids) and i + 1 - known < MAX_PENDING:
            # perhaps the first bytes of a character
            continue
        pieces.append(new)
        spans += [(length, length + len(new))] * (i + 1 - known)
        length, known = length + len(new), i + 1
    return "".join(pieces), spans


def marker_tokens(ids: list[int], decode: Callable[[list[int]], str]) -> dict[str, list[int]]:
    """Marker -> positions in `ids` of the tokens that write at least one character of an
    occurrence, in order.
    """
    text, spans = token_spans(ids, decode)
    found: dict[str, list[int]] = {}
    for marker in MARKERS:
        inside = {place for start, end in marker_spans(text, marker) for place in range(start, end)}
        found[marker] = [
            i for i, (start, end) in enumerate(spans) if any(place in inside for place in range(start, end))
        ]
    return found


def _lower(text: str) -> str:
    """Lower case of the same length: one character of Unicode (U+0130) would become two, and
    offsets would slip.
    """
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
