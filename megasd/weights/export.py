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
    """The gather plan of a model that is spread over all ranks.

    `params`: the parameters of this rank, under global names. Collectives: gather.exchange, once.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    shapes = {name: (tuple(param.shape), param.dtype) for name, param in params.items()}
    holdings = exchange(Holding(rank, tp_rank, tp_size, ep_size, shapes), world)
    return make_gather_plan(registry.param_table(hf_config), holdings, bucket_bytes=bucket_bytes, dtype=dtype)


def export_hf(gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor with its name, in the order of the model, on rank 0.

    Other ranks yield nothing, but must exhaust the iterator. A tensor is a view, and is overwritten two
    buckets later: copy it or write it before. Collectives: the messages of the gather.
    """
    for bucket, flat in gather.replay():
        if flat is not None:
            yield from bucket.views(flat).items()
