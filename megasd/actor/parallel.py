"""Process groups of the run: torch.distributed, then Megatron's TP x CP x EP x DP x PP groups.

Every rank runs the same program under torchrun. `broadcast_tensors` carries tensors of one rank to
all others, as a JSON header and raw bytes, never as a pickle.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor import cpu_backend
from megasd.config.schema import ActorConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the parallel layout: Megatron's sizes and ranks, torch's groups."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    # data-parallel ranks of the same context-parallel rank
    dp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank sees the final hidden states."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reporter(self) -> int:
        """World rank whose numbers count: the first rank of the last pipeline stage.

        Megatron orders ranks tp-cp-ep-dp-pp, with pp outermost.
        """
        return self.world_size // self.pp_size * (self.pp_size - 1)


def init_distributed(timeout_minutes: int = 24 * 60) -> torch.device:
    """Join the torchrun process group and pick this rank's device.

    Without torchrun the process is a group of its own. GPU machines get NCCL for CUDA tensors and
    gloo for CPU tensors. Ranks wait for rank 0's whole rollout inside a collective, hence the long
    timeout; a rank that dies closes its sockets and is noticed at once. Collectives: the
    rendezvous.
    """
    cpu_backend.install_cpu_backend()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            # A process of its own opens no port: torch's TCPStore would listen on all interfaces.
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


def init_model_parallel(config: ActorConfig, device: torch.device, seed: int) -> Mesh:
    """Build Megatron's process groups and seed its RNG tracker.

    Groups of an earlier layout are destroyed first. Raises ValueError when the world size is not a
    multiple of TP x PP x CP. Collectives: group creation.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=1 if config.expert_model_parallel_size > 1 else None,
    )
    # Also the tracker of an earlier layout starts again.
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=config.cuda_graph, force_reset_rng=True)
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=ps.get_context_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep_size=ps.get_expert_model_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        ep_group=ps.get_expert_model_parallel_group(),
    )


def broadcast_tensors(tensors: dict[str, Tensor] | None, src: int = 0) -> dict[str, Tensor]:
    """Send the CPU tensors of rank `src` to every rank; returns them on the CPU.

    Other ranks pass None, or tensors that are ignored. Collectives: three broadcasts over the
    world's CPU backend: header length, JSON header (names, dtypes, shapes), one byte buffer.
    """
    tensors = tensors or {}
    sender = dist.get_rank() == src
    if dist.get_world_size() == 1:
        return tensors
    header = b""
    if sender:
        entries = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        header = json.dumps(entries).encode()
    length = torch.tensor([len(header)])
    dist.broadcast(length, src)
    header_bytes = (
        torch.frombuffer(bytearray(header), dtype=torch.uint8)
        if sender
        else torch.empty(int(length), dtype=torch.uint8)
    )
    dist.broadcast(header_bytes, src)
    entries = json.loads(bytes(header_bytes.numpy()))
    sizes = [
        torch.empty(0, dtype=getattr(torch, dtype)).element_size() * torch.Size(shape).numel()
        for _, dtype, shape in entries
    ]
    # Each tensor starts at a multiple of 8 bytes, so that it can be viewed in its own dtype.
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 8) * 8)
    buffer = torch.zeros(starts[-1], dtype=torch.uint8)
    if sender:
        for start, size, tensor in zip(starts, sizes, tensors.values(), strict=False):
            buffer[start : start + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
    dist.broadcast(buffer, src)
    return {
        name: buffer[start : start + size].view(getattr(torch, dtype)).reshape(shape)
        for (name, dtype, shape), start, size in zip(entries, starts, sizes, strict=False)
    }
