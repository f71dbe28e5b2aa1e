"""Reads single columns of a row for a mapping of data/columns.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from megasd.data.rows import DataError, kind_name


class Mapped(NamedTuple):
    """Values of FIELDS, unchecked, and the columns they came from where those have other names."""

    values: dict[str, Any]
    names: dict[str, str]


Mapping = Callable[[dict[str, Any], str], list[Mapped | None]]


def column(
    row: dict[str, Any], where: str, name: str, *, kinds: tuple[type, ...] = (str,), within: str = ""
) -> Any:
    value = row.get(name)
    if value is None:
        raise DataError(f'{where}: no "{within}{name}"; add it, or choose another data.mapping', "missing")
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join({str: "text", list: "a list", int: "a number"}[kind] for kind in kinds)
        raise DataError(
            f'{where}: "{within}{name}" is a JSON {kind_name(value)}, not {wanted}; rewrite it', "type"
        )
    if isinstance(value, str) and not value.strip():
        raise DataError(f'{where}: "{within}{name}" is empty; fill it in or drop the row', "empty")
    return value


def object_column(row: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    if not isinstance(row.get(name), dict):
        raise DataError(f'{where}: no object "{name}"; add it, or choose another data.mapping', "missing")
    return row[name]


def decoded(value: Any, where: str, name: str) -> Any:
    """A column that holds JSON as text, or what the text would say."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f'{where}: "{name}" is not valid JSON ({error}); correct it', "answer") from error
