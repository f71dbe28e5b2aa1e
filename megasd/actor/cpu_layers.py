"""Two modules for the layers of the CPU: RMSNorm, and core attention on torch's SDPA.

Megatron's own local modules do not suffice: DotProductAttention refuses context parallelism and
packed sequences (dot_product_attention.py:55), and WrappedTorchNorm refuses sequence parallelism
(torch_norm.py:32). On a GPU TransformerEngine brings both.

Shapes: s sequence (local), b batch, h heads (local), d head size, t packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megasd.actor.layers import mark


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension.

    The weight is marked, so that Megatron sums its gradient under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """The normed values, of the shape of x."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SDPAttention(MegatronModule):
    """Causal core attention on torch's SDPA: [s, b, h, d] with right padding, or [t, h, d] packed.

    In a layer with a sliding window (config.window_size, window_attn_skip_freq) a token attends to
    itself and to window_size[0] tokens before it.

    Under context parallelism rank r holds chunks r and 2*cp-1-r of each sequence (Megatron's
    zig-zag). Collectives: keys and values are all-gathered over the context-parallel group
    (backward: reduce-scatter). The mask carries the global positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout or attention_dropout:
            raise ValueError(
                "SDPAttention has no dropout: it would fall outside the tensor-parallel RNG tracker"
            )
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] if windowed else None

    def _mask(self, length: int, size: int, rank: int) -> Tensor | None:
        """bool [queries, keys], True where a token may attend; None for plain causal attention.

        The queries are the tokens that context-parallel `rank` of `size` holds of a sequence of
        `length`. SDPA's own causal mask is faster than a tensor.
        """
        if size == 1:
            if self.window is None or length <= self.window + 1:
                return None
            queries = keys = torch.arange(length)
        else:
            queries, keys = (
                torch.cat([zigzag_positions(length // (2 * size), size, r) for r in ranks])
                for ranks in ((rank,), range(size))
            )
        distance = queries[:, None] - keys[None, :]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance <= self.window)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """SDPA on [b, h, s, d] tensors, with a mask of `_mask`."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention [s, b, h, d] -> [s, b, h*d], or packed [t, h, d] -> [t, h*d]."""
        if attention_mask is not None:
            raise ValueError("SDPAttention is causal: right-pad or pack, and pass no mask")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
        size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=self.cp_group)
                for t in (key, value)
            )
        mask = self._mask(key.size(0), size, rank)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = self._sdpa(query, key, value, mask)
        return out.permute(2, 0, 1, 3).reshape(out.size(2), out.size(0), -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int]) -> Tensor:
        """Run SDPA once a sequence.

        cu_seqlens counts the tokens of all context-parallel ranks, which hold equally many.
        """
        query, key, value = (t.squeeze(1) if t.dim() == 4 else t for t in (query, key, value))
        size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        if size > 1:
            # The parts [t, h, d] of all ranks are stacked. The loop below cuts the chunks of a
            # sequence out of every part.
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=self.cp_group).unflatten(
                    0, (size, -1)
                )
                for t in (key, value)
            )
        outputs = []
        for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            local = slice(start // size, end // size)
            k, v = (t[:, local].flatten(0, 1) if size > 1 else t[local] for t in (key, value))
            mask = self._mask(end - start, size, rank)
            out = self._sdpa(
                query[local].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


def zigzag_positions(half: int, size: int, rank: int) -> Tensor:
    """Global positions [2*half] that context-parallel `rank` of `size` holds.

    They are chunk `rank` and its mirror image, of `half` tokens each.
    """
    low, high = rank * half, (2 * size - 1 - rank) * half
    return torch.cat([torch.arange(low, low + half), torch.arange(high, high + half)])
