"""Weights between processes on CUDA.

Needs torch alone: a CUDA IPC handle as the colocated transport writes it is read by another
process, again and again out of one buffer; checksums and fp8 blocks are those of the CPU; buckets
are put together on the device. Needs sglang, megatron-core and TransformerEngine: a random 8B model
is pushed into a real engine on the same GPU by CUDA IPC (aim: under 2 s) and, where two GPUs are,
by NCCL; every checksum equal, fp8 too by log-probs. Prints seconds by phase.
"""

from __future__ import annotations

import base64
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasd.models.param_table import global_params
from megasd.weight_sync.colocated_transport import handle
from megasd.weight_sync.engine_checksums import words_hash
from megasd.weights.block_fp8 import dequantise, quantise
from megasd.weights.export import plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.launch import torchrun
from tests.tiny_weights import local_params, tiny_checkpoint

HAVE_ENGINES = all(importlib.util.find_spec(name) for name in ("sglang", "megatron", "transformer_engine"))
# The reading side of SGLang's flattened buckets, with nothing of SGLang: unpickle, find the GPU by
# its UUID, copy.
READER = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
original = reductions.rebuild_cuda_tensor
def by_uuid(*arguments):
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return original(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])
reductions.rebuild_cuda_tensor = by_uuid
for line in sys.stdin:
    found = pickle.loads(base64.b64decode(line))
    flat = found["flattened_tensor"]
    parts = {m.name: flat[m.start_idx : m.end_idx].view(m.dtype) for m in found["metadata"]}
    shapes = {m.name: m.shape for m in found["metadata"]}
    sums = {name: part.reshape(shapes[name]).double().sum().item() for name, part in parts.items()}
    torch.cuda.synchronize()
    del found, flat, parts
    print(repr(sums), flush=True)
"""


def test_another_process_reads_the_handle(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "hf", "qwen3")
    params = {n: p.cuda() for n, p in global_params(local_params(read_hf_config(path), tp_size=1)).items()}
    load_hf(params, path, tp_rank=0, tp_size=1)
    gather = Gather(plan_of(params, read_hf_config(path), bucket_bytes=30_000), params, device="cuda")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(3):
            for bucket, flat in gather.replay():
                text = handle(bucket, flat)
                # a handle, not the weights
                assert len(base64.b64decode(text)) < 100_000
                reader.stdin.write(text + "\n")
                reader.stdin.flush()
                wanted = {name: tensor.double().sum().item() for name, tensor in bucket.views(flat).items()}
                found = eval(reader.stdout.readline(), {"nan": float("nan")})
                assert found.keys() == wanted.keys() and all(abs(found[n] - wanted[n]) < 1e-6 for n in wanted)
            with torch.no_grad():
                for param in params.values():
                    param.mul_(1.5)
    finally:
        reader.kill()
        reader.wait()


def test_checksums_and_blocks_are_those_of_the_cpu() -> None:
    tensor = torch.randn(3000, 1001, device="cuda", dtype=torch.bfloat16)
    data = tensor.view(torch.uint8).reshape(-1)
    assert words_hash(data) == words_hash(data.cpu())
    here, there = quantise(tensor), quantise(tensor.cpu())
    assert torch.allclose(dequantise(*here).cpu(), dequantise(*there), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not HAVE_ENGINES, reason="needs sglang, megatron-core and transformer_engine")
def test_an_8b_model_into_an_engine_on_the_same_gpu(tmp_path: Path) -> None:
    print(torchrun("tests/gpu/push_gpu_cases.py", 1, str(tmp_path), "colocated"))


@pytest.mark.skipif(
    not HAVE_ENGINES or torch.cuda.device_count() < 2,
    reason="needs sglang, megatron-core, TransformerEngine, 2 GPUs",
)
def test_a_push_over_nccl(tmp_path: Path) -> None:
    print(torchrun("tests/gpu/push_gpu_cases.py", 1, str(tmp_path), "group"))
