"""Seconds of a weight push from nominal bandwidths, by layout and link. Nothing here was measured.

    gather    = (model / COPY + same_node / NVLINK + other_nodes / IB) / EFFICIENCY
    colocated = max(others / NVLINK, model / engine_tp / COPY) / EFFICIENCY
    group     = (model / link + model / engine_tp / COPY) / EFFICIENCY
    disk      = model / pcie + model / write
    after     = model / read + model / engine_tp / pcie
    seconds   = FIXED + buckets * REQUEST + max(gather, send) + min(gather, send) / buckets + after

gather: rank 0 receives the weights and copies all of them into buckets. COPY = HBM / 2, a read and
a write. send is one of colocated, group and disk.

colocated: engines fill rank 0's node. Each of them reads the whole model; `others` are the bytes
that other GPUs read of rank 0's buffers. Engines on another node cannot map that memory.
group: one pipelined broadcast, of which every engine rank gets all. link = NVLINK if engines have
other GPUs of rank 0's node (NCCL refuses to share a GPU), IB if they have other nodes.
disk: an engine of rank 0's node loads a whole file, which is `after`. pcie = PCIE * EFFICIENCY.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner.hardware import GPU_KINDS, GpuKind
from megasd.cluster.planner.job import PlannedRun

# Part of every nominal bandwidth that is reached. An assumption.
EFFICIENCY = 0.75
# Bytes per second of one PCIe 4 x4 drive, sequential (data sheets of data-centre drives: 4 to 7
# GB/s).
NVME_WRITE, NVME_READ = 4e9, 6.5e9
# Bytes per second of one thread that writes fresh pages of /dev/shm, and of SGLang's loader that
# reads them. Measured on a CPU (tools/bench_sync.py), like the next two; not on a GPU node.
SHM_WRITE, SHM_READ = 2.2e9, 3.5e9
# Seconds of one update request to SGLang, whatever the request carries.
REQUEST = 0.008
# Seconds to pause engines, open and close the push, set the weight version, and continue.
FIXED = 0.02
H100 = GPU_KINDS["h100-80g"]


@dataclass(frozen=True)
class Received:
    """Bytes of weights that rank 0 collects: its own, those of its node, those of other nodes."""

    own: int
    same_node: int
    other_nodes: int

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.own + self.same_node + self.other_nodes


def gather_seconds(bytes_: Received, gpu: GpuKind = H100) -> float:
    """Seconds in which rank 0 receives all weights and copies them into buckets.

    What is not its own comes over NVLink and over its InfiniBand adapter.
    """
    return (
        bytes_.total / (gpu.hbm / 2) + bytes_.same_node / gpu.nvlink + bytes_.other_nodes / gpu.network
    ) / EFFICIENCY


def ipc_seconds(nbytes: int, engine_tp: int, engines: int, gpu: GpuKind = H100) -> float:
    """Seconds in which the engines of rank 0's node read their shards of rank 0's buffer.

    The engine rank that shares rank 0's GPU reads locally, every other one over NVLink.
    """
    remote = nbytes * engines - nbytes // engine_tp
    return max(remote / gpu.nvlink, nbytes / engine_tp / (gpu.hbm / 2)) / EFFICIENCY


def group_seconds(nbytes: int, link: float, engine_tp: int, gpu: GpuKind = H100) -> float:
    """Seconds of a pipelined broadcast, and of each engine rank's copy out of the bucket."""
    return (nbytes / link + nbytes / engine_tp / (gpu.hbm / 2)) / EFFICIENCY


def disk_seconds(
    nbytes: int, engine_tp: int, write: float, read: float, gpu: GpuKind = H100
) -> tuple[float, float]:
    """Seconds (from rank 0 to the file, from the file to the engine's GPUs).

    write, read: bytes per second that the file system reaches.
    """
    pcie = gpu.pcie * EFFICIENCY
    return nbytes / pcie + nbytes / write, nbytes / read + nbytes / engine_tp / pcie


def push_seconds(gather: float, send: float, buckets: int, after: float = 0.0) -> float:
    """Seconds of a push in which a bucket is sent while the next bucket is gathered."""
    return FIXED + buckets * REQUEST + max(gather, send) + min(gather, send) / buckets + after


def received(job: PlannedRun) -> Received:
    """The bytes that rank 0 collects in the run's layout; every rank holds equally many.

    In Megatron's order of ranks, stage k of the first data-parallel copy begins at rank
    k x GPUs / pp. Its tensor-parallel ranks come first; expert-parallel ranks hold the experts.
    """
    node, experts = job.config.cluster.gpus_per_node, job.model.expert_weights if job.ep > 1 else 0
    stages = sum(stage * (job.gpus // job.pp) < node for stage in range(job.pp))
    own = same_node = other_nodes = 0
    for weights, ranks in ((job.model.weights - experts, job.tp), (experts, job.ep)):
        nbytes, shards, here = job.word * weights, ranks * job.pp, stages * min(ranks, node)
        own += nbytes // shards
        same_node += nbytes * (here - 1) // shards
        other_nodes += nbytes * (shards - here) // shards
    return Received(own, same_node, other_nodes)


def seconds(job: PlannedRun) -> tuple[float, str]:
    """Seconds of one push by the config's transport, and the link that it waits for."""
    sync, gpu, engine_tp = job.config.sync, job.gpu, job.config.rollout.engine.tensor_parallel_size
    nbytes = job.word * job.model.weights
    buckets = len(job.model.buckets((sync.bucket_mib or 512) << 20, job.word, job.pp))
    parts = received(job)
    gather, after = gather_seconds(parts, gpu), 0.0
    if sync.transport == "colocated":
        send, link = ipc_seconds(nbytes, engine_tp, job.engines, gpu), "NVLink"
    elif sync.transport == "group":
        link = "NVLink" if job.colocated else "IB"
        send = group_seconds(nbytes, gpu.nvlink if job.colocated else gpu.network, engine_tp, gpu)
    else:
        # Shared memory if the engines are on rank 0's node, else a file that both nodes see.
        write, read = (
            (SHM_WRITE, SHM_READ) if job.colocated else (NVME_WRITE * EFFICIENCY, NVME_READ * EFFICIENCY)
        )
        send, after = disk_seconds(nbytes, engine_tp, write, read, gpu)
        link = "disk"
    if gather >= send and not after:
        link = "IB" if parts.other_nodes else "NVLink" if parts.same_node else "HBM"
    return push_seconds(gather, send, buckets, after), link
