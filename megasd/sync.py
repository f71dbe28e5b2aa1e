"""Weight sync: the actor's live weights into the rollout engine, then proof that the engine computes with them.

    with WeightSync(actor, rollout, config.sync, run_dir, model_path=..., probes=[ids, ...], device=device) as sync:
        metrics = sync.push(version=0)

The only file that knows both engines. The way is a safetensors directory that the engine loads by itself. Two directories take turns:
the last confirmed one stays until the next push is confirmed, since a restarted engine loads it. An engine that answered "loaded" may still
hold other weights (a name it skipped, a stale cache), so probes compare log-probs of fixed token ids in the engine and in the actor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.config import SyncConfig
from megasd.types import UserError
from megasd.weights import families
from megasd.weights.files import read_hf_config, write_weights

_SHARED_MEMORY = Path("/dev/shm")
_OWNER = "owner"  # file with the process id of the run


class SyncError(RuntimeError):
    """The engine does not hold the actor's weights."""


class ProbeError(SyncError, UserError):
    """Engine and actor compute different numbers. Most often two settings that do not go together; the message names them."""


class Exporter(Protocol):
    """What is needed of an actor; both calls are collective."""

    def export_hf(self) -> dict[str, Tensor] | None: ...
    def score_tokens(self, ids: list[int]) -> list[float]: ...


class Engine(Protocol):
    """What is needed of a rollout facade; rank 0 only."""

    def push(self, directory: str, version: int) -> None: ...
    def score(self, ids: list[int]) -> list[float]: ...


class WeightSync:
    """`actor` on every rank, `rollout` on rank 0 (None elsewhere). Every rank calls `push`; a failure on rank 0 raises on all of them.

    model_path: Hugging Face directory of the model, whose config.json goes with the weights. probes: token id lists, the same on every
    rank. local_engine: the engine runs on this machine, so the weights may go through shared memory; else through run_dir, which the
    engine's machine must see.
    """

    def __init__(
        self,
        actor: Exporter,
        rollout: Engine | None,
        config: SyncConfig,
        run_dir: str | os.PathLike[str],
        *,
        model_path: str,
        probes: Sequence[list[int]],
        device: torch.device | str = "cpu",
        local_engine: bool = True,
    ) -> None:
        if config.verify_every and not probes:
            raise ValueError("sync.verify_every is set, but there are no probes")
        self.actor, self.rollout, self.config = actor, rollout, config
        self.model_path, self.probes, self.device = model_path, [list(ids) for ids in probes], torch.device(device)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.expected = families.table(read_hf_config(model_path)).expected_tensors()
        self.run_dir, self.local_engine = Path(run_dir).resolve(), local_engine
        self.root: Path | None = None  # parent of the two directories, chosen at the first push
        self.pushes = 0

    def push(self, version: int) -> dict[str, float]:
        """Export, write, load, stamp `version` and, each config.verify_every-th push (the first included), probe.

        Returns on rank 0 sync/seconds, sync/bytes and, when probed, sync/probe_max_diff (nats); {} on other ranks.
        Raises SyncError on every rank when the engine's log-probs differ by more than config.tolerance; what the engine raised on rank 0
        and SyncError elsewhere. Collectives: the actor's export, its scoring when probed, one status all-reduce for each of the two.
        """
        start = time.perf_counter()
        probing = bool(self.config.verify_every) and self.pushes % self.config.verify_every == 0
        metrics: dict[str, float] = {}
        engine_logps: list[list[float]] = []
        failure: Exception | None = None
        try:  # whatever goes wrong here, the other ranks wait in _agree: tell them, then raise it
            tensors = self.actor.export_hf()
            if self.is_first:
                check_tensors(tensors, self.expected)
                dtype = next(iter(tensors.values())).dtype
                directory = self._directory(tensors)
                metrics["sync/bytes"] = float(write_weights(tensors, self.model_path, directory))
                self.rollout.push(str(directory), version)
                if probing:
                    engine_logps = [self.rollout.score(ids) for ids in self.probes]
        except Exception as error:
            failure = error
        self._agree(failure, version)
        if probing:
            actor_logps = [self.actor.score_tokens(ids) for ids in self.probes]
            if self.is_first:
                metrics["sync/probe_max_diff"] = difference = max_difference(actor_logps, engine_logps)
                # bfloat16 in one engine against float32 was seen to differ by 0.09 nats at most
                tolerance = self.config.tolerance or (1e-3 if dtype is torch.float32 else 0.1)
                if not difference <= tolerance:
                    failure = ProbeError(
                        f"weight version {version}: engine and actor differ by {difference:.3g} nats on the probe, more than "
                        f"sync.tolerance={tolerance:g}; check that rollout.engine.dtype is actor.dtype (bfloat16 needs about "
                        "0.1) and that the engine was started from model.path"
                    )
            self._agree(failure, version)
        self.pushes += 1
        if self.is_first:
            metrics["sync/seconds"] = time.perf_counter() - start
        return metrics

    def close(self) -> None:
        """Remove the pushed directories; the engine must not be restarted after this."""
        if self.root is not None:
            shutil.rmtree(self.root)
            self.root = None

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _directory(self, tensors: Mapping[str, Tensor]) -> Path:
        if self.root is None:
            nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
            self.root = _make_root(self.run_dir, 2 * nbytes, self.local_engine)
        # Never the one of the last confirmed push, for only a confirmed push is counted.
        return self.root / "ab"[self.pushes % 2]

    def _agree(self, failure: Exception | None, version: int) -> None:
        """Raise on every rank if rank 0 failed. Collective: one all-reduce of an integer."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            failed = torch.tensor([failure is not None], dtype=torch.int32, device=self.device)
            dist.all_reduce(failed)
            if failed.item() and failure is None:
                raise SyncError(f"weight version {version} was not pushed: another rank (most often rank 0) says why")
        if failure is not None:
            raise failure


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SyncError, naming the tensor, unless names and shapes are exactly those of the model: an engine skips what it does not know."""
    for name, shape in expected.items():
        if name not in tensors:
            raise SyncError(f"the actor exported no {name}")
        if tuple(tensors[name].shape) != tuple(shape):
            raise SyncError(f"the actor exported {name} as {tuple(tensors[name].shape)}; the model has {tuple(shape)}")
    for name in tensors:
        if name not in expected:
            raise SyncError(f"the actor exported {name}, which the model does not have")


def max_difference(actor_logps: Sequence[Sequence[float]], engine_logps: Sequence[Sequence[float]]) -> float:
    """Largest absolute difference (nats) over all tokens of all probes; NaN, which no tolerance admits, if any is NaN or lengths differ."""
    ours, theirs = (torch.tensor([x for logps in side for x in logps], dtype=torch.float64) for side in (actor_logps, engine_logps))
    if ours.shape != theirs.shape or not ours.numel():
        return float("nan")
    return (ours - theirs).abs().max().item()


def _make_root(run_dir: Path, nbytes: int, local_engine: bool) -> Path:
    """A fresh directory: in shared memory when there is room for nbytes (and a tenth), else in run_dir."""
    if local_engine and _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * nbytes:
        _sweep(_SHARED_MEMORY)
        root = _SHARED_MEMORY / f"megasd-{os.getuid()}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]}"
        if not root.is_symlink() and (not root.exists() or root.stat().st_uid == os.getuid()):
            return _fresh(root)  # what a killed run left there goes
    return _fresh(run_dir / "weights")


def _fresh(root: Path) -> Path:
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True, mode=0o700)
    (root / _OWNER).write_text(str(os.getpid()))
    return root


def _sweep(parent: Path) -> None:
    """Give back the memory of killed runs of this user: directories whose owner is gone."""
    for root in parent.glob(f"megasd-{os.getuid()}-*"):
        owner = root / _OWNER
        if owner.is_file() and not Path(f"/proc/{owner.read_text()}").exists():
            shutil.rmtree(root, ignore_errors=True)
