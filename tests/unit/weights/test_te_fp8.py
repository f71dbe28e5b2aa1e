"""FP8 parameters seen from outside their modules, and the teacher that is lent to them.

Proves, on a stand-in that keeps values and bytes apart as TransformerEngine's block-scaled tensor
does (`.data` is the tensor itself, and setting it to ordinary values writes into the same bytes):
loading gives the optimizer the unrounded values; the teacher's pass sees its own values, rounded;
afterwards the student has its bytes back, in the same memory, and still asks for gradients; the
average is of the dequantised student. Does not prove that TransformerEngine's tensors behave as the
stand-in does (tests/gpu/test_fp8_gpu.py).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasd.actor.teacher_weights import Outcome, TeacherWeights
from megasd.config.schema import TeacherConfig
from megasd.weight_sync.delta import tensor_fingerprint
from megasd.weights.te_fp8 import fill, is_quantised, lend, plain, storage

FP8 = torch.float8_e4m3fn


class Quantizer:
    internal = True

    def __call__(self, values: torch.Tensor) -> Any:
        assert not self.internal, "would return a bare container"
        return QuantizedTensor(values.to(FP8), values.dtype)


class QuantizedTensor(torch.Tensor):
    """Shows bfloat16, stores FP8 (scale 1)."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=dtype, device=raw.device)
        self._raw, self._quantizer = raw, Quantizer()
        return self

    def dequantize(self) -> torch.Tensor:
        return self._raw.to(self.dtype)

    def detach(self) -> QuantizedTensor:
        return QuantizedTensor(self._raw, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            args[0]._raw.copy_(args[1])
            return args[0]
        if func is torch.ops.aten.detach.default:
            return QuantizedTensor(args[0]._raw, args[0].dtype)
        values = [a.dequantize() if isinstance(a, QuantizedTensor) else a for a in args]
        return func(*values, **(kwargs or {}))

    def _take(self, values: torch.Tensor) -> None:
        if isinstance(values, QuantizedTensor):
            self._raw = values._raw
        else:
            self._raw.copy_(values)

    data = property(lambda self: self, _take)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "transformer_engine.pytorch.tensor", SimpleNamespace(QuantizedTensor=QuantizedTensor)
    )


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = QuantizedTensor(
            torch.randn(8, 4, generator=generator).to(FP8), torch.bfloat16
        ).requires_grad_()
        self.norm = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield from (("weight", self.weight), ("norm", self.norm))


def test_plain_and_fingerprint() -> None:
    weight, ordinary = Model().weight, torch.randn(3)
    assert is_quantised(weight) and not is_quantised(ordinary)
    assert type(plain(weight)) is torch.Tensor and torch.equal(plain(weight), weight._raw.bfloat16())
    assert plain(ordinary).data_ptr() == ordinary.data_ptr()
    before = tensor_fingerprint(weight)
    weight._raw.view(torch.uint8)[0, 0] ^= 1
    assert tensor_fingerprint(weight) != before


def test_fill_keeps_the_unrounded_values_for_the_optimizer() -> None:
    weight, values = Model().weight, torch.randn(8, 4, dtype=torch.bfloat16)
    # TransformerEngine's, of the random initialisation
    weight._high_precision_init_val = torch.zeros(8, 4, dtype=torch.bfloat16)
    fill(weight, values)
    assert torch.equal(weight._raw.float(), values.to(FP8).float()) and torch.equal(
        weight._high_precision_init_val, values
    )


def test_lent_values_do_not_touch_the_bytes() -> None:
    weight = Model().weight
    raw, kept = weight._raw, weight._raw.clone()
    own = storage(weight)
    lend(weight, torch.full((8, 4), 1.7, dtype=torch.bfloat16))
    assert torch.equal(plain(weight).float(), torch.full((8, 4), 1.75)) and weight.requires_grad
    lend(weight, own)
    assert weight._raw is raw and torch.equal(raw.float(), kept.float()) and weight.requires_grad


def test_the_average_of_an_fp8_student() -> None:
    model = Model()
    start, raw = plain(model.weight).float(), model.weight._raw
    teacher = TeacherWeights(model, TeacherConfig(weights="ema", ema_rate=0.25))
    assert torch.equal(teacher.shadow["weight"], start)
    fill(model.weight, torch.ones(8, 4, dtype=torch.bfloat16))
    teacher.update(Outcome())
    average = 0.75 * start + 0.25
    assert torch.allclose(teacher.shadow["weight"], average)
    with teacher.active():
        assert torch.equal(plain(model.weight).float(), average.bfloat16().to(FP8).float())
        # the student's bytes wait
        assert torch.equal(raw.float(), torch.ones(8, 4))
    assert model.weight._raw is raw and torch.equal(plain(model.weight).float(), torch.ones(8, 4))
