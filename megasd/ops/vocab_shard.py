"""The slice of the vocabulary that a tensor-parallel rank owns, and softmax statistics of columns.

T tokens, V local vocabulary slice. Rank r of a group of n owns the columns [r * V, (r + 1) * V).
Columns at or past `vocab_size` are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Rest(NamedTuple):
    """Softmax statistics of the columns that are not chosen, [T] each.

    The maximum and the sums are kept apart, since one rounded log-sum-exp would err by
    eps * |score|.
    """

    # The largest score, or -inf if every column is chosen.
    max_T: Tensor
    # The sum of exp(score - max), or 0 if every column is chosen.
    sum_T: Tensor
    # The sum of exp(score - max) * (score - max), or 0 if every column is chosen.
    moment_T: Tensor


@dataclass(frozen=True)
class Shard:
    """The slice of the vocabulary that a rank owns.

    Its fields are the rank, the size of the group, the slice's first global id and the slice's
    number of true (unpadded) columns.
    """

    rank: int
    size: int
    start: int
    num_valid: int


def shard_of(local_columns: int, vocab_size: int, tp_group: dist.ProcessGroup | None) -> Shard:
    """The slice that this rank owns; tp_group None means one rank.

    ValueError when the slices of all ranks together are narrower than the vocabulary.
    """
    rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    if local_columns * size < vocab_size:
        raise ValueError(
            f"{size} slices of {local_columns} columns do not hold a vocabulary of {vocab_size}; pass the"
            " true vocab_size"
        )
    start = rank * local_columns
    return Shard(rank, size, start, max(0, min(local_columns, vocab_size - start)))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for a float64 tensor, float32 for every other dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def finite(max_T: Tensor) -> Tensor:
    """Row maxima that can be subtracted without making NaN: -inf becomes 0."""
    return torch.where(max_T == -torch.inf, torch.zeros_like(max_T), max_T)
