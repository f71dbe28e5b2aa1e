"""Seconds of a weight push from nominal bandwidths, by layout and link. Nothing here was measured on a GPU.

    gather    = (model / COPY + same_node / NVLINK + other_nodes / IB) / EFFICIENCY    into rank 0,
              which copies all of it into buckets
    colocated = max(others / NVLINK, model / engine_tp / COPY) / EFFICIENCY            others: what other GPUs read of rank 0's buffers
    group     = (model / link + model / engine_tp / COPY) / EFFICIENCY                 one
              broadcast, pipelined: every engine rank gets all
    disk      = model / pcie + model / write                                           pcie = PCIE *
              EFFICIENCY
    after     = model / read + model / engine_tp / pcie                                disk only:
              the engine loads the whole file
    seconds   = FIXED + buckets * REQUEST + max(gather, send) + min(gather, send) / buckets + after

COPY = HBM / 2, a read and a write. Colocated: engines that fill rank 0's node, each of which reads
the whole model; another node's cannot map its memory. Group over NVLINK: engines have other GPUs of
rank 0's node (NCCL refuses to share one); over IB: other nodes. Disk: an engine of rank 0's node.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner.hardware import GPU_KINDS, GpuKind
from megasd.cluster.planner.job import PlannedRun

# of every nominal bandwidth: an assumption
EFFICIENCY = 0.75
# one PCIe 4 x4 drive, sequential (data sheets of data-centre drives: 4 to 7 GB/s)
NVME_WRITE, NVME_READ = 4e9, 6.5e9
# Seen on a CPU (tools/bench_sync.py), not on a GPU node.
# one thread, fresh pages of /dev/shm; SGLang's loader out of them
SHM_WRITE, SHM_READ = 2.2e9, 3.5e9
# seconds of one update request to SGLang, whatever it carries
REQUEST = 0.008
# seconds to pause, open the session, close it, stamp and continue
FIXED = 0.02
H100 = GPU_KINDS["h100-80g"]


@dataclass(frozen=True)
class Received:
    """Bytes that rank 0 puts together, by where they come from."""

    own: int
    same_node: int
    other_nodes: int

    @property
    def total(self) -> int:
        return self.own + self.same_node + self.other_nodes


def gather_seconds(bytes_: Received, gpu: GpuKind = H100) -> float:
    """Rank 0 copies its own and what it received into the bucket, and takes in the rest over NVLink
    and its InfiniBand adapter.
    """
    return (
        bytes_.total / (gpu.hbm / 2) + bytes_.same_node / gpu.nvlink + bytes_.other_nodes / gpu.network
    ) / EFFICIENCY


def ipc_seconds(nbytes: int, engine_tp: int, engines: int, gpu: GpuKind = H100) -> float:
    """The engines of rank 0's node each read their shards of rank 0's buffer: all but the one that
    shares its GPU over NVLink.
    """
    remote = nbytes * engines - nbytes // engine_tp
    return max(remote / gpu.nvlink, nbytes / engine_tp / (gpu.hbm / 2)) / EFFICIENCY


def group_seconds(nbytes: int, link: float, engine_tp: int, gpu: GpuKind = H100) -> float:
    """A pipelined broadcast, then each engine rank's copy of its shard out of the bucket."""
    return (nbytes / link + nbytes / engine_tp / (gpu.hbm / 2)) / EFFICIENCY


def disk_seconds(
    nbytes: int, engine_tp: int, write: float, read: float, gpu: GpuKind = H100
) -> tuple[float, float]:
    """(rank 0 to the file, the file to the engine's GPUs); `write`, `read`: bytes per second that
    are really had.
    """
    pcie = gpu.pcie * EFFICIENCY
    return nbytes / pcie + nbytes / write, nbytes / read + nbytes / engine_tp / pcie


def push_seconds(gather: float, send: float, buckets: int, after: float = 0.0) -> float:
    """Buckets are sent while the next is put together."""
    return FIXED + buckets * REQUEST + max(gather, send) + min(gather, send) / buckets + after


def received(job: PlannedRun) -> Received:
    """Of a job's layout, in equal shares: stage k of the first data-parallel copy begins at rank k
    x GPUs / pp (Megatron's order), with the tensor-parallel ranks, and with the expert-parallel
    ranks that hold the experts where there are any.
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
    """Of one push by the config's transport, and what bounds it."""
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
        # Shared memory where the engines are on rank 0's node, else a file that both see.
        write, read = (
            (SHM_WRITE, SHM_READ) if job.colocated else (NVME_WRITE * EFFICIENCY, NVME_READ * EFFICIENCY)
        )
        send, after = disk_seconds(nbytes, engine_tp, write, read, gpu)
        link = "disk"
    if gather >= send and not after:
        link = "IB" if parts.other_nodes else "NVLink" if parts.same_node else "HBM"
    return push_seconds(gather, send, buckets, after), link
