"""What a mapping of data/columns.py is, and how mappings read single columns.

A mapping takes the values of a row, and `where`, which names the row in errors ("train.jsonl:3"). It
returns a Mapped for each prompt of the row, and None for a prompt that its rules leave out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megasd.data.rows import DataError, kind_name


class Mapped(NamedTuple):
    """The fields of one prompt, unchecked: id, prompt, answer, solution, pass_rate, rubric."""

    values: dict[str, Any]
    # field -> name of its column, where the column has another name
    names: dict[str, str]


@dataclass(frozen=True)
class Mapping:
    """One value of data.mapping: how the rows of a data set become prompts."""

    # (values, where) -> the prompts of the row. DataError: a row that the data set cannot have.
    read: Callable[[dict[str, Any], str], list[Mapped | None]]
    # what reads the answers; None: the row does not say
    verifier: str | None = None
    # True: the data set repeats its rows, and repeats are left out
    drops_repeats: bool = False


def column(
    row: dict[str, Any], where: str, name: str, *, kinds: tuple[type, ...] = (str,), within: str = ""
) -> Any:
    """The value of a column, of one of these kinds and not empty; DataError otherwise.

    `within`: what stands before the name in errors.
    """
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
    """The value of a column that holds a JSON object; DataError otherwise."""
    if not isinstance(row.get(name), dict):
        raise DataError(f'{where}: no object "{name}"; add it, or choose another data.mapping', "missing")
    return row[name]


def decoded(value: Any, where: str, name: str) -> Any:
    """The value of a column that holds JSON, or JSON as text. DataError: the text is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f'{where}: "{name}" is not valid JSON ({error}); correct it', "answer") from error
