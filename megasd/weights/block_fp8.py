"""Block-scaled fp8 weights, as engines hold them.

A weight is float8_e4m3fn values and one float32 scale for each block of 128 x 128.

    # weight ~ values * scale, block by block
    values, scale = quantise(weight)
    # `stored`: tensor -> safetensors dtype of an fp8 checkpoint
    fp8 = Requantise(stored, quantization_config)
    # "x.weight" becomes "x.weight" (fp8) and "x.weight_scale_inv"
    bucket, flat = fp8(bucket, flat, slot, make_buffer)

The format is that of DeepSeek-V3 (2412.19437, section 3.3.2) and of Hugging Face's
`quantization_config: {"quant_method": "fp8", "weight_block_size": [128, 128]}`: scale = largest
magnitude of the block / 448.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megasd.models.tp_layouts import Shape
from megasd.types import UserError
from megasd.weights.gather_plan import Bucket, Entry

BLOCK = 128
FP8 = torch.float8_e4m3fn
# the largest value of float8_e4m3fn
_LARGEST = 448.0
# "x.weight" has its scales in "x.weight_scale_inv"
SCALE = "_scale_inv"


@torch.no_grad()
def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values, float8_e4m3fn `[r, c]`, and scales, float32 `[ceil(r/128), ceil(c/128)]`.

    `weight`: `[r, c]` of any float dtype. A block of zeros has scale 1.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    # [R, 128, C, 128]
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    values = (blocks / scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).to(FP8)
    return values.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The weight, float32 `[r, c]`; the inverse of `quantise`."""
    rows, columns = values.shape
    return values.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


class Requantise:
    """Turns buckets of whole float tensors into buckets of an fp8 checkpoint."""

    def __init__(self, stored: Mapping[str, str], quantization_config: Mapping[str, Any]) -> None:
        """Take the names of the fp8 tensors. `stored`: tensor -> safetensors dtype of the checkpoint.

        UserError: another quantisation than fp8 weights in 128 x 128 blocks.
        """
        block = quantization_config.get("weight_block_size")
        if quantization_config.get("quant_method") != "fp8" or list(block or ()) != [BLOCK, BLOCK]:
            raise UserError(
                f"rollout.engine.model_path: quantization_config {dict(quantization_config)} is not"
                f" supported; take a checkpoint in fp8 with weight_block_size [{BLOCK}, {BLOCK}], or a"
                " float one"
            )
        self.names = frozenset(name for name, dtype in stored.items() if dtype == "F8_E4M3")
        self._made: dict[int, Tensor] = {}

    def layout(self, bucket: Bucket) -> Bucket:
        """The bucket as it is sent: scales first, fp8 values last.

        In this order every tensor is aligned without gaps.
        """
        kinds: list[tuple[str, Shape, torch.dtype]] = []
        for name, entry in bucket.tensors.items():
            if name in self.names:
                kinds.append((name + SCALE, tuple(-(-size // BLOCK) for size in entry.shape), torch.float32))
                kinds.append((name, entry.shape, FP8))
            else:
                kinds.append((name, entry.shape, entry.dtype))
        tensors: dict[str, Entry] = {}
        offset = 0
        for name, shape, dtype in sorted(kinds, key=lambda kind: -kind[2].itemsize):
            tensors[name] = entry = Entry(shape, dtype, offset)
            offset += entry.nbytes
        return Bucket(bucket.index, bucket.params, tensors, offset)

    def __call__(
        self, bucket: Bucket, flat: Tensor, slot: int, make_buffer: Callable[[int], Tensor]
    ) -> tuple[Bucket, Tensor]:
        """The weights of a bucket, quantised, as (layout, flat uint8 buffer).

        `flat`: the bucket's buffer. `slot`: which of the kept buffers to write; `make_buffer(nbytes)`
        makes one that is missing or too small.
        """
        sent = self.layout(bucket)
        if slot not in self._made or self._made[slot].numel() < sent.nbytes:
            self._made[slot] = make_buffer(sent.nbytes)
        out = self._made[slot][: sent.nbytes]
        views = sent.views(out)
        for name, tensor in bucket.views(flat).items():
            if name in self.names:
                values, scale = quantise(tensor)
                views[name].copy_(values)
                views[name + SCALE].copy_(scale)
            else:
                views[name].copy_(tensor)
        return sent, out
