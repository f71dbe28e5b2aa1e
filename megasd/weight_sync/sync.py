"""Weight sync: the actor's live weights into the rollout engines, then proof that the engines
compute with them.

    with WeightSync(actor, sampler, config.sync, run_dir, model_path=..., probes=[ids, ...]) as sync:
        metrics = sync.push(version=0)

The only file that knows both engines. One plan (which rank owns what, buckets, order, names) is
made at the first push and replayed at each: while a bucket is on its way to the engines, the next
one is put together on rank 0. An engine that answered "loaded" may still hold other weights (a name
it skipped, a stale cache): checksums compare every tensor on demand, probes the log-probs of fixed
token ids.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megasd.config.schema import SyncConfig
from megasd.engine.client import Unreachable
from megasd.engine.sampler import Sampler
from megasd.types import UserError
from megasd.weight_sync.colocated_transport import ColocatedTransport
from megasd.weight_sync.delta import Fingerprints
from megasd.weight_sync.disk_transport import DiskTransport
from megasd.weight_sync.engine_checksums import EngineWeights
from megasd.weight_sync.group_transport import GroupTransport
from megasd.weight_sync.staging import staging_directory
from megasd.weight_sync.transport import PendingSend
from megasd.weight_sync.verify import check_engine_names, check_shapes, compare_checksums, max_difference
from megasd.weights.block_fp8 import Requantise
from megasd.weights.gather import Gather
from megasd.weights.gather_plan import GatherPlan
from megasd.weights.hf_files import read_hf_config
from megasd.weights.safetensors_headers import read_headers

# whole pushes, when an engine dies in one and is there again
ATTEMPTS = 3
# sync.verify=sample: one parameter in so many, others at the next push
SAMPLE = 8
# what rank 0 tells the others
_OK, _AGAIN, _FAILED = range(3)


class SyncError(RuntimeError):
    """The engine does not hold the actor's weights."""


class ProbeError(SyncError, UserError):
    """Engine and actor compute different numbers. Most often two settings that do not go together;
    the message names them.
    """


class WeightSource(Protocol):
    """What is needed of an actor; all calls are collective."""

    def gather(
        self, *, dtype: torch.dtype | None = None, bucket_bytes: int, make_buffer: object = None
    ) -> Gather: ...
    def score_tokens(self, ids: list[int]) -> list[float]: ...


class WeightSync:
    """`actor` on every rank, `sampler` on rank 0. Every rank calls `push`;
    a failure raises on all.

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
        self.weights = None if sampler is None else sampler.weights
        self.model_path, self.probes, self.dtype, self.device = (
            model_path,
            [list(ids) for ids in probes],
            dtype,
            torch.device(device),
        )
        self.hf = read_hf_config(model_path)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.run_dir, self.local_engine = Path(run_dir).resolve(), local_engine
        self.pushes = 0
        self.plans_made = 0
        self._gather: Gather | None = None
        # rank 0
        self._sent_plan: GatherPlan | None = None
        self._fp8: Requantise | None = None
        self._transport: DiskTransport | GroupTransport | ColocatedTransport | None = None
        self._fingerprints = Fingerprints()
        # engines whose parameters' names were compared with the plan's
        self._checked: object = None
        # version that the fingerprints are of
        self._kept = -1
        self._sent_bytes = 0
        self._lock = threading.Lock()
        self._cleanup = contextlib.ExitStack()

    def push(self, version: int, *, lacking: bool = False) -> dict[str, float]:
        """Every engine holds the actor's weights as `version` when this returns; each
        config.verify_every-th push is probed.

        `lacking`: only engines that do not hold `version` already (one that was restarted), whole
        and without a second attempt. Returns on rank 0 sync/seconds, sync/bytes,
        sync/seconds_<phase> and, when probed, sync/probe_max_diff (nats); {} on other ranks. Raises
        on every rank: on rank 0 what went wrong (an engine's answer, a mismatch by name), SyncError
        elsewhere; SyncError also on a rank that is in a push already. After a failure engines hold
        the old version or none ("partial-<version>", paused), never a mix that samples; the next
        push heals them. Collectives: at the first push two status all-reduces and the plan's
        exchange; with config.delta one all-reduce of a byte a parameter; per attempt a status, the
        gather's messages, a status, and another after healing; a status after verification; when
        probed two more and the actor's scoring.
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
        """The engines give their memory to the trainer until the next push, which sends everything
        and gives it back. On every rank.
        """
        self._fingerprints.forget()
        if self.is_first:
            self.weights.release()

    def _push(self, version: int, lacking: bool) -> dict[str, float]:
        start = time.perf_counter()
        phases = dict.fromkeys(("begin", "gather", "send", "commit", "verify"), 0.0)
        gather = self._prepare(version)
        changed = None
        if self.config.delta:
            # Only what an engine surely holds can be left out: not after a restart behind its URL.
            whole = lacking or (self.is_first and not self.weights.hold(self._kept))
            changed = self._fingerprints.take(gather.plan, gather.params, whole=whole)
            if changed is not None and self.config.verify != "off":
                changed = self._whole_parameters(changed)
        for attempt in range(1, ATTEMPTS + 1):
            expected, failure = self._attempt(gather, version, changed, lacking, phases)
            status = self._agree(failure, version, again=not lacking and attempt < ATTEMPTS)
            if status == _OK:
                break
            # whatever the engine holds now, it gets all of it
            changed = None
            self._agree(self._heal(), version)
        metrics = {"sync/bytes": float(self._sent_bytes)}
        with _timed(phases, "verify"):
            self._agree(self._verify(expected, gather.plan), version)
            if not lacking and self.config.verify_every and self.pushes % self.config.verify_every == 0:
                metrics |= self._probe(version, gather.plan)
        if self.config.delta:
            self._fingerprints.keep()
            self._kept = version
        self.pushes += not lacking
        metrics["sync/seconds"] = time.perf_counter() - start
        metrics |= {f"sync/seconds_{phase}": seconds for phase, seconds in phases.items()}
        return metrics if self.is_first else {}

    # ---- one attempt -----------------------------------------------------------------------------

    def _prepare(self, version: int) -> Gather:
        """The plan and its buffers, made once; what cannot be right is refused before an engine is
        touched.
        """
        if self._gather is None:
            make_buffer = None
            if self._transport is None:
                self._agree(self._caught(self._make_transport) if self.is_first else None, version)
            if self.is_first:
                make_buffer = self._transport.make_buffer
            mib = self.config.bucket_mib or (512 if self.device.type == "cuda" else 24)
            gather = self.actor.gather(dtype=self.dtype, bucket_bytes=mib << 20, make_buffer=make_buffer)
            self.plans_made += 1
            self._agree(self._caught(self._make_sent_plan, gather) if self.is_first else None, version)
            self._gather = gather
        return self._gather

    def _make_sent_plan(self, gather: Gather) -> None:
        """Rank 0: buffers, and what the engines get: the plan, in fp8 if they were started from an
        fp8 checkpoint. Held against that.
        """
        plan = gather.plan
        quantization = read_hf_config(self.weights.model_path).get("quantization_config")
        if quantization:
            if self.config.verify != "off":
                raise UserError(
                    "sync.verify: SGLang gives checksums of dequantised fp8 weights, not of what is sent; set"
                    " it to off"
                )
            self._fp8 = Requantise(
                {name: dtype for name, (dtype, _) in read_headers(self.weights.model_path).items()},
                quantization,
            )
        self._sent_plan = (
            plan
            if self._fp8 is None
            else GatherPlan(tuple(self._fp8.layout(bucket) for bucket in plan.buckets))
        )
        check_shapes(self._sent_plan, self.weights.shapes, tied=bool(self.hf.get("tie_word_embeddings")))
        gather.reserve()

    def _make_transport(self) -> None:
        if self.config.transport != "disk":
            kind = GroupTransport if self.config.transport == "group" else ColocatedTransport
            self._transport = kind(self.weights, self.device, self.config.in_flight)
            self._cleanup.callback(self._transport.close)
            return
        nbytes = (
            sum(torch.Size(shape).numel() for shape in self.weights.shapes.values())
            * (self.dtype or torch.float32).itemsize
        )
        root = self._cleanup.enter_context(staging_directory(self.run_dir, 2 * nbytes, self.local_engine))
        self._transport = DiskTransport(self.weights, self.device, (root / "a", root / "b"))
        self._cleanup.callback(self._transport.close)

    def _attempt(
        self,
        gather: Gather,
        version: int,
        changed: frozenset[str] | None,
        lacking: bool,
        phases: dict[str, float],
    ) -> tuple[dict[int, EngineWeights], Exception | None]:
        """Rank 0's engines get everything; the other ranks give their pieces. Returns rank 0's
        failure, after the messages are through.
        """
        expected, failure, self._sent_bytes = {}, None, 0
        if changed is not None and not changed:
            return {}, self._caught(self.weights.restamp, version) if self.is_first else None
        with _timed(phases, "begin"):
            if self.is_first:
                expected = self._follow()
                failure = self._caught(self._check_names, self._sent_plan) or self._caught(
                    self._transport.begin, self._sent_plan, version, lacking=lacking
                )
            # nothing is put together for engines that cannot take it
            if self._status(failure) != _OK:
                return {}, failure
        sent: dict[int, PendingSend] = {}

        # the buffer of bucket index - 2 is written next
        def confirmed(index: int) -> None:
            if index - 2 in sent:
                sent.pop(index - 2).wait()

        started, last = time.perf_counter(), gather.plan.buckets[-1].index
        if changed is not None:
            last = max(b.index for b in gather.plan.buckets if b.only(changed).params)
        waited = 0.0

        def ready(index: int) -> None:
            nonlocal failure, waited
            before = time.perf_counter()
            if failure is None:
                failure = self._caught(confirmed, index)
            waited += time.perf_counter() - before

        for number, (bucket, flat) in enumerate(gather.replay(changed, ready)):
            if flat is None or failure is not None:
                # after a failure the messages that are under way are taken in all the same
                continue
            before = time.perf_counter()
            try:
                for followed in expected.values():
                    for name, tensor in bucket.views(flat).items():
                        followed.feed(name, tensor)
                if self._fp8 is not None:
                    bucket, flat = self._fp8(bucket, flat, number % 2, self._transport.make_buffer)
                sent[number] = self._transport.send(bucket, flat, last=bucket.index == last)
                self._sent_bytes += bucket.nbytes
            except Exception as error:
                # whatever it is: the other ranks are in the middle of the messages
                failure = error
            waited += time.perf_counter() - before
        before = time.perf_counter()
        for number in sorted(sent):
            failure = failure or self._caught(sent[number].wait)
        waited += time.perf_counter() - before
        phases["send"] += waited
        phases["gather"] += time.perf_counter() - started - waited
        if self.is_first:
            with _timed(phases, "commit"):
                failure = failure or self._caught(self._transport.commit, version)
        return expected, failure

    def _whole_parameters(self, changed: frozenset[str]) -> frozenset[str]:
        """With all that shares an engine's parameter with them (a stack of experts): a checksum is
        of a whole parameter.
        """
        place, params = (
            EngineWeights(self.hf, 1),
            [param for bucket in self._gather.plan.buckets for param in bucket.params],
        )
        touched = {place.parameter(part) for param in params if param.name in changed for part in param.parts}
        return frozenset(
            param.name for param in params if any(place.parameter(part) in touched for part in param.parts)
        )

    @staticmethod
    def _caught(work: object, *args: object, **kwargs: object) -> Exception | None:
        try:
            work(*args, **kwargs)
        except Exception as error:
            return error
        return None

    def _heal(self) -> Exception | None:
        """Before the next attempt: restart what died."""
        if not self.is_first:
            return None
        self._transport.cancel()
        return self._caught(self.weights.heal)

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
        """Raise on every rank what failed for good on one of them; _AGAIN when rank 0 may try once more."""
        status = self._status(failure, again=again)
        if status != _FAILED:
            return status
        if self.is_first and self._transport is not None:
            self._transport.cancel()
            self.weights.abandon_update()
        if failure is None:
            raise SyncError(
                f"weight version {version} was not pushed: another rank (most often rank 0) says why"
            )
        if isinstance(failure, Unreachable):
            raise SyncError(f"weight version {version} was not pushed: {failure}") from failure
        raise failure

    # ---- proof -----------------------------------------------------------------------------------

    def _check_names(self, plan: GatherPlan) -> None:
        """Every tensor has a parameter in the engines; looked at once per start of an engine."""
        engines = tuple(
            (engine.url, engine.incarnation) for engine in self.weights.pool.engines if engine.alive
        )
        if self.config.transport != "disk" and engines != self._checked:
            check_engine_names(plan, self.weights.checksums(), EngineWeights(self.hf, 1))
            self._checked = engines

    def _follow(self) -> dict[int, EngineWeights]:
        """What engines of each tensor-parallel size must report afterwards, taken down while the
        buckets pass by.
        """
        if self.config.verify == "off":
            return {}
        only = None
        if self.config.verify == "sample":
            names = sorted(
                {EngineWeights(self.hf, 1).parameter(name) for name in self._gather.plan.tensors()}
            )
            only = frozenset(names[self.pushes % SAMPLE :: SAMPLE])
        sizes = {engine.tp_size for engine in self.weights.pool.engines if engine.alive}
        on_cpu = self.weights.pool.engines[0].device == "cpu"
        return {size: EngineWeights(self.hf, size, only, on_cpu=on_cpu) for size in sizes}

    def _verify(self, expected: dict[int, EngineWeights], plan: GatherPlan) -> Exception | None:
        """The engines' checksums against what was sent; they are not to be trusted after a difference."""
        if not expected:
            return None
        followed = next(iter(expected.values()))
        skip = (
            []
            if followed.only is None
            else sorted({followed.parameter(name) for name in plan.tensors()} - set(followed.only))
        )
        failure = self._caught(lambda: compare_checksums(plan, expected, self.weights.checksums(skip), skip))
        if failure is not None:
            self.weights.distrust()
        return failure

    def _probe(self, version: int, plan: GatherPlan) -> dict[str, float]:
        """Compare log-probs of the probes; ProbeError on every rank when they differ by more than
        config.tolerance.
        """
        engine: list[list[float]] = []
        failure = (
            self._caught(lambda: engine.extend(self.sampler.score(ids) for ids in self.probes))
            if self.is_first
            else None
        )
        self._agree(failure, version)
        actor = [self.actor.score_tokens(ids) for ids in self.probes]
        if not self.is_first:
            self._agree(None, version)
            return {}
        difference = max_difference(actor, engine)
        in_float32 = next(iter(plan.tensors().values())).dtype is torch.float32
        # bfloat16 in one engine against float32 was seen to differ by 0.09 nats at most; that of
        # fp8 is a guess until a GPU has run it
        in_fp8 = (
            self._fp8 is not None
            or getattr(getattr(self.actor, "model_config", None), "fp8", None) is not None
        )
        tolerance = self.config.tolerance or (0.5 if in_fp8 else 1e-3 if in_float32 else 0.1)
        if not difference <= tolerance:
            failure = ProbeError(
                f"weight version {version}: engine and actor differ by {difference:.3g} nats on the probe,"
                f" more than sync.tolerance={tolerance:g}; check that rollout.engine.dtype is actor.dtype"
                " (bfloat16 needs about 0.1) and that the engine was started from model.path"
            )
            self.weights.distrust()
        self._agree(failure, version)
        return {"sync/probe_max_diff": difference}

    def close(self) -> None:
        """Leave the process group, remove pushed files; the engine must not be restarted after this."""
        self._cleanup.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    phases[phase] += time.perf_counter() - start
