"""What is known of the engines when answers are lost, late or refused in the middle of a push.

Proves, with a state machine of SGLang's control endpoints in its place: an engine that was
restarted behind its URL gets everything, also under sync.delta; one that comes back after dying in
a push serves again; two that lost their weights are served by one push; a refusal is told as it was
said; nothing waits for ever, and what cannot be right is refused every time. Does not prove that
SGLang answers so (tests/integration/test_push.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megasd.config.schema import EngineConfig, RolloutConfig, SyncConfig
from megasd.engine.errors import EngineError
from megasd.engine.sampler import make_sampler
from megasd.models.param_table import global_params
from megasd.types import Prompt
from megasd.weight_sync.sync import WeightSync
from megasd.weights.export import plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.tiny_weights import local_params, tiny_checkpoint
from tests.unit.engine.control_server import ControlServer, once

NORM = "decoder.final_layernorm.weight"


class TensorActor:
    """An actor that is nothing but its parameters."""

    is_fp8 = False

    def __init__(self, model: Path) -> None:
        self.hf, self.params = (
            read_hf_config(model),
            global_params(local_params(read_hf_config(model), tp_size=1)),
        )
        load_hf(self.params, model, tp_rank=0, tp_size=1)

    def gather(
        self, *, dtype: torch.dtype | None, bucket_bytes: int, make_buffer: Callable[[int], torch.Tensor]
    ) -> Gather:
        return Gather(
            plan_of(self.params, self.hf, bucket_bytes=bucket_bytes, dtype=dtype),
            self.params,
            make_buffer=make_buffer,
        )

    def score_tokens(self, ids: list[int]) -> list[float]:
        return [-1.0] * (len(ids) - 1)


class Pushes:
    """Servers, the rollout that reaches them, and a WeightSync that has pushed version 1."""

    def __init__(self, model: Path, count: int, **config: object) -> None:
        self.model, architectures = model, read_hf_config(model)["architectures"]
        self.servers = [ControlServer(architectures) for _ in range(count)]
        engine = EngineConfig(urls=[server.url for server in self.servers])
        self.rollout = make_sampler(
            RolloutConfig(engine=engine, max_retries=2),
            model_path=str(model),
            device="cpu",
            dtype="float32",
            run_dir=model.parent,
            seed=1,
            stop_token_ids=[3],
            vocab_size=96,
        )
        self.rollout.pool.start()
        self.actor = TensorActor(model)
        settings = SyncConfig(**{"transport": "colocated", "verify_every": 0, **config})
        self.sync = WeightSync(
            self.actor, self.rollout, settings, model.parent, model_path=str(model), probes=[[1, 2, 3]]
        )
        # no model behind the endpoints
        self.sync._prepare(1).sender._check_names = lambda: None
        self.sync.push(1)

    @property
    def held(self) -> list[int | None]:
        return [engine.applied.version for engine in self.rollout.pool.engines]

    def restarted(self, index: int) -> None:
        self.servers[index] = ControlServer(self.servers[index].architectures, self.servers[index].port)

    def generate(self, prompts: int = 4) -> list[int]:
        """Versions of the samples; a restarted engine is given the weights of `version` again, as
        Run does it.
        """
        version, self.asked = self.rollout.weights.version, 0

        def repush() -> None:
            self.asked += 1
            self.sync.push(version, lacking=True)

        with self.rollout.pool.push_requests.served_by(repush):
            groups = self.rollout.generate(
                [Prompt(id=f"q{i}", messages=[], answer="") for i in range(prompts)],
                [[1, 2]] * prompts,
                str,
                step=0,
                num_samples=1,
                temperature=1.0,
                top_p=1.0,
                max_response_tokens=3,
            )
        return [sample.version for group in groups for sample in group.samples]


@pytest.fixture
def pushes(tmp_path: Path) -> Iterator[Callable[..., Pushes]]:
    made: list[Pushes] = []

    def make(count: int, **config: object) -> Pushes:
        made.append(Pushes(tiny_checkpoint(tmp_path / "hf", "qwen3"), count, **config))
        return made[-1]

    yield make
    for one in made:
        one.sync.close()
        one.rollout.pool.close()
        for server in one.servers:
            server.stop()


def test_a_url_that_dies_in_a_push_and_comes_back_serves_again(pushes: Callable[..., Pushes]) -> None:
    two = pushes(2)

    def die(body: dict) -> tuple[int, dict]:
        threading.Thread(target=two.servers[0].stop).start()
        return 500, {"message": "dying"}

    two.servers[0].fail["/update_weights_from_tensor"] = die
    two.sync.push(2)
    assert two.held == [None, 2] and not two.rollout.pool.engines[0].alive
    two.restarted(0)
    assert set(two.generate()) == {2} and two.held == [2, 2] and two.asked == 1
    two.sync.push(3)
    assert two.held == [3, 3]


def test_one_push_serves_all_engines_that_lost_their_weights(pushes: Callable[..., Pushes]) -> None:
    two = pushes(2)
    for server in two.servers:
        server.restart()
        server.fail["/generate"] = once((500, {"message": "gone"}))
    assert set(two.generate()) == {1} and two.held == [1, 1] and two.asked <= 2


def test_a_refusal_is_told_as_it_was_said(pushes: Callable[..., Pushes]) -> None:
    two = pushes(2)
    two.servers[0].restart()
    two.servers[0].fail["/generate"] = once((500, {"message": "gone"}))

    async def refuse(body: dict) -> tuple[int, dict]:
        await asyncio.sleep(0.3)
        return 400, {"message": "the true reason"}

    two.servers[1].fail["/generate"] = refuse
    push = two.sync.push
    two.sync.push = lambda *args, **kwargs: (time.sleep(0.6), push(*args, **kwargs))
    with pytest.raises(EngineError, match="the true reason"):
        two.generate(2)


def test_a_directory_is_loaded_again_while_aborted_requests_leave(pushes: Callable[..., Pushes]) -> None:
    one = pushes(1)
    said = "Weights were updated, but the cache was not flushed because requests are still running or queued."
    asked: list[str] = []

    def refuse(body: dict) -> tuple[int, dict] | None:
        asked.append(body["weight_version"])
        return (400, {"success": False, "message": said}) if len(asked) < 3 else None

    one.servers[0].fail["/update_weights_from_disk"] = refuse
    one.rollout.weights.push(str(one.model), 7)
    assert asked == ["7"] * 3 and one.held == [7] and one.servers[0].version == "7"
    one.servers[0].fail["/update_weights_from_disk"] = lambda body: (
        400,
        {"success": False, "message": "no such file"},
    )
    with pytest.raises(EngineError, match="no such file"):
        one.rollout.weights.push(str(one.model), 8)


def test_delta_sends_everything_to_an_engine_that_was_restarted(pushes: Callable[..., Pushes]) -> None:
    one = pushes(1, delta=True)
    whole = one.sync._prepared.gather.plan.nbytes
    one.actor.params[NORM].mul_(2)
    assert one.sync.push(2)["sync/bytes"] == 128
    assert one.sync.push(3)["sync/bytes"] == 0 and one.servers[0].version == "3"
    one.servers[0].restart()
    one.actor.params[NORM].mul_(2)
    assert one.sync.push(4)["sync/bytes"] == whole and one.servers[0].version == "4"
    one.servers[0].restart()
    # nothing has changed, and it has nothing
    assert one.sync.push(5)["sync/bytes"] == whole and one.servers[0].version == "5"


def test_delta_sends_everything_to_an_engine_that_came_back_in_between(pushes: Callable[..., Pushes]) -> None:
    two = pushes(2, delta=True, verify_every=1, tolerance=100.0)
    two.servers[0].stop()
    pool = two.rollout.pool
    pool.call(pool.health.revive(pool.engines[0], pool.engines[0].incarnation))
    assert not pool.engines[0].alive
    two.restarted(0)
    # the probe finds it again
    two.sync.push(2)
    two.actor.params[NORM].mul_(2)
    assert two.sync.push(3)["sync/bytes"] == two.sync._prepared.gather.plan.nbytes and two.held == [3, 3]


def test_a_refused_session_leaves_the_old_version_serving(pushes: Callable[..., Pushes]) -> None:
    one = pushes(1)
    one.servers[0].fail["/begin_weight_update"] = once((400, {"message": "one is open"}))
    with pytest.raises(EngineError, match="another push is under way"):
        one.sync.push(2)
    assert one.held == [1] and not one.servers[0].paused and one.generate() == [1] * 4
    one.sync.push(2)
    assert one.held == [2]


def test_a_lost_answer_to_the_end_is_healed(pushes: Callable[..., Pushes]) -> None:
    one = pushes(1)

    def lost(body: dict) -> tuple[int, dict]:
        del one.servers[0].fail["/end_weight_update"]
        one.servers[0].session = False
        return 500, {"message": "the answer is lost"}

    one.servers[0].fail["/end_weight_update"] = lost
    one.sync.push(2)
    assert one.held == [2] and one.generate() == [2] * 4


def test_samples_taken_beside_a_push_do_not_drop_an_engine(pushes: Callable[..., Pushes]) -> None:
    two = pushes(2)

    asked = threading.Event()

    async def slow(body: dict) -> None:
        asked.set()
        await asyncio.sleep(0.3)

    async def slower(body: dict) -> None:
        await asyncio.sleep(1)

    for server in two.servers:
        server.fail["/generate"] = slow
    two.servers[1].fail["/end_weight_update"] = slower
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(two.generate()))
    thread.start()
    assert asked.wait(120)
    two.sync.push(2)
    thread.join(120)
    assert two.held == [2, 2] and set(found[0]) <= {1, 2}


def test_what_was_refused_once_is_refused_again(pushes: Callable[..., Pushes], tmp_path: Path) -> None:
    one = pushes(1)
    again = WeightSync(
        one.actor, one.rollout, one.sync.config, tmp_path, model_path=str(one.model), probes=[]
    )
    one.rollout.weights.shapes["model.norm.weight"] = (999,)
    for version in (2, 3):
        with pytest.raises(EngineError, match="model.norm.weight"):
            again.push(version)
    assert one.held == [1]
