"""Which columns of the vocabulary a tensor-parallel rank owns, and softmax statistics of a set of columns.

T tokens, V local vocabulary slice. Rank r of a group of n owns the columns [r * V, (r + 1) * V);
those at or past `vocab_size` are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Rest(NamedTuple):
    """Statistics of the columns of a row that are not chosen, [T] each: maximum and sums apart,
    since one rounded log-sum-exp would err by eps * |score|.
    """

    # largest score, -inf when there is none
    max_T: Tensor
    # sum of exp(score - max), 0 when there is none
    sum_T: Tensor
    # sum of exp(score - max) * (score - max), 0 when there is none
    moment_T: Tensor


@dataclass(frozen=True)
class Shard:
    """Rank, group size, first global id and number of true (unpadded) columns of this rank's slice."""

    rank: int
    size: int
    start: int
    num_valid: int


def shard_of(local_columns: int, vocab_size: int, tp_group: dist.ProcessGroup | None) -> Shard:
    """The slice this rank owns; ValueError when the slices together are narrower than the vocabulary."""
    rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    if local_columns * size < vocab_size:
        raise ValueError(
            f"{size} slices of {local_columns} columns do not hold a vocabulary of {vocab_size}; pass the"
            " true vocab_size"
        )
    start = rank * local_columns
    return Shard(rank, size, start, max(0, min(local_columns, vocab_size - start)))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def finite(max_T: Tensor) -> Tensor:
    """A row maximum that may be subtracted: 0 in place of -inf."""
    return torch.where(max_T == -torch.inf, torch.zeros_like(max_T), max_T)
