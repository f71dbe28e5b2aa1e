"""Weight sync pushes the actor's weights into the engines, then proves that they compute with them.

    with WeightSync(actor, sampler, config.sync, run_dir, model_path=..., probes=[ids, ...]) as sync:
        metrics = sync.push(version=0)

One plan (which rank owns what, buckets, order, names) is made at the first push and replayed at
each: while a bucket is on its way to the engines, the next one is put together on rank 0. An engine
that answered "loaded" may still hold other weights (a name it skipped, a stale cache): checksums
compare every tensor, probes compare the log-probs of fixed token ids.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.config.schema import SyncConfig
from megasd.engine.errors import Unreachable
from megasd.engine.sampler import Sampler
from megasd.types import UserError
from megasd.weight_sync.delta import Fingerprints
from megasd.weight_sync.engine_checksums import EngineWeights
from megasd.weight_sync.sender import BucketSender, EngineSender, IdleSender, make_transport
from megasd.weight_sync.verify import max_difference
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config

T = TypeVar("T")
# whole pushes, when an engine dies in one and is there again
ATTEMPTS = 3
# a rank's status after a phase; the highest of all ranks counts
_OK, _AGAIN, _FAILED = range(3)


class SyncError(RuntimeError):
    """The engine does not hold the actor's weights."""


class ProbeError(SyncError, UserError):
    """Engine and actor compute different numbers.

    Most often two settings do not go together; the message names them.
    """


class WeightSource(Protocol):
    """What a push needs of the actor; the methods are collective."""

    @property
    def is_fp8(self) -> bool:
        """Whether the actor computes in fp8."""

    def gather(
        self,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int,
        make_buffer: Callable[[int], Tensor] | None = None,
    ) -> Gather:
        """The plan that brings its weights to rank 0 in buckets, as `dtype` (None = its own)."""

    def score_tokens(self, ids: list[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ids[1:], each given its prefix, on every rank."""


@dataclass(frozen=True)
class _Prepared:
    """What the first push makes and each push uses."""

    gather: Gather
    sender: BucketSender


class WeightSync:
    """Pushes of the actor's weights. Every rank calls `push`; a failure raises on all of them.

    It is one long class because its methods are the steps of one collective protocol: each rank must
    reach the same all-reduces in the same order. What one rank does alone is in sender.py.

    actor: on every rank. sampler: its engines get the weights; on rank 0, None on other ranks.
    model_path: Hugging Face directory of the model, whose config.json goes with the weights.
    probes: token id lists, the same on every rank. dtype: of the engines' weights; None = the
    actor's. local_engine: the engine runs on this machine, so a file may lie in shared memory; else
    in run_dir, which the engine's machine must see. device: of the actor, and of the status
    all-reduce.
    """

    def __init__(
        self,
        actor: WeightSource,
        sampler: Sampler | None,
        config: SyncConfig,
        run_dir: Path | str,
        *,
        model_path: str,
        probes: Sequence[list[int]],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        local_engine: bool = True,
    ) -> None:
        if config.verify_every and not probes:
            raise ValueError("sync.verify_every is set, but there are no probes")
        self.actor, self.sampler, self.config = actor, sampler, config
        self.probes, self.dtype, self.device = [list(ids) for ids in probes], dtype, torch.device(device)
        self.hf = read_hf_config(model_path)
        self.run_dir, self.local_engine = Path(run_dir).resolve(), local_engine
        # pushes that have succeeded; plans made, one unless the first push was refused
        self.pushes = self.plans_made = 0
        self._prepared: _Prepared | None = None
        self._fingerprints = Fingerprints()
        # the version that the fingerprints are of
        self._fingerprints_version = -1
        self._lock = threading.Lock()
        self._cleanup = contextlib.ExitStack()

    def push(self, version: int, *, lacking: bool = False) -> dict[str, float]:
        """Every engine holds the actor's weights as `version` when this returns.

        Each config.verify_every-th push is probed.

        `lacking`: only engines that do not hold `version` already (one that was restarted), whole
        and without a second attempt. Returns on rank 0 sync/seconds, sync/bytes,
        sync/seconds_<phase> and, when probed, sync/probe_max_diff (nats); {} on other ranks.

        Raises on every rank: on rank 0 what went wrong (an engine's answer, a mismatch by name),
        SyncError elsewhere; SyncError also on a rank that is in a push already. After a failure
        engines hold the old version or none ("partial-<version>", paused), never a mix that
        samples; the next push heals them.

        Collectives: at the first push two status all-reduces and the plan's exchange; with
        config.delta one all-reduce of a byte a parameter; per attempt a status, the gather's
        messages, a status, and another after healing; a status after verification; when probed two
        more and the actor's scoring.
        """
        if not self._lock.acquire(blocking=False):
            raise SyncError(f"weight version {version} was not pushed: another push is under way")
        try:
            return self._push(version, lacking)
        except BaseException:
            # the engine may hold a part of it
            self._fingerprints.forget()
            raise
        finally:
            self._lock.release()

    def release(self) -> None:
        """The engines give their memory to the trainer until the next push, which sends everything.

        Every rank calls it.
        """
        self._fingerprints.forget()
        if self.sampler is not None:
            self.sampler.weights.release()

    def close(self) -> None:
        """Leave the process group, remove pushed files; the engine must not be restarted after this."""
        self._cleanup.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- a push ----------------------------------------------------------------------------------

    def _push(self, version: int, lacking: bool) -> dict[str, float]:
        clock = _PhaseClock()
        prepared = self._prepare(version)
        gather, sender = prepared.gather, prepared.sender
        changed = self._changed(prepared, lacking) if self.config.delta else None
        for attempt in range(1, ATTEMPTS + 1):
            failure = self._attempt(prepared, version, changed, lacking, clock)
            status = self._agree(failure, version, again=not lacking and attempt < ATTEMPTS)
            if status == _OK:
                break
            # whatever the engines hold now, they get all of it
            changed = None
            self._agreed(sender.heal, version)
        metrics = {"sync/bytes": float(sender.sent_bytes)}
        with clock.phase("verify"):
            self._agreed(sender.verify, version)
            if not lacking and self.config.verify_every and self.pushes % self.config.verify_every == 0:
                metrics |= self._probe(version, gather, sender)
        if self.config.delta:
            self._fingerprints.keep()
            self._fingerprints_version = version
        self.pushes += not lacking
        return metrics | clock.metrics() if self.sampler is not None else {}

    def _prepare(self, version: int) -> _Prepared:
        """The plan, its buffers and the sender, made once.

        What cannot be right is refused before an engine is touched.
        """
        if self._prepared is not None:
            return self._prepared
        mib = self.config.bucket_mib or (512 if self.device.type == "cuda" else 24)
        sampler = self.sampler
        if sampler is None:
            self._agree(None, version)
            gather = self.actor.gather(dtype=self.dtype, bucket_bytes=mib << 20)
            self.plans_made += 1
            self._agree(None, version)
            self._prepared = _Prepared(gather, IdleSender())
            return self._prepared
        transport = self._agreed(
            lambda: make_transport(
                sampler.weights,
                self.config,
                run_dir=self.run_dir,
                device=self.device,
                dtype=self.dtype,
                local_engine=self.local_engine,
                cleanup=self._cleanup,
            ),
            version,
        )
        gather = self.actor.gather(
            dtype=self.dtype, bucket_bytes=mib << 20, make_buffer=transport.make_buffer
        )
        self.plans_made += 1

        def make_sender() -> BucketSender:
            sender = EngineSender(sampler, transport, gather.plan, self.config, self.hf)
            gather.reserve()
            return sender

        self._prepared = _Prepared(gather, self._agreed(make_sender, version))
        return self._prepared

    def _attempt(
        self,
        prepared: _Prepared,
        version: int,
        changed: frozenset[str] | None,
        lacking: bool,
        clock: _PhaseClock,
    ) -> Exception | None:
        """Rank 0's engines get the changed parameters (None: all); the other ranks give their pieces.

        Returns this rank's failure, after the messages are through.
        """
        sender = prepared.sender
        if changed is not None and not changed:
            return _failure_of(lambda: sender.restamp(version))
        with clock.phase("begin"):
            failure = _failure_of(lambda: sender.begin(version, lacking=lacking, turn=self.pushes))
            # nothing is put together for engines that cannot take it
            if self._status(failure) != _OK:
                return failure
        failure = self._send_buckets(prepared, changed, clock)
        if self.sampler is not None:
            with clock.phase("commit"):
                failure = failure or _failure_of(lambda: sender.commit(version))
        return failure

    def _send_buckets(
        self, prepared: _Prepared, changed: frozenset[str] | None, clock: _PhaseClock
    ) -> Exception | None:
        """Replay the plan and send each bucket. Returns the first failure, after every message is through:
        the other ranks are in the middle of them.
        """
        gather, sender = prepared.gather, prepared.sender
        buckets = gather.plan.buckets
        last = max(b.index for b in buckets if changed is None or b.only(changed).params)
        sending = _UntilFailure(clock, "send")
        with clock.phase("gather", without="send"):
            # two buffers take turns: that of bucket i - 2 is written again for bucket i
            for bucket, flat in gather.replay(changed, lambda i: sending.run(partial(sender.confirm, i - 2))):
                if flat is not None:
                    sending.run(partial(sender.send, bucket, flat, last=bucket.index == last))
            sending.run(sender.confirm_all)
        return sending.failure

    # ---- only what has changed (config.delta) ----------------------------------------------------

    def _changed(self, prepared: _Prepared, lacking: bool) -> frozenset[str] | None:
        """The parameters to send, the same on every rank; None = all of them.

        Parameters are left out only if every engine surely holds them: not after a restart behind
        its URL. Collective: one all-reduce of a byte a parameter.
        """
        whole = lacking or not prepared.sender.all_hold(self._fingerprints_version)
        gather = prepared.gather
        changed = self._fingerprints.take(gather.plan, gather.params, whole=whole)
        if changed is None or self.config.verify == "off":
            return changed
        return self._whole_parameters(gather, changed)

    def _whole_parameters(self, gather: Gather, changed: frozenset[str]) -> frozenset[str]:
        """`changed`, and every parameter that shares an engine's parameter with it (a stack of experts).

        A checksum is of a whole parameter of the engine.
        """
        place = EngineWeights(self.hf, 1)
        params = [param for bucket in gather.plan.buckets for param in bucket.params]
        touched = {place.parameter(part) for param in params if param.name in changed for part in param.parts}
        return frozenset(
            param.name for param in params if any(place.parameter(part) in touched for part in param.parts)
        )

    # ---- agreement -------------------------------------------------------------------------------

    def _status(self, failure: Exception | None, *, again: bool = False) -> int:
        """The worst status of all ranks. Collective: one all-reduce of an integer."""
        mine = _OK if failure is None else _AGAIN if again and isinstance(failure, Unreachable) else _FAILED
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return mine
        status = torch.tensor([mine], dtype=torch.int32, device=self.device)
        dist.all_reduce(status, dist.ReduceOp.MAX)
        return int(status.item())

    def _agree(self, failure: Exception | None, version: int, *, again: bool = False) -> int:
        """Raise on every rank what failed for good on one of them; _AGAIN when rank 0 may try once more.

        Collective: one status all-reduce.
        """
        status = self._status(failure, again=again)
        if status != _FAILED:
            return status
        if self._prepared is not None:
            self._prepared.sender.abandon()
        if failure is None:
            raise SyncError(
                f"weight version {version} was not pushed: another rank (most often rank 0) says why"
            )
        if isinstance(failure, Unreachable):
            raise SyncError(f"weight version {version} was not pushed: {failure}") from failure
        raise failure

    def _agreed(self, work: Callable[[], T], version: int) -> T:
        """What `work` returns on this rank. Collective: raises on every rank if it raised on one."""
        try:
            found = work()
        except Exception as error:
            self._agree(error, version)
            raise
        self._agree(None, version)
        return found

    # ---- probes ----------------------------------------------------------------------------------

    def _probe(self, version: int, gather: Gather, sender: BucketSender) -> dict[str, float]:
        """Compare log-probs of the probes.

        ProbeError on rank 0, SyncError elsewhere, when they differ by more than config.tolerance.
        """
        engine = self._agreed(lambda: sender.score(self.probes), version)
        actor = [self.actor.score_tokens(ids) for ids in self.probes]
        if self.sampler is None:
            self._agree(None, version)
            return {}
        difference = max_difference(actor, engine)
        tolerance = self.config.tolerance or self._default_tolerance(gather, sender)
        failure = None
        if not difference <= tolerance:
            failure = ProbeError(
                f"weight version {version}: engine and actor differ by {difference:.3g} nats on the probe,"
                f" more than sync.tolerance={tolerance:g}; check that rollout.engine.dtype is actor.dtype"
                " (bfloat16 needs about 0.1) and that the engine was started from model.path"
            )
            sender.distrust()
        self._agree(failure, version)
        return {"sync/probe_max_diff": difference}

    def _default_tolerance(self, gather: Gather, sender: BucketSender) -> float:
        """Nats that the probes may differ by where config.tolerance is not set.

        bfloat16 in one engine against float32 was seen to differ by 0.09 at most. The number for
        fp8 is a guess until a GPU has run it.
        """
        if sender.in_fp8 or self.actor.is_fp8:
            return 0.5
        in_float32 = next(iter(gather.plan.tensors().values())).dtype is torch.float32
        return 1e-3 if in_float32 else 0.1


class _PhaseClock:
    """Seconds of a push by phase, and since it began."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(("begin", "gather", "send", "commit", "verify"), 0.0)

    @contextlib.contextmanager
    def phase(self, name: str, *, without: str | None = None) -> Iterator[None]:
        """Add the block's seconds to a phase, less the seconds that `without` gains meanwhile."""
        start, other = time.perf_counter(), self.seconds[without] if without is not None else 0.0
        yield
        gained = self.seconds[without] - other if without is not None else 0.0
        self.seconds[name] += time.perf_counter() - start - gained

    def metrics(self) -> dict[str, float]:
        """sync/seconds, and sync/seconds_<phase> of each phase."""
        total = time.perf_counter() - self.started
        return {"sync/seconds": total} | {f"sync/seconds_{name}": took for name, took in self.seconds.items()}


class _UntilFailure:
    """Runs calls until one fails, and times them; `failure` is what that one raised."""

    def __init__(self, clock: _PhaseClock, phase: str) -> None:
        self.clock, self.phase = clock, phase
        self.failure: Exception | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Call `work`, unless an earlier call has failed."""
        with self.clock.phase(self.phase):
            self.failure = self.failure or _failure_of(work)


def _failure_of(work: Callable[[], None]) -> Exception | None:
    """The exception that `work` raises; None when it raises none."""
    try:
        work()
    except Exception as error:
        return error
    return None
