"""Reads and fills TransformerEngine's FP8 parameters (actor.fp8_param_gather).

Such a parameter is a tensor subclass that shows its dtype before quantisation. Its bytes lie elsewhere
(`_data`, `_rowwise_data`), next to scales and sometimes a transposed copy. Code that reads the bytes
of a parameter, or sets `.data`, must use this file. Written for TransformerEngine 2.9 to 2.11.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:

    class QuantizedTensor(Tensor):
        """The private attributes of TransformerEngine's tensors that are used here."""

        _high_precision_init_val: Tensor | None
        _quantizer: _Quantizer

    class _Quantizer:
        internal: bool

        def __call__(self, values: Tensor) -> Tensor: ...


def is_quantised(tensor: Tensor) -> TypeGuard[QuantizedTensor]:
    """Whether the tensor is one of TransformerEngine's; none is, if it was never imported."""
    module = sys.modules.get("transformer_engine.pytorch.tensor")
    return module is not None and isinstance(tensor, module.QuantizedTensor)


def plain(tensor: Tensor) -> Tensor:
    """The values that the layer computes with, as an ordinary tensor, detached.

    An engine that gets these values computes with the same values as the layer.
    """
    return tensor.dequantize().detach() if is_quantised(tensor) else tensor.detach()


@torch.no_grad()
def fill(param: Tensor, values: Tensor) -> None:
    """Give a whole parameter its start values; `values` has the shape of the parameter.

    TransformerEngine keeps the values of before quantisation (on the CPU, from the random
    initialisation). The optimizer makes its fp32 copies from them. So they are replaced, too.
    """
    param.copy_(values)
    if is_quantised(param):
        kept = getattr(param, "_high_precision_init_val", None)
        if kept is not None:
            param._high_precision_init_val = values.to(device=kept.device, dtype=kept.dtype)


def storage(param: Tensor) -> Tensor:
    """The bytes of the parameter, not a copy; `lend(param, storage)` puts them back."""
    return param.detach() if is_quantised(param) else param.data


@torch.no_grad()
def lend(param: Tensor, values: Tensor) -> None:
    """Set `param.data = values` without writing into the old bytes, where optimizer buffers lie.

    Ordinary values are quantised first: to set `.data` of a block-scaled parameter to ordinary values
    would overwrite its bytes in place.
    """
    if is_quantised(param) and not is_quantised(values):
        quantizer = param._quantizer
        # With internal=True the quantizer would give a bare container without tensor methods.
        internal, quantizer.internal = quantizer.internal, False
        values = quantizer(values.to(param.dtype).contiguous())
        quantizer.internal = internal
    needs_gradient = param.requires_grad
    param.data = values
    # TransformerEngine's setter of .data takes requires_grad from the values.
    param.requires_grad_(needs_gradient)
