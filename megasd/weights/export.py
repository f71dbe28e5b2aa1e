"""The live parameters of a parallel model as whole Hugging Face tensors, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.models import registry
from megasd.weights.gather import Gather, exchange
from megasd.weights.gather_plan import GatherPlan, Holding, make_gather_plan

BUCKET_BYTES = 256 << 20


def plan_of(
    params: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_size: int = 1,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> GatherPlan:
    """The plan of this world's model. `params`: this rank's, under global names. Collectives: those
    of gather.exchange, once.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    shapes = {name: (tuple(param.shape), param.dtype) for name, param in params.items()}
    holdings = exchange(Holding(rank, tp_rank, tp_size, ep_size, shapes), world)
    return make_gather_plan(registry.param_table(hf_config), holdings, bucket_bytes=bucket_bytes, dtype=dtype)


def export_hf(gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor with its name, in the model's order, on rank 0 (elsewhere nothing,
    but the iterator must be run out).

    A tensor is a view that is overwritten two buckets later: copy or write it before. Collectives:
    the gather's messages.
    """
    for bucket, flat in gather.replay():
        if flat is not None:
            yield from bucket.views(flat).items()
