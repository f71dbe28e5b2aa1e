"""The live parameters of a parallel model as whole Hugging Face tensors on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megasd.types import UserError
from megasd.weights import families, mapping
from megasd.weights.mapping import Layout, Shape
from megasd.weights.table import Rule, Table, global_name

BUCKET_BYTES = 256 << 20  # of one rank's data in one message
_ALIGNMENT = 16  # bytes, so that any dtype can be viewed in a packed buffer
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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


def _collect_stages(out: dict[str, Tensor], table: Table, group: ProcessGroup, device: torch.device) -> None:
    """Send every stage's whole tensors to the group's first rank, into its `out`. Collective over `group` (same tensor-parallel rank).

    One small all_gather says which stage holds which tensor and in which dtype; names and shapes come from config.json on both sides.
    """
    expected = table.expected_tensors()
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
    dtype: torch.dtype | None = None,
    wanted: bool = True,
) -> dict[str, Tensor] | None:
    """The whole model as Hugging Face tensors on the CPU, copied, in the model's order; None on all ranks but the first.

    `params` are under global names (table.global_params).

    "First" is rank 0 of its tp_group, pp_group and ep_group: one rank of each data-parallel replica. Every rank calls it, for an ep_group
    spans replicas; a replica whose ranks all pass wanted=False only lends its experts and gets None. A None group is a group of one.
    `dtype`: cast to it before sending; None keeps each parameter's. Tied models export no lm_head.
    Collectives: per bucket of 256 MiB one gather over tp (experts: over ep), then over pp one all_gather of a byte per tensor and one
    send per bucket and stage. UserError names a tensor that no stage held.
    """
    table = families.table(hf_config)
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    ep_size = 1 if ep_group is None or not table.num_experts else dist.get_world_size(ep_group)
    first_of = [rank * table.num_experts // ep_size for rank in range(ep_size)]
    mine = 0 if ep_size == 1 else first_of[dist.get_rank(ep_group)]
    sharded, whole, experts = [], [], []
    for name, param in params.items():
        if name == "output_layer.weight" and table.tied:
            continue  # the last stage's copy of the embedding
        rule, shape = table.rule(name), tuple(param.shape)
        if rule.is_cut(shape, ep_size):
            sharded.append(_Item(param, [rule] * tp_size, [rule.shard(shape, rank, tp_size) for rank in range(tp_size)]))
        elif rule.expert:
            rules = [table.rule(global_name(name, expert_offset=first - mine)) for first in first_of]
            experts.append(_Item(param, rules, [r.shard(shape, 0, 1) for r in rules]))
        else:
            whole.append(_Item(param, [rule], [rule.shard(shape, 0, 1)]))
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
        _collect_stages(out, table, pp_group, next(iter(params.values())).device)
        if dist.get_rank(pp_group):
            return None
    expected = table.expected_tensors()
    for name in expected:
        if name not in out:
            raise UserError(f"export: no pipeline stage holds {name}")
    return {name: out[name] for name in expected}
