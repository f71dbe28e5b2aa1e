"""A directory that is written file by file under another name, and renamed when it is whole.

If the command is stopped anywhere, then the same command goes on from the last whole file.

    with ResumableDir(out_dir, job={"source": ..., "dtype": ...}, sizes={"a.bin": 1000}) as work:
        for name in work.left:
            with work.file(name) as sink:
                sink.write(data)
            ...
        work.publish()

`<out_dir>.partial` holds the files so far. A file is whole when its record (bytes, CRC-32) is in
`.done/`; the record is written after the file was synced. A later command reads the file again before
it believes the record. Files of another job are never mixed in.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from megasd.types import UserError
from megasd.weights.hf_files import put_in_place, sync_directory

# how much of the disk stays free
SPARE_BYTES = 64 << 20
_BLOCK = 16 << 20


class Sink:
    """A file that is being written; keeps the number of bytes and their CRC-32."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self.file, self.advance, self.nbytes, self.crc = file, advance, 0, 0
        # further fields for the record of the file
        self.record: dict[str, Any] = {}
        # the error of a write, because torch.save raises another error in its place
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append the data."""
        data = memoryview(data).cast("B")
        self.crc = zlib.crc32(data, self.crc)
        self.nbytes += len(data)
        self.advance(len(data))
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Hand everything to the system; torch.save calls this."""
        self.file.flush()


class ResumableDir:
    """The partial directory of one conversion.

    UserError: the target exists, cannot be written, has no room, or another process is writing it.
    """

    def __init__(
        self,
        out_dir: Path,
        job: Mapping[str, Any],
        sizes: Mapping[str, int],
        *,
        overwrite: bool = False,
        advance: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Lock the directory and find the files that are whole.

        `job`: a JSON value; equal jobs write equal files. `sizes`: file -> about how many bytes it will
        have. `advance` is called with numbers of bytes that are done.
        """
        self.out_dir, self.advance = out_dir, advance
        self.job, self.sizes = json.loads(json.dumps(job)), dict(sizes)
        self.partial = out_dir.with_name(out_dir.name + ".partial")
        self.records: dict[str, dict[str, Any]] = {}
        if out_dir.exists() and not overwrite:
            raise UserError(f"{out_dir}: is there already; give another target, or --overwrite")
        if out_dir.exists() and not (
            out_dir.is_dir() and (not any(out_dir.iterdir()) or _is_weights(out_dir))
        ):
            raise UserError(f"{out_dir}: is no directory of weights; --overwrite replaces nothing else")
        try:
            (self.partial / ".done").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot be written ({error.strerror}); give a target in a directory that you"
                " may write"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UserError(
                f"{self.partial}: another conversion is writing it; wait for it, or stop it"
            ) from error
        try:
            self._resume(overwrite)
            self._check_room()
        except BaseException:
            os.close(self._lock)
            raise

    def _resume(self, overwrite: bool) -> None:
        path = self.partial / "job.json"
        if path.exists() and _read(path) != self.job:
            if not overwrite:
                raise UserError(
                    f"{self.partial}: holds another conversion (other options, or the source has changed"
                    " since); finish that one, or remove the directory, or give --overwrite"
                )
            for entry in self.partial.iterdir():
                if entry.name not in (".lock", ".done"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for entry in (self.partial / ".done").iterdir():
                entry.unlink()
        _write(path, self.job)
        for name in self.sizes:
            record = _read(self.partial / ".done" / f"{name}.json")
            if record is not None and _sum(self.partial / name) == (record.get("bytes"), record.get("crc32")):
                self.records[name] = record
                self.advance(self.sizes[name])

    @property
    def left(self) -> list[str]:
        """Files still to be written, in order."""
        return [name for name in self.sizes if name not in self.records]

    def _check_room(self) -> None:
        needed = sum(self.sizes[name] for name in self.left) + SPARE_BYTES
        # The file of a stopped conversion will be overwritten.
        free = shutil.disk_usage(self.partial).free + sum(
            p.stat().st_size for p in self.partial.glob("*.tmp")
        )
        if free < needed:
            raise UserError(
                f"{self.out_dir}: needs {needed / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free;"
                " make room first"
            )

    @contextmanager
    def file(self, name: str) -> Iterator[Sink]:
        """Write one file. It gets its name and its record when the block ends without an error."""
        path, unfinished, sink = self.partial / name, self.partial / f"{name}.tmp", None
        try:
            with unfinished.open("wb") as file:
                sink = Sink(file, self.advance)
                yield sink
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
            sync_directory(self.partial)
            record = {"bytes": sink.nbytes, "crc32": sink.crc, **sink.record}
            _write(self.partial / ".done" / f"{name}.json", record)
            self.records[name] = json.loads(json.dumps(record))
        except (OSError, RuntimeError) as caught:
            error = caught if sink is None or sink.error is None else sink.error
            if not isinstance(error, OSError):
                raise
            unfinished.unlink(missing_ok=True)
            again = " after making room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise UserError(
                f"{path}: {error.strerror or error}; the same command{again} goes on from the last whole file"
            ) from error

    def publish(self) -> None:
        """Rename the partial directory to its place."""
        shutil.rmtree(self.partial / ".done")
        for name in ("job.json", ".lock"):
            (self.partial / name).unlink()
        for path in self.partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_directory(self.partial)
        put_in_place(self.partial, self.out_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)


def _is_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "metadata.json"))


def _sum(path: Path) -> tuple[int, int] | None:
    """Bytes and CRC-32 of a file; None if it is not there."""
    try:
        with path.open("rb") as file:
            nbytes = crc = 0
            while block := file.read(_BLOCK):
                nbytes, crc = nbytes + len(block), zlib.crc32(block, crc)
        return nbytes, crc
    except OSError:
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    sync_directory(path.parent)
