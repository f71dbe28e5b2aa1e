"""Block-scaled fp8 weights.

Proves that a block's largest value is kept to fp8's rounding and its error is within half a step of
its own scale; that blocks do not touch each other and edges may be cut; that a bucket is laid out
so that every tensor is aligned; that other quantisations are refused. Does not prove that SGLang
computes with them (tests/gpu).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasd.models.param_table import global_params
from megasd.types import UserError
from megasd.weights.block_fp8 import FP8, SCALE, Requantise, dequantise, quantise
from megasd.weights.export import plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.tiny_weights import local_params, tiny_checkpoint

CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (130, 100), (1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_within_half_a_step(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(rows, columns) * torch.logspace(-4, 2, columns)).to(dtype)
    values, scale = quantise(weight)
    assert values.dtype is FP8 and values.shape == weight.shape and values.is_contiguous()
    assert scale.dtype is torch.float32 and scale.shape == (-(-rows // 128), -(-columns // 128))
    back, step = dequantise(values, scale), dequantise(torch.ones_like(values), scale)
    # e4m3: 3 bits behind the point, so half a step is 1/16 of a value; below the smallest normal
    # number (2**-6) steps are 2**-9 scales
    assert torch.all((back - weight.float()).abs() <= weight.float().abs() / 16 + 2**-10 * step)
    for r in range(0, rows, 128):
        for c in range(0, columns, 128):
            block, again = (
                weight[r : r + 128, c : c + 128].float(),
                quantise(weight[r : r + 128, c : c + 128]),
            )
            assert scale[r // 128, c // 128] == block.abs().max() / 448
            assert torch.equal(
                again[0].view(torch.uint8), values[r : r + 128, c : c + 128].contiguous().view(torch.uint8)
            )


def test_zeros_stay_zeros() -> None:
    values, scale = quantise(torch.zeros(128, 256))
    assert torch.equal(dequantise(values, scale), torch.zeros(128, 256)) and torch.equal(
        scale, torch.ones(1, 2)
    )


def test_a_bucket_in_fp8(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "hf", "qwen3")
    params = {
        n: p.bfloat16() for n, p in global_params(local_params(read_hf_config(path), tp_size=1)).items()
    }
    load_hf(params, path, tp_rank=0, tp_size=1)
    plan = plan_of(params, read_hf_config(path), bucket_bytes=20_000)
    names = [n for n in plan.tensors() if "_proj" in n]
    fp8 = Requantise(dict.fromkeys(names, "F8_E4M3") | {"model.norm.weight": "BF16"}, CONFIG)
    made = []

    def make_buffer(nbytes: int) -> torch.Tensor:
        made.append(torch.empty(nbytes, dtype=torch.uint8))
        return made[-1]

    seen = set()
    for i, (bucket, flat) in enumerate(Gather(plan, params).replay()):
        sent, out = fp8(bucket, flat, i % 2, make_buffer)
        assert sum(e.nbytes for e in sent.tensors.values()) == sent.nbytes == out.numel()
        assert all(e.offset % e.dtype.itemsize == 0 for e in sent.tensors.values())
        whole, views = bucket.views(flat), sent.views(out)
        for name, tensor in whole.items():
            if name in names:
                values, scale = quantise(tensor)
                assert torch.equal(views[name].view(torch.uint8), values.view(torch.uint8)) and torch.equal(
                    views[name + SCALE], scale
                )
            else:
                assert torch.equal(views[name], tensor)
        seen |= views.keys()
    assert seen == {*plan.tensors(), *(name + SCALE for name in names)}


@pytest.mark.parametrize(
    "config", [{"quant_method": "awq"}, {"quant_method": "fp8"}, CONFIG | {"weight_block_size": [1, 128]}]
)
def test_other_quantisations_are_refused(config: dict) -> None:
    with pytest.raises(UserError, match="rollout.engine.model_path"):
        Requantise({}, config)
