"""Bounds of single values. A field of schema.py carries its bound in its metadata.

    steps: int = bounded(100, POSITIVE)
    urls: list[str] = field(default_factory=list, metadata=bound(each_matching(...)))

`bound_of` reads the bound back; values.py checks a config with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

Value = TypeVar("Value")
KEY = "bound"


@dataclass(frozen=True)
class Bound:
    """A condition on one value: `allows(value)` is True for a good value, `message` names it."""

    message: str
    allows: Callable[[Any], bool]


POSITIVE = Bound("must be greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Bound("must be 0 or more", lambda v: v >= 0)
FRACTION = Bound("must lie in [0, 1]", lambda v: 0 <= v <= 1)
NONZERO_FRACTION = Bound("must lie in (0, 1]", lambda v: 0 < v <= 1)
MOMENTUM = Bound("must lie in [0, 1)", lambda v: 0 <= v < 1)
NOT_EMPTY = Bound("must not be empty", lambda v: bool(v.strip()))
TOP_K = Bound("must be -1 (off) or greater than 0", lambda v: v == -1 or v > 0)


def matching(pattern: str, message: str) -> Bound:
    """The bound of a string that must match the whole of a regular expression."""
    return Bound(message, lambda v: bool(re.fullmatch(pattern, v)))


def each_matching(pattern: str, message: str) -> Bound:
    """The bound of a list of strings that must each match the whole of a regular expression."""
    return Bound(message, lambda v: all(re.fullmatch(pattern, item) for item in v))


def within(low: int, high: int) -> Bound:
    """The bound of a number in [low, high], both included."""
    return Bound(f"must lie in [{low}, {high}]", lambda v: low <= v <= high)


def bounded(default: Value, bound_: Bound) -> Value:
    """A dataclass field with a default and a bound."""
    return field(default=default, metadata=bound(bound_))


def bound(bound_: Bound) -> dict[str, Bound]:
    """The metadata of a dataclass field that carries a bound."""
    return {KEY: bound_}


def bound_of(item: Field[Any]) -> Bound | None:
    """The bound that a dataclass field carries; None for a field without one."""
    return item.metadata.get(KEY)
