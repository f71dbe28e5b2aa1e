"""Top-k over a vocabulary that is split between tensor-parallel ranks, in a total order.

T tokens, V local vocabulary slice, K top-k. Rounded (bf16) logits tie at the k-th place for nearly every token, and torch.topk breaks ties
as it likes; the order (value descending, id ascending) makes the support the same on every rank and at every tensor-parallel size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.ops.shard import compute_dtype, shard_of


def _ordered(values_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates by (value descending, id ascending)."""
    ids_TK, order = ids_TK.sort(dim=-1)
    values_TK, by_value = values_TK.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values_TK, ids_TK.gather(1, by_value)


def _local_topk(values_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first columns of each row in the total order, unsorted. k <= V."""
    top_TK, ids_TK = values_TV.topk(k, dim=-1, sorted=False)
    kth_T1 = top_TK.amin(-1, keepdim=True)
    split_T = (values_TV == kth_T1).sum(-1) > (top_TK == kth_T1).sum(-1)  # the k-th value is tied across the boundary
    if split_T.any():
        values, kth = values_TV[split_T], kth_T1[split_T]
        above, level = values > kth, values == kth
        wanted = above | (level & (level.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True)))
        ids_TK[split_T] = wanted.nonzero()[:, 1].view(-1, k)  # exactly k per row
    return values_TV.gather(1, ids_TK), ids_TK


@torch.no_grad()
def vocab_parallel_topk(logits_TV: Tensor, k: int, *, vocab_size: int, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """ids_TK (int64, global) and values_TK (float32, float64 for float64 logits) of the k largest logits; no gradient.

    k is clipped to vocab_size; padded columns are never chosen; results are bitwise equal on all ranks of the group and do not depend on
    its size. ValueError when k < 1. Collectives: one all_gather of 2k words per token; none without a group. Logits must not be NaN.
    """
    if k < 1:
        raise ValueError(f"top-k needs k >= 1, got {k}")
    k = min(k, vocab_size)
    shard = shard_of(logits_TV.shape[1], vocab_size, tp_group)
    local_k = min(k, shard.num_valid)
    wide = compute_dtype(logits_TV)
    word = torch.int64 if wide == torch.float64 else torch.int32

    num_tokens = logits_TV.shape[0]
    values_TK = logits_TV.new_full((num_tokens, k), -torch.inf, dtype=wide)
    ids_TK = torch.full((num_tokens, k), torch.iinfo(word).max, dtype=torch.int64, device=logits_TV.device)  # sorts after every true id
    if local_k:
        values, ids = _local_topk(logits_TV[:, : shard.num_valid], local_k)
        values_TK[:, :local_k], ids_TK[:, :local_k] = values.to(wide), ids + shard.start

    if shard.size > 1:
        packed = torch.cat([values_TK.view(word), ids_TK.to(word)], dim=1).contiguous()
        gathered = packed.new_empty(shard.size * num_tokens, 2 * k)
        dist.all_gather_into_tensor(gathered, packed, group=tp_group)
        candidates = gathered.view(shard.size, num_tokens, 2, k).permute(2, 1, 0, 3).reshape(2, num_tokens, shard.size * k)
        values_TK, ids_TK = candidates[0].contiguous().view(wide), candidates[1].to(torch.int64)
    values_TK, ids_TK = _ordered(values_TK, ids_TK)
    return ids_TK[:, :k].contiguous(), values_TK[:, :k].contiguous()
