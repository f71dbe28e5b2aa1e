"""The two pickles of a `torch_dist` checkpoint, read without running code.

Unpickling can run code. The unpicklers here know the few names of the format, make inert records of
known classes, and refuse every other name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch

from megasd.types import UserError

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_FORMAT = "torch.distributed.checkpoint."
# (module, name) of the classes that become records
_KNOWN = {
    (_FORMAT + "metadata", "BytesStorageMetadata"),
    (_FORMAT + "metadata", "ChunkStorageMetadata"),
    (_FORMAT + "metadata", "Metadata"),
    (_FORMAT + "metadata", "MetadataIndex"),
    (_FORMAT + "metadata", "StorageMeta"),
    (_FORMAT + "metadata", "TensorProperties"),
    (_FORMAT + "metadata", "TensorStorageMetadata"),
    (_FORMAT + "metadata", "_MEM_FORMAT_ENCODING"),
    (_FORMAT + "filesystem", "_StorageInfo"),
    (_FORMAT + "planner", "SavePlan"),
    (_FORMAT + "planner", "TensorWriteData"),
    (_FORMAT + "planner", "WriteItem"),
    (_FORMAT + "planner", "WriteItemType"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"),
}


class Record:
    """An unpickled object of a known class: its state, and nothing that could run."""

    # an object that was pickled without a state has this state
    state: Any = MappingProxyType({})

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`: records of torch's classes, with dtypes and sizes."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a known class. UserError names every other class."""
        if (module, name) in _KNOWN:
            # A new class each time, so that no pickle can change a class for another pickle.
            return type(name, (Record,), {})
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(sizes)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise UserError(
            f"{self.path}: holds {module}.{name}, which no checkpoint needs; it was refused, do not load this"
            " directory elsewhere"
        )


class ChunkUnpickler(pickle.Unpickler):
    """Reads data.pkl of torch.save(tensor): (dtype, storage key, first element, shape, strides)."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file)
        self.where = where

    def persistent_load(self, saved: Any) -> Any:
        """(kind, dtype, key) of a storage."""
        kind, storage, key, _, _ = saved
        return kind, storage, key

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a known function or storage. UserError names everything else."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (
                storage[1],
                storage[2],
                offset,
                shape,
                strides,
            )
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise UserError(
            f"{self.where}: holds {module}.{name}, which is no plain tensor of float32, bfloat16 or float16"
        )
