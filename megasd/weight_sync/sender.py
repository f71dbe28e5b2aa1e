"""One rank's part in bringing whole buckets of weights into the engines, and in the proof of it.

Rank 0 has an EngineSender: it knows the engines, the transport, and what was sent. The other ranks
have an IdleSender, since they only give their pieces of each bucket to rank 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megasd.config.schema import SyncConfig
from megasd.engine.pool_weights import InFlight, PoolWeights
from megasd.engine.sampler import Sampler
from megasd.types import UserError
from megasd.weight_sync.colocated_transport import ColocatedTransport
from megasd.weight_sync.disk_transport import DiskTransport
from megasd.weight_sync.engine_checksums import EngineWeights
from megasd.weight_sync.group_transport import GroupTransport
from megasd.weight_sync.staging import staging_directory
from megasd.weight_sync.transport import PendingSend, Transport
from megasd.weight_sync.verify import check_engine_names, check_shapes, compare_checksums
from megasd.weights.block_fp8 import Requantise
from megasd.weights.gather_plan import Bucket, GatherPlan
from megasd.weights.hf_files import read_hf_config
from megasd.weights.safetensors_headers import read_headers

# sync.verify=sample: one parameter in so many, the next ones at the next push
SAMPLE = 8


class BucketSender(Protocol):
    """What a push needs of a rank's sender. Every call may raise on rank 0; none is collective."""

    @property
    def sent_bytes(self) -> int:
        """Bytes sent in this attempt."""

    @property
    def in_fp8(self) -> bool:
        """Whether the engines hold fp8 weights."""

    def all_hold(self, version: int) -> bool:
        """Whether every living engine holds this version whole."""

    def begin(self, version: int, *, lacking: bool, turn: int) -> None:
        """Start an attempt: the engines are ready to take buckets. turn: pushes so far."""

    def confirm(self, index: int) -> None:
        """Wait until the engines have copied the bucket with this index."""

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> None:
        """Send a whole bucket, uint8 [bucket.nbytes]; `flat` must stay until it is confirmed."""

    def confirm_all(self) -> None:
        """Wait until the engines have copied every bucket."""

    def commit(self, version: int) -> None:
        """End the attempt: the engines go on with `version`."""

    def restamp(self, version: int) -> None:
        """Give the engines' weights a new version, when no parameter has changed since the last push."""

    def heal(self) -> None:
        """After a failed attempt that is tried again: restart dead engines."""

    def abandon(self) -> None:
        """After the last attempt failed."""

    def verify(self) -> None:
        """Compare the engines' checksums with what was sent; VerifyError for a difference."""

    def score(self, probes: Sequence[list[int]]) -> list[list[float]]:
        """The engines' log-probs (nats) of each probe; [] on ranks without engines."""

    def distrust(self) -> None:
        """The engines were found to compute something else: none is asked before the next push."""

    def release(self) -> None:
        """The engines free their memory until the next push."""


class IdleSender:
    """The sender of a rank without engines: it does nothing."""

    sent_bytes = 0
    in_fp8 = False

    def all_hold(self, version: int) -> bool:
        """True: this rank knows of no engine that does not."""
        return True

    def begin(self, version: int, *, lacking: bool, turn: int) -> None:
        """Does nothing."""

    def confirm(self, index: int) -> None:
        """Does nothing."""

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> None:
        """Never called: whole buckets are on rank 0."""

    def confirm_all(self) -> None:
        """Does nothing."""

    def commit(self, version: int) -> None:
        """Does nothing."""

    def restamp(self, version: int) -> None:
        """Does nothing."""

    def heal(self) -> None:
        """Does nothing."""

    def abandon(self) -> None:
        """Does nothing."""

    def verify(self) -> None:
        """Does nothing."""

    def score(self, probes: Sequence[list[int]]) -> list[list[float]]:
        """No engine, no log-probs."""
        return []

    def distrust(self) -> None:
        """Does nothing."""

    def release(self) -> None:
        """Does nothing."""


class EngineSender:
    """Rank 0's sender: buckets of `plan` through a transport into the engines of `sampler`.

    hf: config.json of the actor's model. It has the methods of BucketSender, documented there.
    """

    def __init__(
        self,
        sampler: Sampler,
        transport: Transport,
        plan: GatherPlan,
        config: SyncConfig,
        hf: dict[str, Any],
    ) -> None:
        """UserError or VerifyError for a plan that the engines cannot take; nothing is sent before."""
        self.sampler, self.transport, self.plan, self.config, self.hf = sampler, transport, plan, config, hf
        self.weights = sampler.weights
        self.requantise = _fp8_of(self.weights, config)
        # what the engines get
        self.sent_plan = plan
        if self.requantise is not None:
            self.sent_plan = GatherPlan(tuple(self.requantise.layout(bucket) for bucket in plan.buckets))
        check_shapes(self.sent_plan, self.weights.shapes, tied=bool(hf.get("tie_word_embeddings")))
        # (URL, incarnation) of the engines whose parameters' names were compared with the plan's
        self.checked_engines: tuple[tuple[str, int], ...] = ()
        self._start_attempt({})

    def _start_attempt(self, expected: dict[int, EngineWeights]) -> None:
        # checksums by tensor-parallel size, made while the buckets pass by
        self._expected = expected
        self._sent: dict[int, PendingSend] = {}
        # buckets sent; fp8 buckets take turns in two buffers
        self._num_sent = 0
        self.sent_bytes = 0

    @property
    def in_fp8(self) -> bool:
        """Whether the engines were started from an fp8 checkpoint."""
        return self.requantise is not None

    def all_hold(self, version: int) -> bool:
        """Asks every living engine."""
        return self.weights.hold(version)

    # ---- an attempt ------------------------------------------------------------------------------

    def begin(self, version: int, *, lacking: bool, turn: int) -> None:
        """Compare the names of tensors, then pause the engines or open a file."""
        self._start_attempt(self._followed_weights(turn))
        self._check_names()
        self.transport.begin(self.sent_plan, version, lacking=lacking)

    def confirm(self, index: int) -> None:
        """Wait for the bucket that was sent as number `index`, once."""
        if index in self._sent:
            self._sent.pop(index).wait()

    def send(self, bucket: Bucket, flat: Tensor, *, last: bool) -> None:
        """Follow its checksums, make it fp8 if need be, and give it to the transport."""
        for followed in self._expected.values():
            for name, tensor in bucket.views(flat).items():
                followed.feed(name, tensor)
        index = self._num_sent
        if self.requantise is not None:
            bucket, flat = self.requantise(bucket, flat, index % 2, self.transport.make_buffer)
        self._sent[index] = self.transport.send(bucket, flat, last=last)
        self._num_sent += 1
        self.sent_bytes += bucket.nbytes

    def confirm_all(self) -> None:
        """Wait for every bucket that was not confirmed yet."""
        for index in sorted(self._sent):
            self._sent[index].wait()

    def commit(self, version: int) -> None:
        """The transport ends the update, and each engine names `version`."""
        self.transport.commit(version)

    def restamp(self, version: int) -> None:
        """Send the version alone."""
        self._start_attempt({})
        self.weights.restamp(version)

    def heal(self) -> None:
        """Break off the transport, and restart what died."""
        self.transport.cancel()
        self.weights.heal()

    def abandon(self) -> None:
        """Break off the transport; engines that were begun stay paused until the next push."""
        self.transport.cancel()
        self.weights.abandon_update()

    def release(self) -> None:
        """Idle engines free weights and KV cache."""
        self.weights.release()

    # ---- proof -----------------------------------------------------------------------------------

    def _check_names(self) -> None:
        """Every tensor has a parameter in the engines; compared once per start of an engine."""
        living = [engine for engine in self.weights.pool.engines if engine.alive]
        engines = tuple((engine.url, engine.incarnation) for engine in living)
        if self.config.transport != "disk" and engines != self.checked_engines:
            check_engine_names(self.sent_plan, self.weights.checksums(), EngineWeights(self.hf, 1))
            self.checked_engines = engines

    def _followed_weights(self, turn: int) -> dict[int, EngineWeights]:
        """By tensor-parallel size: the checksums that such an engine must report afterwards, still empty."""
        if self.config.verify == "off":
            return {}
        only = None
        if self.config.verify == "sample":
            only = frozenset(self._engine_names()[turn % SAMPLE :: SAMPLE])
        engines = self.weights.pool.engines
        sizes = {engine.tp_size for engine in engines if engine.alive}
        on_cpu = engines[0].device == "cpu"
        return {size: EngineWeights(self.hf, size, only, on_cpu=on_cpu) for size in sizes}

    def _engine_names(self) -> list[str]:
        """The engines' parameters, sorted."""
        place = EngineWeights(self.hf, 1)
        return sorted({place.parameter(name) for name in self.plan.tensors()})

    def verify(self) -> None:
        """After a difference the engines are not asked for samples before the next push."""
        if not self._expected:
            return
        only = next(iter(self._expected.values())).only
        skip = [] if only is None else [name for name in self._engine_names() if name not in only]
        try:
            compare_checksums(self.plan, self._expected, self.weights.checksums(skip), skip)
        except Exception:
            self.weights.distrust()
            raise

    def score(self, probes: Sequence[list[int]]) -> list[list[float]]:
        """One request a probe."""
        return [self.sampler.score(ids) for ids in probes]

    def distrust(self) -> None:
        """The engines are not asked for samples before the next push."""
        self.weights.distrust()


def _fp8_of(weights: PoolWeights, config: SyncConfig) -> Requantise | None:
    """How buckets become fp8, if the engines were started from an fp8 checkpoint.

    UserError if the push would be verified by checksums.
    """
    quantization = read_hf_config(weights.model_path).get("quantization_config")
    if not quantization:
        return None
    if config.verify != "off":
        raise UserError(
            "sync.verify: SGLang gives checksums of dequantised fp8 weights, not of what is sent; set"
            " it to off"
        )
    stored = {name: dtype for name, (dtype, _) in read_headers(weights.model_path).items()}
    return Requantise(stored, quantization)


# what sync.transport names, but for "disk", which also needs directories
LIVE_TRANSPORTS: dict[str, Callable[[PoolWeights, torch.device, InFlight], Transport]] = {
    "group": GroupTransport,
    "colocated": ColocatedTransport,
}


def make_transport(
    weights: PoolWeights,
    config: SyncConfig,
    *,
    run_dir: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    local_engine: bool,
    cleanup: contextlib.ExitStack,
) -> Transport:
    """The transport that sync.transport names; `cleanup` closes it and removes its files.

    local_engine: the engine runs on this machine, so a file may lie in shared memory; else it lies
    in run_dir. dtype: of the engines' weights; None = float32.
    """
    if config.transport == "disk":
        numel = sum(math.prod(shape) for shape in weights.shapes.values())
        nbytes = numel * (dtype or torch.float32).itemsize
        root = cleanup.enter_context(staging_directory(run_dir, 2 * nbytes, local_engine))
        transport: Transport = DiskTransport(weights, device, (root / "a", root / "b"))
    else:
        transport = LIVE_TRANSPORTS[config.transport](weights, device, config.in_flight)
    cleanup.callback(transport.close)
    return transport
