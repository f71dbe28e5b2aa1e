"""Hugging Face directories <-> the live parameters of a parallel model.

    load_hf(params, hf_dir, tp_rank=0, tp_size=2, layer_offset=0)          every rank, no communication: reads only its own slices
    tensors = export_hf(params, hf_config, tp_group=tp, pp_group=pp, ...)  every rank; the whole model on the first one
    write_weights(tensors, source_dir, out_dir)                            what an engine loads: weights + config.json
    save_hf(tensors, source_dir, out_dir)                                  what a user loads: + tokenizer and the rest

`params` is dict(model.named_parameters()) of one unwrapped GPTModel chunk. All directions read megasd/weights/qwen3.py's one table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from megasd.types import UserError
from megasd.weights import mapping
from megasd.weights.mapping import Layout, Shape
from megasd.weights.qwen3 import Names, Rule, canonical_name, check_supported, config_from_hf, expected_tensors

__all__ = ["check_hf", "expected_tensors", "export_hf", "load_hf", "read_hf_config", "save_hf", "write_weights"]

BUCKET_BYTES = 256 << 20  # of one rank's data in one message
SHARD_BYTES = 4 << 30  # of one safetensors file of save_hf
_ALIGNMENT = 16  # bytes, so that any dtype can be viewed in a packed buffer
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILE_DTYPES = {"F32", "BF16", "F16"}
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def read_hf_config(hf_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a directory; UserError when it is missing or not JSON."""
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; model.path must be a Hugging Face directory") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


# ---- reading ----


class _Checkpoint:
    """The safetensors files of a directory, one or many, opened when first read. Close with the ExitStack given."""

    def __init__(self, hf_dir: Path, stack: ExitStack) -> None:
        self.dir, self.stack, self.files = hf_dir, stack, {}
        index, single = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
        if single.is_file():
            self.file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        elif index.is_file():
            try:
                self.file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index}: not a safetensors index ({error!r}); fetch the directory again") from error
            for name in set(self.file_of.values()):
                if Path(name).name != name:
                    raise UserError(f"{index}: file {name!r} lies outside the directory")
                if not (hf_dir / name).is_file():
                    raise UserError(f"{hf_dir / name}: missing, though {index.name} names it; fetch the directory again")
        else:
            raise UserError(f"{hf_dir}: neither model.safetensors nor model.safetensors.index.json; convert the weights to safetensors")

    def _open(self, name: str) -> Any:
        if name not in self.files:
            try:
                self.files[name] = self.stack.enter_context(safe_open(self.dir / name, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.dir / name}: not a whole safetensors file ({error}); fetch it again") from error
        return self.files[name]

    def slice(self, name: str, shape: Shape) -> Any:
        """A lazily read tensor; UserError unless it is there, floating point and of this shape."""
        path = self.dir / self.file_of[name]
        try:
            found = self._open(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path}: no tensor {name}, though the index says so; fetch it again") from error
        if tuple(found.get_shape()) != tuple(shape):
            raise UserError(
                f"{path}: {name} has shape {tuple(found.get_shape())}, config.json asks for {tuple(shape)}; is config.json its own?"
            )
        if found.get_dtype() not in _FILE_DTYPES:
            raise UserError(f"{path}: {name} is {found.get_dtype()}; take the float checkpoint (bfloat16, float16 or float32)")
        return found


def _check_names(names: Iterable[str], hf: Mapping[str, Any], where: Path) -> None:
    expected, found = expected_tensors(hf), set(names)
    for name in expected:
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing, which config.json asks for; fetch the directory again")
    if hf.get("tie_word_embeddings"):
        found.discard("lm_head.weight")  # some tied checkpoints carry a copy of the embedding
    unknown = sorted(found - expected.keys())
    if unknown:
        raise UserError(
            f"{where}: tensor {unknown[0]} (and {len(unknown) - 1} more) belongs to no part of this model; is config.json its own?"
        )


def check_hf(hf_dir: str | os.PathLike[str]) -> None:
    """Raise UserError for whatever `load_hf` would refuse in any layout: config.json, and every tensor's name, shape and dtype.

    Reads headers only. One rank does it before the others build a model that they cannot load.
    """
    hf_dir = Path(hf_dir)
    hf = read_hf_config(hf_dir)
    try:
        config_from_hf(hf)
    except UserError as error:  # which begins with "config.json" and cannot know where it lies
        raise UserError(f"{hf_dir}/{error}") from error
    with ExitStack() as stack:
        checkpoint = _Checkpoint(hf_dir, stack)
        _check_names(checkpoint.file_of, hf, hf_dir)
        for name, shape in expected_tensors(hf).items():
            checkpoint.slice(name, shape)


def _check_whole_layers(params: Mapping[str, Tensor], names: Names, num_local_experts: int) -> None:
    have = {canonical_name(name) for name in params}
    for name in {canonical.split(".", 3)[2]: canonical for canonical in have if canonical.startswith("decoder.layers.")}.values():
        for wanted in names.expected_locals(name, num_local_experts):
            if wanted not in have:
                parts = ", ".join(names.lookup(wanted).parts)
                raise UserError(
                    f"the Megatron model has no parameter {wanted} to take {parts}: its layer spec does not fit this config.json"
                )


def _layout(rule: Rule, shape: Shape, name: str, rank: int, size: int) -> Layout:
    """The rule's layout for one tensor-parallel rank, checked against the local parameter's shape."""
    function = partial(rule.layout, rows=shape[0]) if rule.layout is mapping.vocab else rule.layout
    try:
        layout = function(tuple(rule.parts.values()), rank, size)
    except ValueError as error:
        raise UserError(f"{name}: {error}; choose another actor.tensor_model_parallel_size") from error
    if tuple(shape) != tuple(layout.shape):
        raise UserError(f"{name} has local shape {tuple(shape)}; {', '.join(rule.parts)} make {tuple(layout.shape)} on {size} ranks")
    return layout


def _cut(rule: Rule, shape: Shape, ep_size: int) -> bool:
    """Whether tensor-parallel ranks hold parts. Experts: not if expert_tensor_parallel_size is 1, which expert parallelism asks for."""
    if not rule.expert:
        return rule.layout is not mapping.replicated
    return ep_size == 1 and tuple(rule.layout(tuple(rule.parts.values()), 0, 1).shape) != tuple(shape)


@torch.no_grad()
def load_hf(
    params: Mapping[str, Tensor],
    hf_dir: str | os.PathLike[str],
    *,
    tp_rank: int,
    tp_size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
    layer_offset: int,
) -> None:
    """Fill the local parameters of one model chunk, in place, from a Hugging Face directory. No communication.

    Only this rank's slices are read; values are cast to the parameter's dtype; padded vocabulary rows (embedding and output layer) become
    zeros, and the loss masks their logits. `layer_offset` is the global number of the chunk's first layer. All names and shapes are
    checked before the first copy. UserError names the tensor that is missing, left over or of another shape.
    """
    hf_dir = Path(hf_dir)
    hf = read_hf_config(hf_dir)
    check_supported(hf)
    names = Names(hf, layer_offset)
    if names.num_experts % ep_size:
        raise UserError(f"{names.num_experts} experts do not divide over actor.expert_model_parallel_size={ep_size}")
    num_local_experts = names.num_experts // ep_size
    _check_whole_layers(params, names, num_local_experts)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(hf_dir, stack)
        _check_names(checkpoint.file_of, hf, hf_dir)
        plan = []
        for name, param in params.items():
            rule = names.lookup(canonical_name(name), ep_rank * num_local_experts)
            shape = tuple(param.shape)
            layout = _layout(rule, shape, name, *((tp_rank, tp_size) if _cut(rule, shape, ep_size) else (0, 1)))
            plan.append((param, rule, layout, [checkpoint.slice(part, shape) for part, shape in rule.parts.items()]))
        for param, rule, layout, sources in plan:
            if rule.layout is mapping.vocab:
                param.zero_()  # its last rows may be padding
            for s in layout.segments:
                source = sources[s.part]
                values = source[s.start : s.start + s.length] if s.dim == 0 else source[:, s.start : s.start + s.length]
                param.narrow(s.dim, s.offset, s.length).copy_(values)


# ---- exporting ----


class _Item(NamedTuple):
    tensor: Tensor  # this rank's shard
    rules: list[Rule]  # one for each rank of the gathering group
    layouts: list[Layout]


def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _buckets(sized: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Consecutive things in lists of at most BUCKET_BYTES (a larger one alone)."""
    bucket, total = [], 0
    for thing, nbytes in sized:
        if bucket and total + nbytes > BUCKET_BYTES:
            yield bucket
            bucket, total = [], 0
        bucket.append(thing)
        total += nbytes
    if bucket:
        yield bucket


def _views(buffer: Tensor, shapes_dtypes: Iterable[tuple[Shape, torch.dtype]]) -> Iterator[Tensor]:
    """The tensors that lie one after another in a flat uint8 buffer."""
    offset = 0
    for shape, dtype in shapes_dtypes:
        size = torch.Size(shape).numel() * dtype.itemsize
        yield buffer[offset : offset + size].view(dtype).view(shape)
        offset += _nbytes(shape, dtype)


def _pack(tensors: list[Tensor], dtypes: list[torch.dtype], device: torch.device) -> Tensor:
    """One flat uint8 buffer of the tensors, cast to `dtypes`."""
    kinds = [(tuple(t.shape), d) for t, d in zip(tensors, dtypes, strict=True)]
    buffer = torch.zeros(sum(_nbytes(*kind) for kind in kinds), dtype=torch.uint8, device=device)
    for view, tensor in zip(_views(buffer, kinds), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def _store(out: dict[str, Tensor], shards: Iterable[Tensor], rules: list[Rule], layouts: list[Layout]) -> None:
    """Write every rank's shard into `out`'s whole CPU tensors, made here on first sight."""
    for shard, rule, layout in zip(shards, rules, layouts, strict=True):
        for name, shape in rule.parts.items():
            if name not in out:
                out[name] = torch.empty(shape, dtype=shard.dtype)
        mapping.merge([shard], [layout], [out[name] for name in rule.parts])


def _gather(out: dict[str, Tensor] | None, items: list[_Item], group: ProcessGroup | None, dtype: torch.dtype | None) -> None:
    """Collect the shards of `items` on the group's first rank, into `out` unless that is None. One gather a bucket."""
    size = 1 if group is None else dist.get_world_size(group)
    kinds = [(tuple(item.tensor.shape), dtype or item.tensor.dtype) for item in items]
    if size == 1:
        for item, (_, kind) in zip(items, kinds, strict=True) if out is not None else ():
            _store(out, [item.tensor.to(kind).cpu()], item.rules, item.layouts)
        return
    first = dist.get_rank(group) == 0
    for bucket in _buckets((pair, _nbytes(*pair[1])) for pair in zip(items, kinds, strict=True)):
        tensors, kinds = [item.tensor for item, _ in bucket], [kind for _, kind in bucket]
        mine = _pack(tensors, [kind[1] for kind in kinds], tensors[0].device)
        received = [torch.empty_like(mine) for _ in range(size)] if first else None
        dist.gather(mine, received, group=group, group_dst=0)
        if received is None or out is None:
            continue
        shards_of = zip(*(_views(buffer.cpu(), kinds) for buffer in received), strict=True)
        for (item, _), shards in zip(bucket, shards_of, strict=True):
            _store(out, shards, item.rules, item.layouts)


def _collect_stages(out: dict[str, Tensor], hf: Mapping[str, Any], group: ProcessGroup, device: torch.device) -> None:
    """Send every stage's whole tensors to the group's first rank, into its `out`. Collective over `group` (same tensor-parallel rank).

    One small all_gather says which stage holds which tensor and in which dtype; names and shapes come from config.json on both sides.
    """
    expected = expected_tensors(hf)
    held = torch.tensor([1 + _DTYPES.index(out[n].dtype) if n in out else 0 for n in expected], dtype=torch.uint8, device=device)
    tables = [torch.empty_like(held) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tables, held, group=group)
    rank = dist.get_rank(group)
    for stage, table in enumerate(tables[1:], start=1):
        if rank not in (0, stage):
            continue
        kinds = [(name, shape, _DTYPES[code - 1]) for (name, shape), code in zip(expected.items(), table.tolist(), strict=True) if code]
        for bucket in _buckets((kind, _nbytes(*kind[1:])) for kind in kinds):
            if rank == stage:
                dist.send(_pack([out[name] for name, _, _ in bucket], [d for _, _, d in bucket], device), group=group, group_dst=0)
                continue
            buffer = torch.empty(sum(_nbytes(shape, d) for _, shape, d in bucket), dtype=torch.uint8, device=device)
            dist.recv(buffer, group=group, group_src=stage)
            for (name, _, _), view in zip(bucket, _views(buffer, [kind[1:] for kind in bucket]), strict=True):
                out[name] = view.clone() if view.device.type == "cpu" else view.cpu()


@torch.no_grad()
def export_hf(
    params: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    *,
    tp_group: ProcessGroup | None,
    pp_group: ProcessGroup | None,
    ep_group: ProcessGroup | None = None,
    layer_offset: int,
    dtype: torch.dtype | None = None,
    wanted: bool = True,
) -> dict[str, Tensor] | None:
    """The whole model as Hugging Face tensors on the CPU, copied, in the model's order; None on all ranks but the first.

    "First" is rank 0 of its tp_group, pp_group and ep_group: one rank of each data-parallel replica. Every rank calls it, for an ep_group
    spans replicas; a replica whose ranks all pass wanted=False only lends its experts and gets None. A None group is a group of one.
    `dtype`: cast to it before sending; None keeps each parameter's. Tied models export no lm_head.
    Collectives: per bucket of 256 MiB one gather over tp (experts: over ep), then over pp one all_gather of a byte per tensor and one
    send per bucket and stage. UserError names a tensor that no stage held.
    """
    names = Names(hf_config, layer_offset)
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    ep_size = 1 if ep_group is None or not names.num_experts else dist.get_world_size(ep_group)
    num_local_experts = names.num_experts // ep_size
    sharded, whole, experts = [], [], []
    for name, param in params.items():
        local = canonical_name(name)
        if local == "output_layer.weight" and hf_config.get("tie_word_embeddings"):
            continue  # the last stage's copy of the embedding
        rule, shape = names.lookup(local), tuple(param.shape)
        if _cut(rule, shape, ep_size):
            sharded.append(_Item(param, [rule] * tp_size, [_layout(rule, shape, name, rank, tp_size) for rank in range(tp_size)]))
        elif rule.expert:
            rules = [names.lookup(local, rank * num_local_experts) for rank in range(ep_size)]
            experts.append(_Item(param, rules, [_layout(r, shape, name, 0, 1) for r in rules]))
        else:
            whole.append(_Item(param, [rule], [_layout(rule, shape, name, 0, 1)]))
    expert_group = ep_group if ep_size > 1 else None
    collects = wanted and not any(group is not None and dist.get_rank(group) for group in (tp_group, expert_group))
    out: dict[str, Tensor] | None = {} if collects else None
    _gather(out, whole, None, dtype)
    if wanted:
        _gather(out, sharded, tp_group, dtype)
    _gather(out, experts, expert_group, dtype)
    if out is None:
        return None
    if pp_group is not None and dist.get_world_size(pp_group) > 1:
        _collect_stages(out, hf_config, pp_group, next(iter(params.values())).device)
        if dist.get_rank(pp_group):
            return None
    expected = expected_tensors(hf_config)
    for name in expected:
        if name not in out:
            raise UserError(f"export: no pipeline stage holds {name}")
    return {name: out[name] for name in expected}


# ---- writing ----


def _write_config(tensors: Mapping[str, Tensor], source_dir: Path, out_dir: Path) -> None:
    config = read_hf_config(source_dir)
    name = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = name
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> int:
    """Write model.safetensors and config.json into out_dir, each renamed when whole; returns the bytes of the tensors."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_config(tensors, Path(source_dir), out_dir)
    partial_file = out_dir / "model.safetensors.tmp"
    save_file(dict(tensors), partial_file, metadata={"format": "pt"})
    partial_file.replace(out_dir / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def save_hf(tensors: Mapping[str, Tensor], source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """A Hugging Face directory: weights (files of about 4 GiB and an index when larger), config.json, generation config, tokenizer.

    Written to `<out_dir>.tmp` and renamed when whole; an out_dir that is there is replaced. The rest is copied from source_dir.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    beside, old = out_dir.with_name(out_dir.name + ".tmp"), out_dir.with_name(out_dir.name + ".old")
    for stale in (beside, old):
        if stale.exists():
            shutil.rmtree(stale)
    beside.mkdir(parents=True)
    _write_config(tensors, source_dir, beside)
    for pattern in _COPIED:
        for path in source_dir.glob(pattern):
            shutil.copyfile(path, beside / path.name) if path.is_file() else shutil.copytree(path, beside / path.name)
    _save_sharded(tensors, beside)
    if out_dir.exists():
        out_dir.rename(old)
    beside.rename(out_dir)
    if old.exists():
        shutil.rmtree(old)


def _save_sharded(tensors: Mapping[str, Tensor], out_dir: Path) -> None:
    files: list[dict[str, Tensor]] = [{}]
    sizes: dict[int, int] = defaultdict(int)
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if files[-1] and sizes[len(files) - 1] + nbytes > SHARD_BYTES:
            files.append({})
        files[-1][name] = tensor
        sizes[len(files) - 1] += nbytes
    if len(files) == 1:
        save_file(files[0], out_dir / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, part in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, out_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
