"""Check every single value of a config against the bound of its field (schema.py, bounds.py).

What values may be together is in validate.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

from megasd.config.bounds import bound_of
from megasd.config.schema import ConfigError


def check_values(config: Any, origin: Mapping[str, str] | None = None, prefix: str = "") -> None:
    """Raise ConfigError for the first value that is not finite or breaks the bound of its field.

    config: a Config, or a section of one; then `prefix` is that section with a dot ("algorithm.").
    origin: dotted key -> the file or "command line" that set it, for the message.
    """
    for key, value, item in walk(config, prefix):
        where = (origin or {}).get(key, "config")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key}={value}: must be a finite number")
        bound = bound_of(item)
        if bound is not None and value is not None and not bound.allows(value):
            raise ConfigError(f"{where}: {key}={value!r}: {bound.message}")


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield (dotted key, value, field) of everything below a dataclass instance.

    An optional section that is off (None) yields its own key and None.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item
