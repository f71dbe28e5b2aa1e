"""The GPUs that the planner knows: memory, peak rates and bandwidths from data sheets.

Nothing here was measured. Peaks are dense (data sheets print twice as much "with sparsity").
Bandwidths are nominal and count one direction. How much of a peak or a bandwidth a run reaches is
stated in time.py, one efficiency for each. Memory is what the driver gives (nvidia-smi's total),
not the round number on the box.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megasd.types import UserError


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU, with its part of the node's links.

    memory: bytes. hbm, nvlink, network, pcie: bytes per second to the GPU's own memory, to the GPUs
    of its node, to other nodes (its part of the node's adapters), to the host. bf16, fp8: FLOP/s;
    fp8=None means that the GPU has no FP8. source: where the numbers come from. local_spec: the
    model has the layers of actor/cpu_layers.py in place of TransformerEngine's (memory.py).
    """

    name: str
    memory: int
    hbm: float
    bf16: float
    fp8: float | None
    nvlink: float
    network: float
    pcie: float
    source: str
    local_spec: bool = False


_MIB = 2**20
GIB = 2**30
GPU_KINDS = {
    gpu.name: gpu
    for gpu in (
        GpuKind(
            "h100-80g",
            81559 * _MIB,
            3.35e12,
            989.4e12,
            1978.9e12,
            450e9,
            50e9,
            64e9,
            "NVIDIA H100 data sheet (SXM5: 3.35 TB/s, 1,979 TFLOP/s bf16 and 3,958 fp8 with sparsity, NVLink"
            " 900 GB/s both ways, PCIe 5.0 x16); DGX H100 user guide: 8 ConnectX-7 of 400 Gb/s",
        ),
        GpuKind(
            "h200-141g",
            143771 * _MIB,
            4.8e12,
            989.4e12,
            1978.9e12,
            450e9,
            50e9,
            64e9,
            "NVIDIA H200 data sheet (SXM: 141 GB, 4.8 TB/s, otherwise as H100); DGX H200: 8 ConnectX-7 of 400"
            " Gb/s",
        ),
        GpuKind(
            "a100-80g",
            81920 * _MIB,
            2.039e12,
            312e12,
            None,
            300e9,
            25e9,
            32e9,
            "NVIDIA A100 data sheet (SXM4 80 GB: 2,039 GB/s, 312 TFLOP/s bf16, NVLink 600 GB/s both ways,"
            " PCIe 4.0 x16); DGX A100 user guide: 8 ConnectX-6 of 200 Gb/s for computing",
        ),
        GpuKind(
            "b200-180g",
            183359 * _MIB,
            8.0e12,
            2250e12,
            4500e12,
            900e9,
            50e9,
            64e9,
            "NVIDIA DGX B200 data sheet, an eighth each: 1,440 GB, 64 TB/s, 72 PFLOP/s fp8 with sparsity,"
            " NVLink 14.4 TB/s both ways; 8 ConnectX-7 of 400 Gb/s",
        ),
        # Not a machine to plan for. Tests compare memory.py with the memory of these layers.
        GpuKind(
            "cpu",
            16 * 2**30,
            20e9,
            0.1e12,
            None,
            10e9,
            1e9,
            10e9,
            "order of magnitude of a few cores",
            local_spec=True,
        ),
    )
}


def gpu_kind(name: str, key: str = "cluster.gpu") -> GpuKind:
    """The GPU of a name. UserError names the nearest GPU, and `key`, where the name came from."""
    if name not in GPU_KINDS:
        near = difflib.get_close_matches(name, GPU_KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(GPU_KINDS)}"
        raise UserError(f"{key}={name}: no such GPU in megasd/cluster/planner/hardware.py; {hint}")
    return GPU_KINDS[name]
