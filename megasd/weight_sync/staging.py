"""Where pushed files lie until an engine has read them.

They lie in shared memory if there is room, else in the run directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
# name of the file with the process id of the run
_OWNER = "owner"


@contextlib.contextmanager
def staging_directory(run_dir: Path, nbytes: int, local_engine: bool) -> Iterator[Path]:
    """A fresh directory, removed afterwards.

    It is in shared memory if the engine is local and there is room for nbytes and a tenth more,
    else in run_dir.
    """
    root = _make_root(run_dir, nbytes, local_engine)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _make_root(run_dir: Path, nbytes: int, local_engine: bool) -> Path:
    if local_engine and _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * nbytes:
        _sweep(_SHARED_MEMORY)
        root = (
            _SHARED_MEMORY / f"megasd-{os.getuid()}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]}"
        )
        if not root.is_symlink() and (not root.exists() or root.stat().st_uid == os.getuid()):
            # removes what a killed run left there
            return _fresh(root)
    return _fresh(run_dir / "weights")


def _fresh(root: Path) -> Path:
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True, mode=0o700)
    (root / _OWNER).write_text(str(os.getpid()))
    return root


def _sweep(parent: Path) -> None:
    """Remove the directories of this user's killed runs, whose process is gone."""
    for root in parent.glob(f"megasd-{os.getuid()}-*"):
        owner = root / _OWNER
        if owner.is_file() and not Path(f"/proc/{owner.read_text()}").exists():
            shutil.rmtree(root, ignore_errors=True)
