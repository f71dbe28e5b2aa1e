"""Engines of other machines: announced, taken, lost and taken again; and which of several engines is asked.

Proves, with SGLang's control endpoints as a state machine: files of an earlier start of the job and
servers that are not who was announced are left alone; requests of a dead engine go to the others at
once, and it is taken back when announced again; the least asked engine is asked; the key is sent,
told of when missing, and in no argument, log line or repr; when serving ends. Does not prove that
SGLang starts so (tests/integration/test_placement.py).
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config
from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.engine import serve
from megasd.engine.auth import VARIABLE, Secret, engine_key, protect
from megasd.engine.client import EngineClient
from megasd.engine.errors import StartError
from megasd.engine.remote import CLOSED, TRAINER, job_token, read_announcement, write_announcement
from megasd.engine.sampler import Sampler, make_sampler
from megasd.types import Prompt, UserError
from megasd.weights.hf_files import read_hf_config
from tests.tiny_weights import tiny_checkpoint
from tests.unit.engine.control_server import ControlServer

KEY = "0123456789abcdef-key"


class Node:
    """Control servers and what a `megasd serve` beside them would write."""

    def __init__(self, directory: Path, count: int) -> None:
        self.model = tiny_checkpoint(directory / "hf", "qwen3")
        self.run, self.engines = directory / "run", directory / "run" / "engines"
        self.engines.mkdir(parents=True)
        architectures = read_hf_config(self.model)["architectures"]
        self.servers = [ControlServer(architectures) for _ in range(count)]

    def announce(self, index: int, name: str, *, token: str = "job.0") -> None:
        self.servers[index].name = name
        write_announcement(
            self.engines / f"node-{self.servers[index].port}.json",
            {"url": self.servers[index].url, "name": name, "token": token},
        )

    def rollout(self, served: int, **engine: object) -> Sampler:
        config = RolloutConfig(
            engine=EngineConfig(served=served, **{"start_timeout": 120.0, **engine}), max_retries=3
        )
        return make_sampler(
            config,
            model_path=str(self.model),
            device="cpu",
            dtype="float32",
            run_dir=self.run,
            seed=1,
            stop_token_ids=[3],
            vocab_size=96,
        )


def ask(rollout: Sampler, prompts: int = 8, *, room: int = 3) -> int:
    groups = rollout.generate(
        [Prompt(id=f"q{i}", messages=[], answer="") for i in range(prompts)],
        [[1, 2]] * prompts,
        str,
        step=0,
        num_samples=1,
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=room,
    )
    return len(groups)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("MEGASD_JOB", "job.0")
    node = Node(tmp_path, 2)
    yield node
    for server in node.servers:
        server.stop()


def test_only_what_this_start_of_the_job_announced_is_taken(node: Node) -> None:
    # an earlier start's, on a port that somebody uses now
    node.announce(0, "megasd-a", token="job.-1")
    node.announce(1, "megasd-b")
    node.servers[1].name = "somebody-else"
    with pytest.raises(
        UserError,
        match=(
            r"served=1: another server answers at http://.*engines within .*start_timeout=5 s; run `megasd"
            r" serve`"
        ),
    ):
        node.rollout(1, start_timeout=5.0).pool.start()
    node.servers[1].name = "megasd-b"
    with node.rollout(1) as rollout:
        assert rollout.pool.engines[0].url == node.servers[1].url and node.servers[1].version == "0"
        assert (
            read_announcement(node.engines / TRAINER)["token"] == "job.0"
            and not (node.engines / CLOSED).exists()
        )
        assert ask(rollout) == 8
    assert read_announcement(node.engines / CLOSED)["token"] == "job.0"


def test_requests_of_a_dead_engine_go_to_the_others_and_it_is_taken_back(node: Node) -> None:
    node.announce(0, "megasd-a")
    node.announce(1, "megasd-b")
    with node.rollout(2) as rollout:
        dead, port = node.servers[0], node.servers[0].port
        threading.Timer(0.05, dead.stop).start()
        dead.fail["/generate"] = lambda body: asyncio.sleep(300)
        engine = next(engine for engine in rollout.pool.engines if engine.url == dead.url)
        why_dead, asked = engine.why_dead, threading.Event()

        async def sure_at_last() -> str | None:
            while not asked.is_set():
                await asyncio.sleep(0.01)
            return await why_dead()

        engine.why_dead = sure_at_last
        # before anybody is sure of a death
        assert ask(rollout) == 8
        asked.set()
        assert node.servers[1].asked == 8
        # it takes some seconds to be sure
        while engine.alive:
            time.sleep(0.05)
        node.servers[0] = ControlServer(dead.architectures, port)
        # `megasd serve` has started it again
        node.announce(0, "megasd-c")
        deadline = time.monotonic() + 120
        while not engine.up and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (
            engine.answers_as == "megasd-c"
            and engine.applied.version == 0
            and node.servers[0].version == "0"
            and engine.restarts == 1
        )
        assert ask(rollout) == 8 and node.servers[0].asked > 0


def test_a_push_does_not_wait_for_an_engine_that_nobody_announces_again(node: Node) -> None:
    node.announce(0, "megasd-a")
    node.announce(1, "megasd-b")
    with node.rollout(2, start_timeout=60, max_restarts=2) as rollout:
        dead, port = node.servers[0], node.servers[0].port
        dead.fail["/generate"] = lambda body: dead._loop.create_task(dead._runner.cleanup()) and (500, {})
        assert ask(rollout) == 8
        engine = next(engine for engine in rollout.pool.engines if engine.url == dead.url)
        while engine.alive:
            time.sleep(0.05)
        # more often than it may be restarted
        for version in range(1, 5):
            began = time.monotonic()
            rollout.weights.push(str(node.model), version)
            # half of the start_timeout that it would wait for
            assert time.monotonic() - began < 30 and not engine.alive
            assert ask(rollout) == 8
        node.servers[0] = ControlServer(dead.architectures, port)
        # at the same URL
        node.announce(0, "megasd-c")
        deadline = time.monotonic() + 120
        while not engine.up and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.applied.version == 4 and engine.answers_as == "megasd-c" and engine.restarts == 1


def test_the_engine_that_is_asked_least_is_asked(node: Node) -> None:
    node.announce(0, "megasd-a")
    node.announce(1, "megasd-b")

    # until the other one has done its share
    async def slow(body: dict) -> None:
        deadline = time.monotonic() + 120
        while node.servers[1].asked < 9 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    node.servers[0].fail["/generate"] = slow
    with node.rollout(2) as rollout:
        rollout.config.max_concurrency = 2
        # long answers: a sample a request, two at a time
        assert ask(rollout, 12, room=3000) == 12
        assert node.servers[0].asked <= 3 <= 9 <= node.servers[1].asked
        assert [engine.busy for engine in rollout.pool.engines] == [0, 0]


def test_every_engine_gives_its_memory_back_and_takes_it_again_around_the_weights(node: Node) -> None:
    node.announce(0, "megasd-a")
    node.announce(1, "megasd-b")
    told: list[list[tuple[str, tuple[str, ...]]]] = [[], []]
    for server, heard in zip(node.servers, told, strict=True):
        for path in ("/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_disk"):
            server.fail[path] = lambda body, path=path, heard=heard: heard.append(
                (path.split("_")[0], tuple(body.get("tags", ())))
            )
    with node.rollout(2, release_memory=True) as rollout:
        for heard in told:
            heard.clear()
        rollout.weights.release()
        # twice is once: a second one would kill SGLang
        rollout.weights.release()
        assert all(not engine.up for engine in rollout.pool.engines)
        rollout.weights.push(str(node.model), 1)
        assert (
            told
            == [
                [
                    ("/release", ("kv_cache", "weights")),
                    ("/resume", ("weights",)),
                    ("/update", ()),
                    ("/resume", ("kv_cache",)),
                ]
            ]
            * 2
        )
        assert ask(rollout) == 8


def test_one_that_hangs_is_condemned(node: Node) -> None:
    node.announce(0, "megasd-a")
    node.announce(1, "megasd-b")
    with node.rollout(2, progress_timeout=0.3) as rollout:
        hung = next(server for server in node.servers if server.url == rollout.pool.engines[0].url)
        fine, tokens = next(server for server in node.servers if server is not hung), itertools.count()
        hung.fail["/generate"] = lambda body: asyncio.sleep(300)
        hung.fail["/v1/loads"] = lambda body: (200, {"loads": []})
        # however long it takes
        fine.fail["/v1/loads"] = lambda body: (200, {"loads": [{"num_used_tokens": next(tokens)}]})
        assert ask(rollout) == 8
        deadline = time.monotonic() + 120
        while not (marks := list(node.engines.glob("*.condemned"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [path.name for path in marks] == [f"{hung.name}.condemned"]
        assert "no token in 0.3 s" in serve.died(
            EngineClient(
                EngineConfig(),
                url=hung.url,
                model_path="m",
                device="cpu",
                dtype="float32",
                log_path=node.engines,
                seed=1,
            ),
            marks[0],
        )


def test_the_key(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for server in node.servers:
        server.key = KEY
    node.announce(0, "megasd-a")
    with pytest.raises(UserError, match=f"answered 401: set {VARIABLE} to the key"):
        node.rollout(1, start_timeout=5.0).pool.start()
    monkeypatch.setenv(VARIABLE, KEY)
    with node.rollout(1) as rollout:
        assert ask(rollout) == 8
    engine = EngineClient(
        EngineConfig(), model_path="m", device="cuda", dtype="float32", log_path=node.run, seed=1
    )
    engine.url = "http://127.0.0.1:1"
    assert KEY not in " ".join(engine.command()) and "megasd.engine.sglang_with_key" in engine.command()
    arguments = type("Arguments", (), {"api_key": None})()
    protect(arguments)
    assert (
        arguments.api_key == KEY
        and KEY not in repr({"api_key": arguments.api_key})
        and isinstance(engine_key(), Secret)
    )
    for bad in ("short", "with a space in it, long enough"):
        monkeypatch.setenv(VARIABLE, bad)
        with pytest.raises(UserError, match=f"{VARIABLE} must be 16 or more") as caught:
            engine_key()
        assert bad not in str(caught.value)


def test_where_started_engines_run() -> None:
    """Ports, GPUs, seeds and logs of several; whatever the actor's parallelism."""
    settings = EngineConfig(
        num_engines=2, tensor_parallel_size=2, port=31000, mem_fraction_static=0.4, release_memory=True
    )
    engines = [
        EngineClient(
            settings, index=i, model_path="m", device="cuda", dtype="bfloat16", log_path=Path("l"), seed=5
        )
        for i in range(2)
    ]
    commands = []
    for engine in engines:
        engine.url = "http://127.0.0.1:1"
        commands.append(engine.command())
    for i, command in enumerate(commands):
        value = dict(zip(command, command[1:], strict=False))
        assert (value["--base-gpu-id"], value["--tensor-parallel-size"], value["--mem-fraction-static"]) == (
            str(2 * i),
            "2",
            "0.4",
        )
        assert "--enable-memory-saver" in command
    # equal seeds would give equal samples
    assert len({engine.seed for engine in engines}) == 2
    assert engines[1]._choose_port() == 31001


@pytest.mark.parametrize("flag", ["--tp-size=2", "--dp-size", "--pp-size", "--nnodes"])
def test_flags_that_no_weights_could_follow_are_refused_at_the_start(flag: str, tmp_path: Path) -> None:
    settings = EngineConfig(extra_args=[flag, "2"])
    engine = EngineClient(
        settings, model_path="m", device="cpu", dtype="float32", log_path=tmp_path / "log", seed=1
    )
    with pytest.raises(
        UserError, match=rf"extra_args: {flag.split('=')[0]} is not to be given here; set rollout.engine\."
    ):
        engine.launch()


def test_who_may_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "hf", "qwen3")
    config = load_config([], [f"model.path={model}", "data.train=d", f"run.dir={tmp_path}/run"], RECIPES)
    with pytest.raises(
        UserError, match=f"--host 10.0.0.1: SGLang lets in whoever reaches it; set {VARIABLE}"
    ):
        serve.make_engines(config, host="10.0.0.1", count=1)
    monkeypatch.setenv(VARIABLE, KEY)
    engines = serve.make_engines(config, host="10.0.0.1", count=2)
    assert [engine.config.host for engine in engines] == ["10.0.0.1"] * 2 and len(
        {engine.log_path for engine in engines}
    ) == 2
    with pytest.raises(UserError, match="holds no config.json on this machine"):
        serve.make_engines(
            replace(config, model=replace(config.model, path="nowhere")), host="127.0.0.1", count=1
        )


class Failing(EngineClient):
    """One that cannot start."""

    def launch(self) -> None:
        raise StartError("no memory is left")


@pytest.mark.parametrize("others", [0, 1])
def test_an_engine_that_cannot_start_ends_it(node: Node, others: int) -> None:
    common = dict(
        model_path=str(node.model), device="cpu", dtype="float32", log_path=node.run / "log", seed=1
    )
    engines = [
        Failing(EngineConfig(), **common),
        *[EngineClient(EngineConfig(), url=node.servers[0].url, **common) for _ in range(others)],
    ]
    with pytest.raises(StartError, match="no memory is left"):
        asyncio.run(serve.serve(engines, node.engines))
    assert not list(node.engines.glob("*.json"))


def test_a_lost_engine_is_told_of_and_a_silent_run_is_no_success(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = dict(
        model_path=str(node.model), device="cpu", dtype="float32", log_path=node.run / "log", seed=1
    )
    lost, lives = (
        Failing(EngineConfig(), **common),
        EngineClient(EngineConfig(), url=node.servers[0].url, **common),
    )
    # it did once
    lost.answers_as = "megasd-x"
    write_announcement(node.engines / TRAINER, {"token": "job.0", "beat": "1"})
    monkeypatch.setattr(serve, "PATIENCE", 0.8)
    assert asyncio.run(serve.serve([lost, lives], node.engines)) == 1
    assert "no memory is left; the others go on" in capsys.readouterr().out


def test_when_serving_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGASD_JOB", "SLURM_JOB_ID", "SLURM_HET_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    write_announcement(tmp_path / CLOSED, {"token": "", "beat": "old"})
    write_announcement(tmp_path / TRAINER, {"token": "", "beat": "old-1"})
    watch = serve.Watch(tmp_path)
    monkeypatch.setattr(serve, "PATIENCE", 0.0)
    # an earlier run's
    assert watch.ended() is None and watch.ended() is None
    write_announcement(tmp_path / TRAINER, {"token": "", "beat": "new-1"})
    assert watch.ended() is not None or (time.sleep(0.01), watch.ended())[1].startswith(
        "the run has given no sign of life"
    )
    write_announcement(tmp_path / CLOSED, {"token": "", "beat": "new"})
    assert watch.ended() == "the run has ended"

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job_token() == "7.0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert job_token() == "7.2"
    # of the start before the requeue
    write_announcement(tmp_path / CLOSED, {"token": "7.1", "beat": "x"})
    assert serve.Watch(tmp_path).ended() is None
    # this start's run failed before the engines were up
    write_announcement(tmp_path / CLOSED, {"token": "7.2", "beat": "x"})
    assert serve.Watch(tmp_path).ended() == "the run has ended"


def test_it_starts_where_megatron_is_not() -> None:
    """The engines' environment of docker has SGLang, omegaconf and this package."""
    absent = ("megatron", "transformer_engine", "pyarrow", "math_verify")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import megasd.engine.serve"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
