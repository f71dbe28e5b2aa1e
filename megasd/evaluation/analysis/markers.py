"""Count epistemic markers, the ten words of doubt of Kim et al. (arXiv 2603.24472).

The markers are found in texts and on tokens. Plain Python.

    # as the paper's code counts: any substring, case aside
    substring_counts("Unlikely, but wait...")["likely"] == 1
    word_counts("Unlikely, but wait...")["likely"] == 0          # whole words only

The paper's number is the sum of the substring counts, so "unlikely" and "checking" count. Whole
words are counted in addition.
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
# A decoder writes this character for bytes that are no character yet.
REPLACEMENT = "\ufffd"
# So many tokens are decoded before a new token, since a decoder may strip the space of the first
# token that it is given.
CONTEXT = 4
# At most so many tokens wait until their bytes are characters. More tokens wait only if their bytes
# never become characters.
MAX_PENDING = 16

# The characters [start, end) of a text.
Span = tuple[int, int]


def substring_counts(text: str) -> dict[str, int]:
    """Marker -> occurrences as a substring, without regard to case.

    This is the rule of the paper's code. Occurrences of the same marker do not overlap.
    """
    lowered = _lower(text)
    return {marker: lowered.count(marker) for marker in MARKERS}


def word_counts(text: str) -> dict[str, int]:
    """Marker -> occurrences as a whole word (letters, digits and _), without regard to case."""
    lowered = _lower(text)
    return {marker: sum(1 for _ in pattern.finditer(lowered)) for marker, pattern in WORDS.items()}


def marker_spans(text: str, marker: str) -> list[Span]:
    """The spans of a marker as a substring, in order; as many as `substring_counts` counts."""
    return [match.span() for match in re.finditer(marker, _lower(text))]


def token_spans(ids: list[int], decode: Callable[[list[int]], str]) -> tuple[str, list[Span]]:
    """(text, the span of the text that each token wrote), by decoding one token more at a time.

    A special token writes no characters and has an empty span. If several tokens make a character
    together (bytes of UTF-8), all of them have the character's span. The text is `decode(ids)` for
    byte-level and character tokenizers. Each token is decoded with a few tokens before it, so time
    is linear in the tokens.
    """
    pieces: list[str] = []
    spans: list[Span] = []
    # The number of characters written so far, and of the tokens that wrote them.
    length = known = 0
    for i in range(len(ids)):
        begin = max(0, known - CONTEXT)
        before, after = decode(ids[begin:known]), decode(ids[begin : i + 1])
        new = after[len(before) :]
        if new.endswith(REPLACEMENT) and i + 1 < len(ids) and i + 1 - known < MAX_PENDING:
            # The tokens may hold the first bytes of a character.
            continue
        pieces.append(new)
        spans += [(length, length + len(new))] * (i + 1 - known)
        length, known = length + len(new), i + 1
    return "".join(pieces), spans


def marker_tokens(ids: list[int], decode: Callable[[list[int]], str]) -> dict[str, list[int]]:
    """Marker -> the positions in `ids` of the marker's tokens, in order.

    A token belongs to a marker if it writes at least one character of an occurrence.
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
    """The text in lower case, with the same length.

    One character of Unicode (U+0130) would become two characters, and offsets would shift.
    """
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
