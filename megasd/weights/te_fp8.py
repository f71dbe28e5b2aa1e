"""TransformerEngine's FP8 parameters (actor.fp8_param_gather) seen from outside its modules: read,
filled, and lent other values.

Such a parameter is a tensor subclass that shows its dtype before quantisation; its bytes lie
elsewhere (`_data`, `_rowwise_data`), with scales and sometimes a transposed copy beside them.
Whatever reads bytes, or sets `.data`, must come here. TransformerEngine 2.9 to 2.11.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_quantised(tensor: Tensor) -> bool:
    """Whether it is one of TransformerEngine's, which exist only once it is imported."""
    module = sys.modules.get("transformer_engine.pytorch.tensor")
    return module is not None and isinstance(tensor, module.QuantizedTensor)


def plain(tensor: Tensor) -> Tensor:
    """The values as an ordinary tensor, detached: those that the layer computes with, so an engine
    that gets them computes with the same. An ordinary tensor is itself.
    """
    return tensor.dequantize().detach() if is_quantised(tensor) else tensor.detach()


@torch.no_grad()
def fill(param: Tensor, values: Tensor) -> None:
    """Give a whole parameter its start values, of its shape.

    The optimizer makes its fp32 copies from what a quantised parameter was before it was quantised,
    which TransformerEngine keeps until then (on the CPU, from the random initialisation): that must
    be these values too.
    """
    param.copy_(values)
    if is_quantised(param) and getattr(param, "_high_precision_init_val", None) is not None:
        kept = param._high_precision_init_val
        param._high_precision_init_val = values.to(device=kept.device, dtype=kept.dtype)


def storage(param: Tensor) -> Tensor:
    """What `lend(param, storage)` puts back: the bytes that it has now, not a copy."""
    return param.detach() if is_quantised(param) else param.data


@torch.no_grad()
def lend(param: Tensor, values: Tensor) -> None:
    """`param.data = values` without a write into the bytes it had, in which optimizer buffers lie.
    Ordinary values are quantised first: setting `.data` of a block-scaled parameter to them would
    overwrite its bytes in place.
    """
    if is_quantised(param) and not is_quantised(values):
        quantizer = param._quantizer
        # else a bare container without tensor methods
        internal, quantizer.internal = quantizer.internal, False
        values = quantizer(values.to(param.dtype).contiguous())
        quantizer.internal = internal
    needs_gradient = param.requires_grad
    param.data = values
    # TransformerEngine's setter takes it from the values
    param.requires_grad_(needs_gradient)
