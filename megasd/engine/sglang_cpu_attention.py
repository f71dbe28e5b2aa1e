"""Attention of a whole batch at once, for SGLang's torch_native backend on a CPU.

Only the engine's processes import it.

SGLang's own loop calls scaled_dot_product_attention once per sequence and layer: with 256 short
sequences in flight that takes half of a rollout's time. Here the batch is padded to its longest
sequence and masked: the same sums, one call a layer. SGLang's registry of attention backends gets
this backend. SGLang's code still does sliding windows, cross attention, and batches that padding
would make too large.

B sequences, T new tokens of all of them, Q and K longest new and whole sequence, H query heads, D
head size.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# The largest number of elements of [B, H, Q, K]; 128 MB in float32.
MAX_SCORES = 2**25


class BatchedTorchBackend(TorchNativeAttnBackend):
    """torch_native without its loops over sequences.

    Queries and outputs are [T, H, D], caches [slots, key heads, D].
    """

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with one new token a sequence (T = B), in `seq_lens` [B]; writes `output`."""
        if encoder_lens is None and self._plain(query, k_cache, kwargs):
            new_lens = torch.ones_like(seq_lens)
            return self._attend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token[req_pool_indices],
                seq_lens - 1,
                new_lens,
                kwargs,
            )
        return super()._run_sdpa_forward_decode(
            query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **kwargs
        )

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with several new tokens a sequence; writes `output`.

        `extend_seq_lens` [B] new tokens follow `extend_prefix_lens` [B] cached tokens.
        """
        padded = len(seq_lens) * int(extend_seq_lens.max()) * int(seq_lens.max())
        small = padded <= 2 * int((seq_lens**2).sum()) and padded * query.shape[1] <= MAX_SCORES
        if small and encoder_lens is None and kwargs.get("causal") and self._plain(query, k_cache, kwargs):
            slots = req_to_token[req_pool_indices]
            return self._attend(
                query, output, k_cache, v_cache, slots, extend_prefix_lens, extend_seq_lens, kwargs
            )
        return super()._run_sdpa_forward_extend(
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            extend_prefix_lens,
            extend_seq_lens,
            encoder_lens,
            **kwargs,
        )

    @staticmethod
    def _plain(query: Tensor, k_cache: Tensor, kwargs: dict[str, Any]) -> bool:
        return (
            not kwargs.get("is_cross_attn")
            and kwargs.get("sliding_window_size") is None
            and query.dtype == k_cache.dtype
        )

    @staticmethod
    def _attend(
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        prefix_lens: Tensor,
        new_lens: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:
        q_positions = torch.arange(int(new_lens.max()))
        k_positions = torch.arange(int((prefix_lens + new_lens).max()))
        new_BQ = q_positions < new_lens[:, None]
        seen_BQK = k_positions <= (prefix_lens[:, None] + q_positions)[:, :, None]
        # Past the end of a sequence: slot 0, SGLang's padding slot. Its values are finite, and no
        # query that is kept sees them.
        slots_BK = (
            slots[:, : len(k_positions)]
            .masked_fill(k_positions >= (prefix_lens + new_lens)[:, None], 0)
            .long()
        )
        query_BQHD = query.new_zeros(*new_BQ.shape, *query.shape[1:])
        query_BQHD[new_BQ] = query
        out_BHQD = scaled_dot_product_attention(
            query_BQHD.transpose(1, 2),
            k_cache[slots_BK].transpose(1, 2),
            v_cache[slots_BK].transpose(1, 2),
            attn_mask=seen_BQK[:, None],
            scale=kwargs.get("scaling"),
            enable_gqa=kwargs.get("enable_gqa", False),
        )
        output.copy_(out_BHQD.transpose(1, 2)[new_BQ])
        return output


register_attention_backend("torch_native")(BatchedTorchBackend)
