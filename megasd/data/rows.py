"""Rows of data files, one at a time: JSONL, parquet, Arrow, and directories of them.

    for row in read_rows("train.jsonl", max_row_bytes=262144):
        # {"prompt": "7+8=", "answer": "15"}, or DataError("train.jsonl:3: blank line; remove it")
        row.values

    file                    .parquet, .arrow, or one JSON object per line; told by the suffix, then by
                            the first bytes
    directory of `datasets` what Dataset.save_to_disk wrote: Arrow streams in the order of state.json
    directory of shards     *.jsonl, *.parquet or *.arrow of one kind and one split, in the order of
                            their names

A row is named file:number, from 1: the line of a JSONL file, or the row of another file. In a parquet
or Arrow row, null means absent. Nothing is unpickled: pyarrow alone reads these files, `datasets` is
not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasd.config.validate_files import ROW_SUFFIXES
from megasd.types import UserError

# how many rows of a parquet or Arrow file become Python objects at a time
BATCH_ROWS = 128
# the names that Hugging Face gives to shards
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})$")
MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
HINT = "give a JSONL, parquet or Arrow file, or a directory of them"


class DataError(UserError):
    """A bad row or data file: "path:line: reason; what to do", one line.

    `kind` is the word under which `megasd data check` reports the error.
    """

    def __init__(self, message: str, kind: str = "file") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: its file, and its number from 1."""

    path: Path
    number: int

    @property
    def where(self) -> str:
        """How errors name the row: "train.jsonl:3"."""
        return f"{self.path}:{self.number}"


@dataclass(frozen=True, slots=True)
class Row(Place):
    """A row of a file: its values, or the error that keeps it from being read."""

    values: dict[str, Any] | DataError

    @property
    def place(self) -> Place:
        """The place alone, to keep without the values."""
        return Place(self.path, self.number)


def read_rows(path: str | Path, *, max_row_bytes: int) -> Iterator[Row]:
    """Every row, in order, with at most a batch of rows in memory.

    A bad row holds a DataError. A file that cannot be read raises DataError. `max_row_bytes` bounds
    the size of a row: the line without the newline, or the Arrow values.
    """
    for file, kind in row_files(path):
        try:
            yield from _jsonl(file, max_row_bytes) if kind == "jsonl" else _arrow(file, kind, max_row_bytes)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())[:200]
            raise DataError(
                f"{file}: cannot be read ({reason}); check its permissions, or copy the file again"
            ) from error


def row_files(path: str | Path) -> list[tuple[Path, str]]:
    """The files that hold the rows, and their kinds: jsonl | parquet | arrow.

    DataError: no such file, or files of more than one data set.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file; give the path of a JSONL file")
    if path.is_file():
        return [(path, _kind_of(path))]
    # a pipe would block
    if not path.is_dir():
        raise DataError(f"{path}: not a regular file; {HINT}")
    if (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json").get("splits", [])
        raise DataError(
            f"{path}: holds the splits {', '.join(map(str, splits))}; give one of them, as"
            f" {path / str((splits or ['train'])[0])}"
        )
    if (path / "state.json").is_file():
        return [(file, "arrow") for file in _saved_files(path)]
    return [(file, file.suffix[1:]) for file in _shards(path)]


def _kind_of(path: Path) -> str:
    if path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "jsonl")
    if kind not in ("parquet", "arrow", "jsonl"):
        raise DataError(f"{path}: is compressed ({kind}); unpack it first")
    return kind


def _saved_files(directory: Path) -> list[Path]:
    """The Arrow files of Dataset.save_to_disk, as its state.json lists them."""
    state = _read_json(directory / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{directory}: holds a selection by indices; save it again after dataset.flatten_indices()"
        )
    listed = state.get("_data_files")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    names = [name for entry in entries if isinstance(name := entry.get("filename"), str)]
    if not names or len(names) < len(entries):
        raise DataError(
            f"{directory / 'state.json'}: lists no _data_files; save the dataset again with"
            " Dataset.save_to_disk"
        )
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise DataError(
                f"{directory / 'state.json'}: names {name!r}, which is not in the directory; copy the dataset"
                " again"
            )
    return [directory / name for name in names]


def _shards(directory: Path) -> list[Path]:
    """The files of rows in a directory, in the order of their names.

    DataError: files of several kinds or splits, or a shard is missing.
    """
    files = sorted(
        file
        for file in directory.iterdir()
        if file.suffix in ROW_SUFFIXES and file.is_file() and file.name[0] not in "._"
    )
    if not files:
        raise DataError(
            f"{directory}: not a regular file, and the directory holds no {' or '.join(ROW_SUFFIXES)} file;"
            f" {HINT}"
        )
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise DataError(
            f"{directory}: holds {' and '.join(suffixes)} files; give one of them, or a directory of one kind"
        )
    matches = [SHARD.match(file.stem) for file in files]
    splits = sorted({match[1] if match else file.stem for match, file in zip(matches, files, strict=True)})
    numbered = [match for match in matches if match]
    if numbered:
        if len(splits) > 1:
            raise DataError(
                f"{directory}: holds more than one split ({', '.join(splits)}); give the files of one, in a"
                " directory of their own"
            )
        count = int(numbered[0][3])
        missing = sorted(set(range(count)) - {int(match[2]) for match in numbered})
        if missing:
            raise DataError(
                f"{directory}: shard {splits[0]}-{missing[0]:05d}-of-{count:05d} is missing; copy the dataset"
                " again"
            )
    elif {"train", "test"} <= set(splits) or {"train", "validation"} <= set(splits):
        raise DataError(
            f"{directory}: holds more than one split ({', '.join(splits)}); give one of the files"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); copy the dataset again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; copy the dataset again")
    return content


def _jsonl(path: Path, max_row_bytes: int) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        # at most one row in memory, however long it is
        while line := file.readline(max_row_bytes + 2):
            number += 1
            try:
                yield Row(path, number, _parse(line, f"{path}:{number}", max_row_bytes))
            except DataError as error:
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    # skip the rest of a row that is too long
                    pass
                yield Row(path, number, error)


def _parse(line: bytes, where: str, max_row_bytes: int) -> dict[str, Any]:
    row_bytes = line.rstrip(b"\r\n")
    if len(row_bytes) > max_row_bytes:
        raise DataError(
            f"{where}: row is longer than data.max_row_bytes={max_row_bytes}; shorten it or raise the limit",
            "size",
        )
    if row_bytes.startswith(b"\xef\xbb\xbf"):
        raise DataError(
            f"{where}: starts with a byte order mark; save the file as UTF-8 without BOM", "encoding"
        )
    try:
        text = row_bytes.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8", "encoding"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: holds a NUL byte; the file is damaged or not UTF-8 text, write it again", "encoding"
        )
    if not text.strip():
        raise DataError(f"{where}: blank line; remove it", "blank")
    try:
        row = STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{where}: not valid JSON ({reason}); write one JSON object per line", "json"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: the row is a JSON {kind_name(row)}, not an object; write {{"prompt": ..., "answer":'
            " ...}",
            "type",
        )
    return row


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


STRICT = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)


def _arrow(path: Path, kind: str, max_row_bytes: int) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path, kind):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in _batch_rows(path, number, batch.slice(start, BATCH_ROWS), max_row_bytes):
                    number = row.number
                    yield row
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: cannot be read as {kind} after row {number} ({reason}); copy the file again"
        ) from error


def _batches(path: Path, kind: str) -> Iterator[Any]:
    """Record batches of the file, without columns of dates.

    No mapping reads dates, and not every machine can convert them.
    """
    import pyarrow as pa

    if kind == "parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from _select(file.schema_arrow, file.iter_batches(batch_size=BATCH_ROWS), path)
        return
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
            batches: Iterator[Any] = iter(reader)
        except pa.ArrowInvalid:
            # not the stream of `datasets`: Arrow's file format (Feather)
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _select(reader.schema, batches, path)


def _select(schema: Any, batches: Iterator[Any], path: Path) -> Iterator[Any]:
    import pyarrow as pa

    twice = sorted(name for name in set(schema.names) if schema.names.count(name) > 1)
    if twice:
        raise DataError(f"{path}: has two columns {twice[0]!r}; drop one")
    names = [field.name for field in schema if not pa.types.is_temporal(field.type)]
    for batch in batches:
        yield batch.select(names)


def _batch_rows(path: Path, done: int, batch: Any, max_row_bytes: int) -> Iterator[Row]:
    """Rows done + 1, done + 2, and so on.

    Read one by one if a row may be too long, or if a text is no UTF-8, which Arrow does not check.
    """
    rows = None
    if batch.nbytes <= max_row_bytes:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            pass
    for i in range(batch.num_rows):
        number, where = done + i + 1, f"{path}:{done + i + 1}"
        if rows is not None:
            yield Row(path, number, _without_nulls(rows[i]))
        elif batch.slice(i, 1).nbytes > max_row_bytes:
            yield Row(
                path,
                number,
                DataError(
                    f"{where}: row is longer than data.max_row_bytes={max_row_bytes}; raise the limit", "size"
                ),
            )
        else:
            try:
                yield Row(path, number, _without_nulls(batch.slice(i, 1).to_pylist()[0]))
            except UnicodeDecodeError as error:
                yield Row(
                    path,
                    number,
                    DataError(f"{where}: not UTF-8 ({error.reason}); write the file again", "encoding"),
                )


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null, which is how Arrow spells absent fields.

    A None in a list stays.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_without_nulls(held) for held in value]
    return value


def kind_name(value: object) -> str:
    """The JSON name of the kind of a value."""
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def short(value: object) -> str:
    """A value for a message: its repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
