"""Measure one actor layout of tools/bench_sync.py; torchrun starts bench_sync_rank.py JOB.json.

Builds the actor, reaches the engine by its URL and pushes: per transport and bucket size one push
that makes plan, buffers and connections, then timed ones, then one with sync.verify=full and the
log-prob probe. Before each push the weights change, and rank 0 times the floor: the same bytes
copied in memory and written once as safetensors. Rank 0 writes the rows as JSON to the job's "out".
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from bench_meters import PeakMemory
from safetensors.torch import load_file, save_file

from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    EngineConfig,
    NLLTerm,
    RolloutConfig,
    SyncConfig,
)
from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.sampler import Sampler, make_sampler
from megasd.weight_sync.engine_checksums import EngineWeights
from megasd.weight_sync.sync import SyncError, WeightSync

# Short, since SGLang takes 0.2 s a token to score in bfloat16 on a busy core.
PROBES = [[4, 55, 17, 90, 2, 5], [91, 80, 81, 0, 3]]
FLOORS = ("copy_warm", "copy_cold", "write_memory", "write_disk")


class Floor:
    """The bytes of a push, copied and written with nothing around it, by one thread of rank 0."""

    def __init__(self, model: Path, memory: Path, disk: Path) -> None:
        """memory, disk: directories that get one safetensors file each.

        `memory` lies on a memory file system, `disk` on a disk (page cache, no sync).
        """
        self.source = {
            name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()
        }
        self.target = {name: tensor.clone() for name, tensor in self.source.items()}
        self.files = {"write_memory": memory / "floor.safetensors", "write_disk": disk / "floor.safetensors"}

    def seconds(self) -> dict[str, float]:
        """Seconds of each of FLOORS.

        copy_warm: into memory that has been touched. copy_cold: into fresh memory. write_*: a new
        safetensors file.
        """
        found, start = {}, time.perf_counter()
        for name, tensor in self.source.items():
            self.target[name].copy_(tensor)
        found["copy_warm"], start = time.perf_counter() - start, time.perf_counter()
        fresh = [tensor.clone() for tensor in self.source.values()]
        found["copy_cold"] = time.perf_counter() - start
        del fresh
        for name, path in self.files.items():
            path.unlink(missing_ok=True)
            start = time.perf_counter()
            save_file(self.source, path)
            found[name] = time.perf_counter() - start
            path.unlink()
        return found


class Requests:
    """Seconds that the engines took to answer, by HTTP path; engines at work at once count each."""

    def __init__(self, rollout: Sampler) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        for engine in rollout.pool.engines:
            engine.request = self._timed(engine.request)

    def _timed(self, real: Any) -> Any:
        async def request(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return await real(method, path, *args, **kwargs)
            finally:
                self.seconds[path] += time.perf_counter() - start

        return request

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


@torch.no_grad()
def change(actor: Actor, number: int) -> None:
    """Change every bit pattern but zero, and keep the sizes of the weights."""
    for param in actor.params().values():
        param.mul_(1.06 if number % 2 else 0.95)


def check(actor: Actor, rollout: Sampler | None, hf: dict[str, Any]) -> str | None:
    """The first difference between the actor's weights and the engines', on rank 0; else None.

    The engines hold what an unverified push wrote. Collective: a gather of its own.
    """
    followed = (
        {}
        if rollout is None
        else {size: EngineWeights(hf, size) for size in {engine.tp_size for engine in rollout.pool.engines}}
    )
    for bucket, flat in actor.gather().replay():
        for weights in followed.values():
            for name, tensor in bucket.views(flat).items():
                weights.feed(name, tensor)
    if rollout is None:
        return None
    for url, ranks in rollout.weights.checksums().items():
        for found, wanted in zip(ranks, followed[len(ranks)].checksums, strict=True):
            for name, checksum in wanted.items():
                if found.get(name) != checksum:
                    return f"{url} holds another {name} than the actor after a timed push"
    return None


def middle(values: list[dict[str, float]]) -> dict[str, float]:
    """The median of every key that all of `values` have."""
    return {
        key: statistics.median(value[key] for value in values)
        for key in values[0]
        if all(key in value for value in values)
    }


def phases(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, out of what WeightSync.push returns."""
    return {
        key.removeprefix("sync/seconds_"): value
        for key, value in metrics.items()
        if key.startswith("sync/seconds_")
    }


def measure(
    actor: Actor,
    rollout: Sampler | None,
    floor: Floor | None,
    job: dict[str, Any],
    transport: str,
    bucket_mib: int,
    version: int,
) -> dict[str, Any]:
    """One row; {} on other ranks than 0. Uses versions `version` .. `version + repeats + 1`."""
    first = rollout is not None
    meter, requests = PeakMemory(torch.device("cpu")), Requests(rollout) if first else None
    row: dict[str, Any] = {
        "transport": transport,
        "layout": job["layout"],
        "engine_tp": job["engine_tp"],
        "bucket_mib": bucket_mib,
    }
    pushes, floors, engine_seconds, peaks = [], [], [], []
    settings = SyncConfig(transport=transport, bucket_mib=bucket_mib, verify="off", verify_every=0)
    try:
        with WeightSync(
            actor,
            rollout,
            settings,
            Path(job["run_dir"]),
            model_path=job["model"],
            probes=PROBES,
            dtype=torch.bfloat16,
        ) as sync:
            for number in range(1 + job["repeats"]):
                change(actor, number)
                if first:
                    floors.append(floor.seconds())
                if number == 0:
                    meter.start()
                # Forget the floor's peak of memory.
                Path("/proc/self/clear_refs").write_text("5")
                dist.barrier()
                pushes.append(sync.push(version + number))
                peaks.append(meter.stop())
                if first:
                    engine_seconds.append(requests.take())
            difference = check(actor, rollout, actor.hf_config)
            sync.config.verify, sync.config.verify_every = "full", 1
            change(actor, job["repeats"] + 1)
            dist.barrier()
            verified = sync.push(version + job["repeats"] + 1)
            if not first:
                return {}
            row["plans_made"], row["buckets"] = sync.plans_made, len(sync._prepared.gather.plan.buckets)
    except (SyncError, EngineError, Unreachable) as error:
        return row | {"verified": False, "error": str(error)} if first else {}
    row |= timings(pushes, floors, engine_seconds)
    return row | {
        "verified_seconds": verified["sync/seconds"],
        "verified_phases": phases(verified),
        "probe_max_diff": verified["sync/probe_max_diff"],
        "peak_bytes": max(peaks),
        "verified": difference is None,
        **({} if difference is None else {"error": difference}),
    }


def timings(
    pushes: list[dict[str, float]], floors: list[dict[str, float]], engine_seconds: list[dict[str, float]]
) -> dict[str, Any]:
    """The part of a row that comes from the timed pushes, all but the first."""
    timed = [push["sync/seconds"] for push in pushes[1:]]
    floor_seconds, seconds = middle(floors[1:]), statistics.median(timed)
    return {
        "seconds": seconds,
        "spread": [min(timed), max(timed)],
        "pushes": len(timed),
        "bytes": int(pushes[-1]["sync/bytes"]),
        "floor": floor_seconds,
        "ratio_to_copy_and_write": seconds / (floor_seconds["copy_warm"] + floor_seconds["write_memory"]),
        "ratio_to_cold_copy_and_write": (
            seconds / (floor_seconds["copy_cold"] + floor_seconds["write_memory"])
        ),
        "ratio_to_copy_and_disk_write": seconds / (floor_seconds["copy_warm"] + floor_seconds["write_disk"]),
        "phases": phases(middle(pushes[1:])),
        "engine_seconds": middle(engine_seconds[1:]),
        "first_seconds": pushes[0]["sync/seconds"],
    }


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    device, rows = init_distributed(), []
    first = dist.get_rank() == 0
    config = Config()
    config.model.path = job["model"]
    config.actor = ActorConfig(dtype="bfloat16", **job["actor"])
    config.algorithm = AlgorithmConfig(source="dataset", nll=NLLTerm())
    rollout = floor = None
    if first:
        rollout = make_sampler(
            RolloutConfig(engine=EngineConfig(urls=job["urls"])),
            model_path=job["model"],
            device="cpu",
            dtype="bfloat16",
            run_dir=Path(job["run_dir"]),
            seed=1,
            stop_token_ids=[],
            vocab_size=job["vocab_size"],
        )
        rollout.pool.start()
        floor = Floor(Path(job["model"]), Path(job["memory"]), Path(job["run_dir"]))
    actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
    version = 1
    for bucket_mib in job["bucket_mib"]:
        for transport in job["transports"]:
            row = measure(actor, rollout, floor, job, transport, bucket_mib, version)
            version += job["repeats"] + 2
            if first:
                rows.append(row)
                print(json.dumps(row), flush=True)
    if first:
        Path(job["out"]).write_text(json.dumps(rows))
        rollout.pool.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
