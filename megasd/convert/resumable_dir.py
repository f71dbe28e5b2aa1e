"""A directory that is made file by file beside its place, and renamed to it when whole: stopped
anywhere, the same command goes on.

    with Work(out_dir, job={"source": ..., "dtype": ...}, sizes={"a.bin": 1000}) as work:
        for name in work.left:
            with work.file(name) as sink:
                sink.write(data)
            ...
        work.publish()

`<out_dir>.partial` holds what is there; a file counts when its record (bytes, CRC-32) lies in
`.done/`, written after the file was synced. A record is believed only after the file has been read
again. Another job's partial directory is never mixed in.
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
from typing import Any, Self

from megasd.types import UserError
from megasd.weights.hf_files import put_in_place, sync_directory

# left free on the disk
SPARE_BYTES = 64 << 20
_BLOCK = 16 << 20


class Sink:
    """A file being written: counts and sums what passes."""

    def __init__(self, file: Any, advance: Callable[[int], None]) -> None:
        self.file, self.advance, self.nbytes, self.crc = file, advance, 0, 0
        # what else its record shall say
        self.record: dict[str, Any] = {}
        # torch.save turns it into an error of its own
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
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
        self.file.flush()


class ResumableDir:
    """One conversion's partial directory. UserError when the target is there, cannot be written,
    has no room, or is being made already.
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
        """`job`: JSON-able; equal jobs write equal files. `sizes`: about how many bytes each file
        will have. `advance`: told bytes done.
        """
        self.out_dir, self.job, self.sizes, self.advance = (
            out_dir,
            json.loads(json.dumps(job)),
            dict(sizes),
            advance,
        )
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
        # a stopped file's
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
        """Write one file. It appears under its name, with its record, when the block ends without
        an error.
        """
        path, beside, sink = self.partial / name, self.partial / f"{name}.tmp", None
        try:
            with beside.open("wb") as file:
                sink = Sink(file, self.advance)
                yield sink
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
            sync_directory(self.partial)
            record = {"bytes": sink.nbytes, "crc32": sink.crc, **sink.record}
            _write(self.partial / ".done" / f"{name}.json", record)
            self.records[name] = json.loads(json.dumps(record))
        except (OSError, RuntimeError) as caught:
            error = caught if sink is None or sink.error is None else sink.error
            if not isinstance(error, OSError):
                raise
            beside.unlink(missing_ok=True)
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
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)
