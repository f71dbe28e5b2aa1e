"""Writes Megatron's `torch_dist` checkpoints without a model; torch_dist.py describes the format."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megasd.convert.torch_dist import CONFIG, METADATA
from megasd.models.tp_layouts import Shape


class Item(NamedTuple):
    """One chunk as it was written: its key, its box, and its bytes [start, start + length).

    A sharded object has no box: offsets and sizes are empty.
    """

    key: str
    offsets: Shape
    sizes: Shape
    start: int
    length: int


def write_chunk(tensor: Tensor, stream: Any) -> None:
    """Write one chunk as torch.distributed.checkpoint does.

    `tensor`: contiguous, on the CPU, and as large as its storage.
    """
    torch.save(tensor, stream)


def no_extra_state() -> bytes:
    """The bytes that a module without extra state saves.

    Megatron keeps a list of one None under the key `<module>._extra_state/shard_...`.
    """
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def write_metadata(
    directory: Path,
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    items: Mapping[str, list[Item]],
    objects: Mapping[str, Item],
    file: str,
) -> None:
    """Write `.metadata`, common.pt and metadata.json.

    `items`: chunks by file name. `objects`: sharded objects by their unique keys, all in `file`.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        for key, (dtype, shape) in tensors.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, chunks in items.items():
        for item in chunks:
            storage[MetadataIndex(item.key, item.offsets)] = _StorageInfo(name, item.start, item.length)
            state[item.key].chunks.append(
                ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            )
    for key, item in objects.items():
        state[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, item.start, item.length)
    torch.save({}, directory / "common.pt")
    (directory / CONFIG).write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    metadata = Metadata(state, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with (directory / METADATA).open("wb") as stream:
        pickle.dump(metadata, stream)
