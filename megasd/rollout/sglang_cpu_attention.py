"""Decode attention of a whole batch at once, for SGLang's torch_native backend on a CPU. Imported by the engine's processes only.

SGLang's own loop calls scaled_dot_product_attention once per sequence and layer: with 256 short sequences in flight that is half of a
rollout's time. Here the batch is padded to its longest sequence and masked: the same sums, one call a layer. It enters by SGLang's
registry of attention backends; sliding windows, cross attention and prefill stay with SGLang's code.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """torch_native with the loop over sequences replaced in decode. B sequences, L longest, H query heads, D head size."""

    def _run_sdpa_forward_decode(
        self,
        query,
        output,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        seq_lens,
        encoder_lens=None,
        scaling=None,
        enable_gqa=False,
        causal=False,
        is_cross_attn=False,
        sliding_window_size=None,
    ):
        """Writes `output` [B, H, D] for `query` [B, H, D]; the caches are [slots, key heads, D], `seq_lens` [B] counts the new token."""
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None or k_cache.dtype != query.dtype:
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        longest = int(seq_lens.max())
        valid_BL = torch.arange(longest, device=seq_lens.device) < seq_lens[:, None]
        # Slot 0 is SGLang's padding slot: always finite, and masked out below.
        slots_BL = req_to_token[req_pool_indices, :longest].masked_fill(~valid_BL, 0)
        output.copy_(
            scaled_dot_product_attention(
                query[:, :, None],
                k_cache[slots_BL].transpose(1, 2),
                v_cache[slots_BL].transpose(1, 2),
                attn_mask=valid_BL[:, None, None],
                scale=scaling,
                enable_gqa=enable_gqa,
            ).squeeze(2)
        )
        return output


register_attention_backend("torch_native")(BatchedDecodeBackend)
