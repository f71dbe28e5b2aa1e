"""When two prompts are the same: digests and spellings that do not depend on form.

Prompts are the same when their texts are the same, except for case, spacing, typographic variants and
a final mark. Questions are compared without the system turn and without sentences that say how to
answer.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from megasd.types import Message

SAME = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | dict.fromkeys("‐‑‒–—―−", "-")
    | dict.fromkeys("‘’‚‛′", "'")
    | dict.fromkeys("“”„‟″", '"')
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
)
VARIANT = re.compile(f"[{''.join(map(chr, SAME))}]")
# A sentence that says how to answer, in lower case.
HOW_TO_ANSWER = re.compile(r"\\boxed|</?answer>|step[ -]by[ -]step|final answer|\$answer|\"answer:\"")
DIGIT = re.compile(r"\d")
SENTENCE = re.compile(r"(?<=[.?!:])\s+|\n+")
ROUND_SYMBOLS = re.compile(r" (?=[^\w\s])|(?<=[^\w\s]) ")
TOKEN = re.compile(r"\w+|[^\w\s]")
FILLER = set(
    ". , ; : ? ! ' \" ` please what whats is are s the a an of find compute calculate evaluate determine"
    " solve give me work out".split()
)


def prompt_digest(messages: list[Message]) -> bytes:
    """16 bytes that are equal for two prompts that are the same."""
    return digest(
        "\x1e".join(f"{message['role']}\x1f{same_text(message['content'])}" for message in messages)
    )


def same_text(text: str) -> str:
    """The text in the spelling in which texts are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = text.translate(SAME) if VARIANT.search(text) else text
    return ROUND_SYMBOLS.sub("", " ".join(text.casefold().split())).rstrip(" .?:;")


def question_of(messages: list[Message]) -> str:
    """What the user turns ask, in the spelling of same_text, without sentences on how to answer.

    If all sentences say how to answer, then all are kept.
    """
    text = "\n".join(message["content"] for message in messages if message["role"] == "user").lower()
    if ("boxed" in text or "answer" in text or "step" in text) and HOW_TO_ANSWER.search(text):
        kept = [part for part in SENTENCE.split(text) if not HOW_TO_ANSWER.search(part) or DIGIT.search(part)]
        text = "\n".join(kept) if any(part.strip() for part in kept) else text
    return same_text(text)


def nearly_digest(question: str) -> bytes:
    """16 bytes that are equal for nearly the same questions: only marks and filler words differ."""
    return digest(" ".join(token for token in TOKEN.findall(question) if token not in FILLER))


def digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
