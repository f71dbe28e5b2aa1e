"""Where engines run, on real SGLang servers on the CPU.

Proves: of two started engines one is killed in mid-rollout and the other goes on, nothing lost or
doubled, no two samples of a prompt alike; a whole run on engines of `megasd serve` with a key,
weights over a process group, that ends when the run does and leaves the key in no log, file or
process list; a run that samples ahead, whose engine dies and which is preempted: every question
once and in order, every batch but the first and the resumed one a step old, the engine's log-probs
those of the older weights; a router before two engines. Does not prove: GPUs, memory given back,
several machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.data.prompts import PromptIterator, load_prompts
from megasd.data.rollout_log import load_groups, rollout_path
from megasd.trainer.metrics import read_metrics
from tests.integration.test_rollout import Strike, ask, check_groups, hf_logps, make_model, make_rollout
from tests.integration.test_train import TEMPLATE, G, P, engine_of, megasd, wait_until_it_samples

# a model that tosses a coin, and its rows
from tests.integration.test_train import start as start
from tests.launch import ROOT

pytestmark = pytest.mark.nightly
KEY = "an-engine-key-0123456789"


def test_two_engines_and_the_death_of_one(tmp_path: Path) -> None:
    model, other = make_model(tmp_path / "model", 0), make_model(tmp_path / "other", 1)
    config = RolloutConfig(engine=EngineConfig(num_engines=2, start_timeout=500))
    with make_rollout(config, model, tmp_path / "run") as rollout:
        # which also sees that no two long samples are equal
        check_groups(ask(rollout, 6, 8, 40), model, 6, 8, version=0)
        assert all(engine.max_tokens and engine.busy == 0 for engine in rollout.pool.engines)
        rollout.weights.push(str(other), 3)
        dead, left = rollout.pool.engines
        strike = Strike(dead, lambda: dead.process.kill())
        strike.start()
        groups = ask(rollout, 8, 8, 300)
        strike.join()
        assert strike.in_flight > 0 and rollout.stats["retries"] > 0
        check_groups(groups, other, 8, 8, version=3)
        # waits for the one that is being started
        rollout.weights.push(str(model), 4)
        assert [engine.applied.version for engine in rollout.pool.engines] == [4, 4] and (
            dead.restarts,
            left.restarts,
        ) == (
            1,
            0,
        )
        check_groups(ask(rollout, 4, 4, 12), model, 4, 4, version=4)
    assert {path.name for path in (tmp_path / "run").glob("engine*.log")} == {"engine-0.log", "engine-1.log"}


def common(start: Path, run: Path, *arguments: str) -> list[str]:
    return [
        f"model.path={start}/warm",
        f"data.train={start}/rows.jsonl",
        TEMPLATE,
        f"rollout.num_prompts={P}",
        f"rollout.num_samples={G}",
        "rollout.max_prompt_tokens=32",
        "rollout.max_response_tokens=60",
        "reward.verifier=exact_match",
        "actor.dtype=float32",
        "actor.micro_batch_size=16",
        "optimizer.lr=1e-3",
        "optimizer.lr_warmup_steps=1",
        "run.tensorboard=false",
        f"run.dir={run}",
        *arguments,
    ]


def test_a_run_on_served_engines(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASD_ENGINE_KEY", KEY)
    run, log = tmp_path / "run", tmp_path / "train.log"
    arguments = common(
        start,
        run,
        "rollout.engine.served=1",
        "run.steps=2",
        "sync.transport=group",
        "sync.verify=full",
        "run.export=false",
    )
    command = [sys.executable, "-m", "megasd.cli", "serve", *arguments, "--host", "0.0.0.0"]
    with (tmp_path / "serve.log").open("wb") as file:
        server = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    process = megasd(*arguments, log=log)
    try:
        seen = set()
        while process.poll() is None:
            for one in psutil.Process(server.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen |= set(one.cmdline())
            time.sleep(0.5)
        assert process.returncode == 0, log.read_text()[-3000:]
        assert server.wait(300) == 0, (tmp_path / "serve.log").read_text()
    finally:
        for one in (process, server):
            if one.poll() is None:
                one.kill()
    said = (tmp_path / "serve.log").read_text()
    assert "answers at http://" in said and "the run has ended; closing the engines" in said
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["rollout/samples"] for row in rows] == [P * G] * 2 and rows[1]["sync/bytes"] > 0
    assert not list((run / "engines").glob("*-*.json"))
    assert "0.0.0.0" in seen and not any(KEY in argument for argument in seen)
    for path in [
        *run.rglob("*.log"),
        *(run / "engines").iterdir(),
        run / "config.yaml",
        tmp_path / "serve.log",
        log,
    ]:
        assert KEY not in path.read_text(errors="replace"), path


def test_a_run_that_samples_ahead(start: Path, tmp_path: Path) -> None:
    """Six steps: the engine is killed while a batch is learned and the next is sampled, and the run
    preempted later on.
    """
    run, log, steps = tmp_path / "run", tmp_path / "train.log", 6
    arguments = common(
        start,
        run,
        "rollout.overlap=1",
        f"run.steps={steps}",
        "run.resume=auto",
        "sync.transport=group",
        "checkpoint.every=1",
        "actor.tensor_model_parallel_size=2",
        "rollout.max_response_tokens=120",
    )
    process = megasd(*arguments, log=log)
    tree = []

    def wait_for(line: int) -> None:
        while not (run / "metrics.jsonl").is_file() or len(read_metrics(run / "metrics.jsonl")) < line:
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.05)

    try:
        wait_for(1)
        wait_until_it_samples(process, log)
        for part in engine_of(process):
            part.kill()
        wait_for(3)
        tree = psutil.Process(process.pid).children(recursive=True)
        for rank in tree:
            if "megasd.cli" in rank.cmdline() and "train" in rank.cmdline():
                rank.send_signal(signal.SIGTERM)
        while not (run / "preempted").is_file() and process.poll() is None:
            time.sleep(0.05)
        process.wait(300)
    finally:
        for one in [*tree, psutil.Process(process.pid)] if process.poll() is None else []:
            one.kill()
    left = json.loads((run / "preempted").read_text())["step"]
    again = megasd(*arguments, log=tmp_path / "again.log")
    assert again.wait(300) == 0, (tmp_path / "again.log").read_text()[-3000:]

    questions = PromptIterator(load_prompts(start / "rows.jsonl", max_row_bytes=10_000), P, seed=1)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(steps)) and sum(
        row["rollout/restarts"] for row in rows
    ) == 1
    for step, row in enumerate(rows):
        groups = load_groups(rollout_path(run / "rollouts", step))
        # none lost, none twice
        assert [group.prompt.id for group in groups] == [prompt.id for prompt in questions.next()]
        samples = [sample for group in groups for sample in group.samples]
        ages = [step - sample.version for sample in samples]
        assert (
            len(samples) == P * G
            and row["rollout/stale_samples"] == sum(ages)
            and row["rollout/max_staleness"] == max(ages)
        )
        assert set(ages) == {0} if step in (0, left) else set(ages) <= {0, 1}
    assert [row["rollout/stale_samples"] for row in rows].count(P * G) >= steps - 3
    # mu is of the weights that sampled (the start model), pi_old of the learner's: their ratio is
    # what TIS clips
    old = [
        sample
        for group in load_groups(rollout_path(run / "rollouts", 1))
        for sample in group.samples
        if sample.version == 0
    ]
    for sample in old[:: max(1, len(old) // 4)]:
        expected = hf_logps(start / "warm", sample.prompt_ids, sample.response_ids, 1.0)
        assert (torch.tensor(sample.response_logps) - expected).abs().max() < 1e-3
    assert rows[0]["train/rollout_gap"] < 1e-4 and rows[-1]["train/rollout_gap"] > 1e-3


def test_a_router_before_two_engines(tmp_path: Path) -> None:
    """Needs sglang-router 0.3.2, here or in the environment of MEGASD_ROUTER_PYTHON."""
    python = os.environ.get("MEGASD_ROUTER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import sglang_router"], capture_output=True).returncode:
        pytest.skip("sglang-router is not installed")
    model, other = make_model(tmp_path / "model", 0), make_model(tmp_path / "other", 1)
    port, log = 30900 + os.getpid() % 500, (tmp_path / "router.log").open("wb")
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--prometheus-port",
        str(port + 600),
        "--health-check-interval-secs",
        "2",
    ]
    router = subprocess.Popen([python, "-m", "sglang_router.launch_router", *options], stdout=log, stderr=log)
    try:
        time.sleep(5)
        engine = EngineConfig(num_engines=2, start_timeout=500, router=f"http://127.0.0.1:{port}")
        with make_rollout(RolloutConfig(engine=engine), model, tmp_path / "run") as rollout:
            check_groups(ask(rollout, 4, 4, 12), model, 4, 4, version=0)
            rollout.weights.push(str(other), 3)
            check_groups(ask(rollout, 4, 4, 12), other, 4, 4, version=3)
            first = rollout.pool.engines[0]
            strike = Strike(rollout.pool.router, lambda: first.process.kill(), first.url)
            strike.start()
            check_groups(ask(rollout, 6, 6, 200), other, 6, 6, version=3)
            strike.join()
            rollout.weights.push(str(model), 4)
            assert [one.applied.version for one in rollout.pool.engines] == [4, 4]
            check_groups(ask(rollout, 4, 4, 12), model, 4, 4, version=4)
    finally:
        router.kill()
        router.wait()
        log.close()
