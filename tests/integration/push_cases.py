"""Live weight pushes from 4 gloo ranks into real SGLang servers; run by test_push.py under torchrun.

push_cases.py ROOT: ROOT/dense and ROOT/moe hold models. Three servers (dense with tensor parallel
size 1 and 2, MoE with 1) are started once; the fleets that are pushed to reach them by URL. Rank 0
prints "ok ..." lines with the figures it saw.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor.actor import Actor
from megasd.actor.parallel import broadcast_tensors, init_distributed, init_model_parallel
from megasd.batch.batch import Batch
from megasd.config.schema import EngineConfig, RolloutConfig, SyncConfig
from megasd.engine.answers import versions_of
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError
from megasd.engine.sampler import Sampler, make_sampler
from megasd.types import Group, Prompt
from megasd.weight_sync.sender import SAMPLE
from megasd.weight_sync.sync import SyncError, WeightSync
from tests.distributed.golden_cases import make_config
from tests.launch import generating

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
# nats
TOLERANCE = 1e-3
PROMPTS = [[4, 55, 17, 90, 2, 5], [4, *range(20, 60), 2, 5], [91, 80, 81, 0, 3]]
TOKENS = 16
# of 4 ranks; the rest is data parallelism
LAYOUTS = {"TP2": {TP: 2}, "PP2": {PP: 2}, "TP2 x PP2": {TP: 2, PP: 2}}
CHANGED = "model.layers.1.mlp.up_proj.weight"


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"ok {text}", flush=True)


def compare(actor: Actor, rollout: Sampler | None) -> float:
    """Every engine's greedy tokens are those the actor holds most likely; returns the largest
    difference of their log-probs (nats).
    """
    worst = 0.0
    engines = int(broadcast_tensors({"n": torch.tensor(len(rollout.pool.engines))} if rollout else None)["n"])
    for index in range(engines):
        for prompt in PROMPTS:
            found = None
            if rollout is not None:
                with only(rollout, index):
                    ids, logps = rollout.greedy(prompt, TOKENS)
                found = {"ids": torch.tensor(ids), "logps": torch.tensor(logps)}
            engine = broadcast_tensors(found)
            none = torch.zeros(0, dtype=torch.int64)
            batch = Batch(
                prompt_ids=torch.tensor(prompt),
                prompt_lens=torch.tensor([len(prompt)]),
                context_ids=none,
                context_lens=torch.tensor([[0]]),
                response_ids=engine["ids"],
                response_lens=torch.tensor([len(engine["ids"])]),
                question_weight=torch.ones(1, dtype=torch.float64),
                question_size=torch.ones(1, dtype=torch.int64),
                scored=torch.ones(1, dtype=torch.bool),
            )
            scored = actor.score(batch, top_k=1)
            # the last pipeline stage
            if scored:
                wanted = scored["ids"][:, 0]
                assert torch.equal(wanted, engine["ids"]), (
                    f"actor {wanted.tolist()}, engine {engine['ids'].tolist()}"
                )
                worst = max(worst, (scored["logp"] - engine["logps"]).abs().max().item())
    largest = torch.tensor(worst)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    assert largest < TOLERANCE, largest
    return largest.item()


@contextmanager
def only(rollout: Sampler, index: int) -> Iterator[None]:
    engines = rollout.pool.engines
    every, engines[:] = list(engines), [engines[index]]
    try:
        yield
    finally:
        engines[:] = every


@torch.no_grad()
def disturb(actor: Actor, seed: int) -> None:
    """Other weights, the same on every copy of a parameter: each is scaled, and its rows rolled
    (within this rank's part).
    """
    for name, param in sorted(actor.params().items()):
        factor = (
            1
            + 0.2
            * torch.rand(
                (), generator=torch.Generator().manual_seed(seed + len(name) + sum(map(ord, name)))
            ).item()
        )
        param.copy_(param.roll(1 + seed % 3, 0) * factor)


def make_actor(model: Path, layout: dict[str, int], device: torch.device) -> Actor:
    config = make_config(str(model), layout)
    return Actor(config, init_model_parallel(config.actor, device, seed=1))


def make_sync(actor: Actor, rollout: Sampler | None, root: Path, model: Path, **config: object) -> WeightSync:
    settings = SyncConfig(**{"tolerance": TOLERANCE, "verify": "full", "bucket_mib": 1, **config})
    return WeightSync(actor, rollout, settings, root / "run", model_path=str(model), probes=PROMPTS)


def failed(sync: WeightSync, version: int, *words: str) -> None:
    """The push fails on every rank; rank 0 says why."""
    message = None
    try:
        sync.push(version)
    except (SyncError, RuntimeError) as error:
        message = str(error)
    everywhere = torch.tensor([message is not None], dtype=torch.int32)
    dist.all_reduce(everywhere)
    assert everywhere.item() == dist.get_world_size(), f"only {everywhere.item()} ranks raised"
    if dist.get_rank() == 0:
        assert all(word in message for word in words), message
    say(f"refused: {message}")


# ---- the cases -----------------------------------------------------------------------------------


def layouts(root: Path, rollout: Sampler | None, device: torch.device) -> None:
    """Each layout, each transport, two engines of different tensor-parallel sizes at once."""
    version = 0
    for name, layout in LAYOUTS.items():
        actor = make_actor(root / "dense", layout, device)
        for transport in ("disk", "group", "colocated"):
            with make_sync(actor, rollout, root, root / "dense", transport=transport) as sync:
                for seed in range(2):
                    version += 1
                    disturb(actor, 7 * version + seed)
                    sync.push(version)
                assert sync.plans_made == 1
                say(
                    f"{name} {transport}: two pushes, every checksum equal, greedy tokens equal, log-probs"
                    f" {compare(actor, rollout):.1e}"
                )


def experts(root: Path, rollout: Sampler | None, device: torch.device) -> None:
    actor = make_actor(root / "moe", {EP: 2}, device)
    for version, transport in enumerate(("group", "colocated", "disk")):
        with make_sync(actor, rollout, root, root / "moe", transport=transport) as sync:
            disturb(actor, version)
            sync.push(version)
            say(
                f"EP2 {transport}: every checksum equal, greedy tokens equal, log-probs"
                f" {compare(actor, rollout):.1e}"
            )


def sample(root: Path, rollout: Sampler | None, actor: Actor) -> None:
    """Every parameter's turn comes, and one that differs is found in its turn."""
    with make_sync(
        actor, rollout, root, root / "dense", transport="colocated", verify="sample", verify_every=0
    ) as sync:
        sync.push(90)
        if rollout is not None:
            Spoiled(
                sync,
                -1,
                lambda tensors: tensors[CHANGED].view(-1)[:1].add_(1) if CHANGED in tensors else None,
            )
        caught = 0
        for version in range(91, 91 + SAMPLE):
            try:
                sync.push(version)
            except (SyncError, RuntimeError) as error:
                caught += 1
                assert dist.get_rank() != 0 or "layers.1.mlp.gate_up_proj.weight" in str(error), error
                # the turn is over
                sync.pushes += 1
        assert caught == 1, caught
        say("sample: one corrupted parameter found in eight pushes")


def delta(root: Path, rollout: Sampler | None, actor: Actor) -> None:
    """Only what has changed travels; nothing changed: only the stamp."""
    with make_sync(actor, rollout, root, root / "dense", transport="group", delta=True) as sync:
        whole = sync.push(100)
        with torch.no_grad():
            for name, param in actor.params().items():
                if name == "decoder.layers.1.mlp.linear_fc2.weight":
                    param.mul_(1.1)
        part, none = sync.push(101), sync.push(102)
        worst = compare(actor, rollout)
        if rollout is not None:
            sizes = [int(m["sync/bytes"]) for m in (whole, part, none)]
            assert sizes[1] == 4 * 128 * 256 and sizes[2] == 0, sizes
            say(f"delta: {sizes} bytes, log-probs {worst:.1e}")


class Met:
    """Requests that the next push meets: `sample` is started when the push is about to pause the
    engines, and its requests get no further before it has: the schedulers of `owned` are frozen
    until they have been told.

    `requests`: those in flight then; `held`: per accepted output, the weight versions of its tokens.
    """

    def __init__(self, rollout: Sampler, owned: list[Sampler], sample: Callable[[], list[Group]]) -> None:
        self.rollout, self.sample, self.requests, self.paused = rollout, sample, 0, 0
        family = [
            child
            for one in owned
            for child in psutil.Process(one.pool.engines[0].process.pid).children(recursive=True)
        ]
        self.schedulers = [process for process in family if "scheduler" in process.name()]
        assert len(self.schedulers) == sum(engine.tp_size for engine in rollout.pool.engines)
        self.held: list[list[int]] = []
        rollout.weights.open_update = self

    def __call__(self, version: int, mode: str, **kwargs: object) -> list[EngineClient]:
        # once
        del self.rollout.weights.open_update
        self.rollout._why_rejected = self.why_rejected
        self.running = ThreadPoolExecutor(1).submit(self.sample)
        for engine in self.rollout.pool.engines:
            while not generating(engine.url):
                assert not self.running.done(), "all requests had ended before the push"
                time.sleep(0.01)
        for scheduler in self.schedulers:
            scheduler.suspend()
        self.requests = sum(engine.in_flight for engine in self.rollout.pool.engines)
        # waits for them
        if mode == "drain":
            self.thaw()
        for engine in self.rollout.pool.engines:
            engine.request = partial(self.request, engine.request)
        try:
            return self.rollout.weights.open_update(version, mode, **kwargs)
        finally:
            self.thaw()
            for engine in self.rollout.pool.engines:
                del engine.request

    async def request(
        self, request: Callable[..., Any], method: str, path: str, *args: Any, **kwargs: Any
    ) -> Any:
        answer = asyncio.ensure_future(request(method, path, *args, **kwargs))
        if path == "/pause_generation":
            # One that retracts is answered when the scheduler has been written to; one that aborts,
            # when all have left.
            await asyncio.wait({answer}, timeout=3)
            self.paused += 1
            if self.paused == len(self.rollout.pool.engines):
                self.thaw()
        return await answer

    def why_rejected(self, output: dict[str, Any], oldest: int) -> str | None:
        reason = type(self.rollout)._why_rejected(self.rollout, output, oldest)
        if reason is None:
            self.held.append(versions_of(output))
        return reason

    def result(self) -> list[Group]:
        groups = self.running.result(timeout=1200)
        del self.rollout._why_rejected
        return groups

    def thaw(self) -> None:
        for scheduler in self.schedulers:
            scheduler.resume()


def in_flight(
    root: Path, rollout: Sampler | None, actor: Actor, first_version: int, owned: list[Sampler]
) -> None:
    """64 requests run when the push comes: none is lost, and what holds tokens of two versions says so."""
    prompts = [Prompt(id=f"p{i}", messages=[], answer="") for i in range(32)]
    for number, (mode, allow_stale) in enumerate(
        (("retract", True), ("retract", False), ("abort", False), ("drain", False))
    ):
        version = first_version + number
        with make_sync(actor, rollout, root, root / "dense", transport="colocated", in_flight=mode) as sync:
            disturb(actor, version)
            met = None
            if rollout is not None:
                rollout.config.allow_stale = allow_stale
                met = Met(
                    rollout,
                    owned,
                    lambda: rollout.generate(
                        prompts,
                        [[4, 10 + i, 17, 2] for i in range(32)],
                        str,
                        step=0,
                        num_samples=2,
                        temperature=1.0,
                        top_p=1.0,
                        max_response_tokens=200,
                    ),
                )
            sync.push(version)
            if rollout is not None:
                groups, stats = met.result(), rollout.stats
                assert met.requests >= 2, met.requests
                samples = [sample for group in groups for sample in group.samples]
                assert len(samples) == 64 and all(sample.response_ids for sample in samples)
                versions = sorted({sample.version for sample in samples})
                assert set(versions) <= {version - 1, version}, versions
                assert stats["retries"] == stats["restarts"] == 0, stats
                assert sorted(sample.version for sample in samples) == sorted(min(held) for held in met.held)
                if mode == "retract":
                    # They go on with the new weights, and are kept: no older than the call that
                    # asked, and marked so.
                    assert any(set(held) == {version - 1, version} for held in met.held), met.held
                    assert not stats["stale"] and not stats["aborted"], stats
                if mode == "abort":
                    assert stats["aborted"] > 0, stats
                if mode == "drain":
                    assert versions == [version - 1] and not stats["stale"] and not stats["aborted"], (
                        versions,
                        stats,
                    )
                both = sum(len(set(held)) == 2 for held in met.held)
                say(
                    f"64 requests, {mode}, allow_stale {allow_stale}: versions {versions}, of both {both},"
                    f" {stats}"
                )
            compare(actor, rollout)


class Spoiled:
    """A transport whose `send` does something else at a bucket."""

    def __init__(self, sync: WeightSync, at: int, change: Callable[[dict[str, Tensor]], None]) -> None:
        self.at, self.change, self.seen = at, change, 0
        self.inner = sync._prepared.sender.transport
        sync._prepared.sender.transport = self

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def send(self, bucket: object, flat: Tensor, *, last: bool) -> object:
        self.seen += 1
        # -1: every bucket
        if self.at in (self.seen, -1):
            self.change(bucket.views(flat))
        return self.inner.send(bucket, flat, last=last)


def faults(root: Path, rollout: Sampler | None, actor: Actor) -> None:
    """A corrupted tensor, a name that the engine lacks, two pushes at once: each is named, and the
    next push heals.
    """
    first = rollout is not None
    for transport in ("group", "colocated", "disk"):
        with make_sync(actor, rollout, root, root / "dense", transport=transport) as sync:
            sync.push(200)

            def corrupt(tensors: dict[str, Tensor]) -> None:
                if CHANGED in tensors:
                    tensors[CHANGED][0, 0] += 1

            if first:
                whole = sync._prepared.sender.transport
                Spoiled(sync, -1, corrupt)
            failed(sync, 201, "layers.1.mlp.gate_up_proj.weight", CHANGED, "does not hold what was sent")
            if first:
                sync._prepared.sender.transport = whole
                try:
                    rollout.score(PROMPTS[0])
                except EngineError as error:
                    assert "push again" in str(error)
                else:
                    raise AssertionError("an engine with a corrupted tensor answered")
            sync.push(202)
            compare(actor, rollout)
    with make_sync(actor, rollout, root, root / "dense", transport="group") as sync:
        sync.push(203)
        # an engine that lacks a name: here the actor sends one more than it has
        if first:
            plan, sync._prepared.sender.checked_engines = sync._prepared.gather.plan, ()
            bucket = plan.buckets[0]
            entry = next(iter(bucket.tensors.values()))
            bucket.tensors["model.layers.0.mlp.extra.weight"] = entry
        failed(sync, 204, "has no parameter model.layers.0.mlp.extra.weight")
        if first:
            del bucket.tensors["model.layers.0.mlp.extra.weight"]
            # nothing was sent: the old version serves
            assert rollout.weights.version == 203 and rollout.score(PROMPTS[0])
        sync.push(204)
        if first:
            guest = make_sampler(
                RolloutConfig(engine=EngineConfig(urls=[e.url for e in rollout.pool.engines])),
                **common(root / "dense", root),
            )
            # do not load the start weights into a server in use
            engines = guest.pool.engines
            stranger, engines[:] = list(engines), []
            guest.pool.start()
            engines[:] = stranger
            guest.pool.call(ready(stranger))
            guest.weights.open_update(9, "retract")
        failed(sync, 205, "another push is under way")
        if first:
            guest.weights.close_update(9)
            guest.pool.close()
        sync.push(206)
        held = [sync._lock.acquire()]
        failed(sync, 207, "another push is under way" if not first else "under way")
        sync._lock.release()
        assert held
        sync.push(207)
        say(f"healed: log-probs {compare(actor, rollout):.1e}")


async def ready(engines: list) -> None:
    for engine in engines:
        await engine.wait_ready()


def death(root: Path, owned: Sampler | None, actor: Actor) -> None:
    """The engine dies when a part of the weights has been sent: it is restarted and gets all of
    them, and both versions are whole.
    """
    for version, transport in enumerate(("colocated", "group"), start=300):
        with make_sync(actor, owned, root, root / "dense", transport=transport) as sync:
            disturb(actor, version)
            if owned is not None:
                owned.config.engine.max_restarts += 1
            sync._prepare(version)
            if owned is not None:

                def kill(_: dict[str, Tensor]) -> None:
                    for process in psutil.Process(owned.pool.engines[0].process.pid).children(recursive=True):
                        process.kill()
                    psutil.Process(owned.pool.engines[0].process.pid).kill()
                    owned.pool.engines[0].process.wait()

                Spoiled(sync, 2, kill)
            start = time.perf_counter()
            sync.push(version)
            worst = compare(actor, owned)
            if owned is not None:
                assert (
                    owned.pool.engines[0].applied.version == version
                    and owned.pool.engines[0].restarts == version - 299
                )
                taken = time.perf_counter() - start
                say(
                    f"killed in the middle of a push by {transport}: healed after {taken:.0f} s, log-probs"
                    f" {worst:.1e}"
                )


def rest(root: Path, owned: Sampler | None, actor: Actor) -> None:
    """Memory is given back twice (the second time nothing is asked), nothing is sampled meanwhile,
    and a push brings all back.
    """
    for version, transport in enumerate(("group", "disk"), start=400):
        with make_sync(
            actor, owned, root, root / "dense", transport=transport, delta=transport == "group"
        ) as sync:
            sync.push(version)
            sync.release()
            sync.release()
            if owned is not None:
                try:
                    owned.score(PROMPTS[0])
                except EngineError as error:
                    assert "push" in str(error)
                else:
                    raise AssertionError("an engine without memory answered")
            pushed = sync.push(version)
            if owned is not None:
                assert pushed["sync/bytes"] > 1e6 and not owned.pool.engines[0].applied.released
            say(f"memory released and resumed by {transport}: log-probs {compare(actor, owned):.1e}")


def common(model: Path, run_dir: Path) -> dict:
    return {
        "model_path": str(model),
        "device": "cpu",
        "dtype": "float32",
        "run_dir": run_dir,
        "seed": 1,
        "stop_token_ids": [3],
        "vocab_size": 96,
    }


def main(root: Path) -> None:
    device = init_distributed()
    owned, fleets = [], [None, None]
    try:
        if dist.get_rank() == 0:
            for name, model, size in (("one", "dense", 1), ("two", "dense", 2), ("moe", "moe", 1)):
                config = RolloutConfig(
                    engine=EngineConfig(tensor_parallel_size=size, max_total_tokens=40_000)
                )
                owned.append(make_sampler(config, **common(root / model, root / name)))
                owned[-1].pool.launch()
            for rollout in owned:
                rollout.pool.wait_ready()
            urls = [[rollout.pool.engines[0].url for rollout in part] for part in (owned[:2], owned[2:])]
            models = (root / "dense", root / "moe")
            fleets = [
                make_sampler(RolloutConfig(engine=EngineConfig(urls=u)), **common(m, root))
                for u, m in zip(urls, models, strict=True)
            ]
            for fleet in fleets:
                fleet.pool.start()
        start = time.perf_counter()
        layouts(root, fleets[0], device)
        actor = make_actor(root / "dense", {TP: 2}, device)
        sample(root, fleets[0], actor)
        delta(root, fleets[0], actor)
        in_flight(root, fleets[0], actor, 103, owned[:2])
        faults(root, fleets[0], actor)
        death(root, owned[0] if owned else None, actor)
        rest(root, owned[0] if owned else None, actor)
        experts(root, fleets[1], device)
        say(f"all: {time.perf_counter() - start:.0f} s")
    finally:
        for rollout in [fleet for fleet in fleets if fleet] + owned:
            threading.Thread(target=rollout.pool.close).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
