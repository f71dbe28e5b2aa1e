"""How a tensor-parallel shard is cut out of Hugging Face tensors, and put back.

A layout is a list of segments. For one tensor-parallel rank it says which slices of which source
tensors make up the shard, and where in the shard they lie. Loading reads the slices; exporting
writes the same slices back. Nothing here knows a process group, a file or a model family.

    layout = qkv((q_shape, k_shape, v_shape), rank=0, size=2, num_query_groups=2)
    shard  = split((q, k, v), layout)              # Megatron's linear_qkv.weight of rank 0
    merge([shard_0, shard_1], layouts, [q, k, v])  # writes q, k, v back, bit for bit

A segment runs along one dimension (0 or 1); all other dimensions are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Segment(NamedTuple):
    """One slice of a source tensor, and its place in the shard.

    Along dimension `dim`, `source[start : start + length]` of source tensor number `part` lies at
    `shard[offset : offset + length]`.
    """

    part: int
    dim: int
    start: int
    length: int
    offset: int


class Layout(NamedTuple):
    """The shape of one rank's shard and the segments that fill it.

    Where no segment lies, the shard is padding (zeros).
    """

    shape: Shape
    segments: tuple[Segment, ...]


def _divide(length: int, size: int, what: str) -> int:
    if length % size:
        raise ValueError(f"{what} of {length} does not divide over {size} tensor-parallel ranks")
    return length // size


def replicated(shapes: Sequence[Shape], rank: int, size: int) -> Layout:
    """Every rank holds the whole tensor (norms, routers)."""
    (shape,) = shapes
    return Layout(shape, (Segment(0, 0, 0, shape[0], 0),))


def column(shapes: Sequence[Shape], rank: int, size: int) -> Layout:
    """ColumnParallelLinear: rows (dim 0) in `size` equal parts."""
    (shape,) = shapes
    rows = _divide(shape[0], size, "output dimension")
    return Layout((rows, *shape[1:]), (Segment(0, 0, rank * rows, rows, 0),))


def row(shapes: Sequence[Shape], rank: int, size: int) -> Layout:
    """RowParallelLinear: columns (dim 1) in `size` equal parts."""
    (shape,) = shapes
    columns = _divide(shape[1], size, "input dimension")
    return Layout((shape[0], columns), (Segment(0, 1, rank * columns, columns, 0),))


def gated(shapes: Sequence[Shape], rank: int, size: int) -> Layout:
    """Gated MLP fc1: cat(gate shard, up shard) on each rank, not a shard of cat(gate, up)."""
    gate, up = shapes
    if gate != up:
        raise ValueError(f"gate {gate} and up {up} projections differ in shape")
    rows = _divide(gate[0], size, "intermediate size")
    return Layout(
        (2 * rows, gate[1]), (Segment(0, 0, rank * rows, rows, 0), Segment(1, 0, rank * rows, rows, rows))
    )


def qkv(shapes: Sequence[Shape], rank: int, size: int, *, num_query_groups: int) -> Layout:
    """Megatron's fused QKV, rows in `size` equal parts: weights `[rows, hidden]` or biases `[rows]`.

    The rows are, for each query group: its query heads, its key head, its value head. With fewer
    query groups than ranks, a shard is a part of one group. Megatron's SelfAttention expects this,
    and gathers the parts itself.
    """
    q, k, v = shapes
    heads = [_divide(shape[0], num_query_groups, "q, k or v rows (over query groups)") for shape in (q, k, v)]
    rows = _divide(q[0] + k[0] + v[0], size, "fused QKV rows")
    first, last = rank * rows, (rank + 1) * rows
    segments: list[Segment] = []
    # row of the fused tensor
    position = 0
    for group in range(num_query_groups):
        for part, length in enumerate(heads):
            low, high = max(position, first), min(position + length, last)
            if low < high:
                segments.append(Segment(part, 0, group * length + low - position, high - low, low - first))
            position += length
    return Layout((rows, *q[1:]), tuple(segments))


def padded_vocab_size(vocab_size: int, divisor: int, tp_size: int) -> int:
    """The vocabulary (tokens), rounded up to a multiple of divisor * tp_size.

    `divisor` is Megatron's make_vocab_size_divisible_by.
    """
    multiple = divisor * tp_size
    return (vocab_size + multiple - 1) // multiple * multiple


def vocab(shapes: Sequence[Shape], rank: int, size: int, *, rows: int) -> Layout:
    """Embedding and output layer: `rows` rows on each rank.

    If rows * size exceeds the vocabulary, then the last rows are padding.
    """
    (shape,) = shapes
    if rows * size < shape[0]:
        raise ValueError(f"{rows} rows on each of {size} ranks cannot hold a vocabulary of {shape[0]}")
    start = rank * rows
    length = min(shape[0], start + rows) - start
    return Layout((rows, shape[1]), (Segment(0, 0, start, length, 0),) if length > 0 else ())


def split(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """One rank's shard of whole source tensors; padding is zeros."""
    shard = parts[0].new_zeros(layout.shape)
    for s in layout.segments:
        shard.narrow(s.dim, s.offset, s.length).copy_(parts[s.part].narrow(s.dim, s.start, s.length))
    return shard


def merge(shards: Sequence[Tensor], layouts: Sequence[Layout], parts: Sequence[Tensor]) -> None:
    """Write the shards of all ranks into the whole source tensors `parts`, in place.

    Works across devices. Padding is dropped.
    """
    for shard, layout in zip(shards, layouts, strict=True):
        for s in layout.segments:
            parts[s.part].narrow(s.dim, s.start, s.length).copy_(shard.narrow(s.dim, s.offset, s.length))
