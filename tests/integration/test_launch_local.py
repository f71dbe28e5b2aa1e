"""`megasd launch nemo-run --executor local` for real: nemo-run's LocalExecutor starts torchrun,
torchrun two ranks, these a real engine.

Proves: a short job runs to its end with exit code 0; SIGUSR1 to the launcher and SIGTERM to
torchrun in the middle of a run save it, and the next launch goes on at the next step, none twice
and none left out. The time from the signal to the saved checkpoint is printed. Does not prove:
Slurm (make test-slurm), several machines, a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megasd.preemption import EXIT_PREEMPTED, PREEMPTED_MARKER
from tests.clock import Clock

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.nightly
STEPS = 60
# Seconds from the signal to the saved checkpoint, on a machine that does nothing else.
AIM = 10.0


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nemo_run")
    directory = tmp_path_factory.mktemp("launch")
    subprocess.run(
        [sys.executable, ROOT / "tools" / "make_quickstart.py", directory / "start"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return directory


def launch(start: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    """The launcher, under way; its output in <name>.log."""
    overrides = {
        "model.path": start / "start" / "model",
        "data.train": start / "start" / "train.jsonl",
        "data.eval": "null",
        "rollout.num_prompts": 8,
        "rollout.engine.max_total_tokens": 16384,
        "actor.micro_batch_size": 64,
        "optimizer.lr_warmup_steps": 2,
        "cluster.gpus_per_node": 2,
        "cluster.job_name": name,
        "run.dir": start / name,
        "run.steps": steps,
        "run.export": "false",
        "run.tensorboard": "false",
    }
    command = [
        sys.executable,
        "-m",
        "megasd.cli",
        "launch",
        "nemo-run",
        "configs/quickstart.yaml",
        "--executor",
        "local",
    ]
    environment = {
        **os.environ,
        "NEMORUN_HOME": str(start / "nemo"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (start / f"{name}.log").open("ab") as log:
        arguments = [*command, *(f"{key}={value}" for key, value in overrides.items())]
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


def steps_done(start: Path, name: str) -> list[int]:
    path = start / name / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(process: subprocess.Popen[bytes], start: Path, name: str, steps: int) -> None:
    deadline = time.monotonic() + 700
    while len(steps_done(start, name)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, (start / f"{name}.log").read_text()[
            -4000:
        ]
        time.sleep(0.2)


def agents(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any(Path(word).name == "torchrun" for word in child.cmdline()[:2])]


@pytest.mark.timeout(900)
def test_runs_to_the_end(start: Path) -> None:
    process = launch(start, "whole", 4)
    assert process.wait(timeout=800) == 0, (start / "whole.log").read_text()[-4000:]
    assert steps_done(start, "whole") == [0, 1, 2, 3]
    assert json.loads((start / "whole" / "summary.json").read_text())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "number, to_launcher", [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["USR1", "TERM"]
)
def test_preempted_and_launched_again(start: Path, number: signal.Signals, to_launcher: bool) -> None:
    name = f"left-{number.name}"
    process = launch(start, name, STEPS)
    wait_for_steps(process, start, name, 3)
    target = psutil.Process(process.pid) if to_launcher else agents(process)[0]
    clock, marker = Clock(), start / name / PREEMPTED_MARKER
    target.send_signal(number)
    began = time.monotonic()
    while not marker.exists() and process.poll() is None:
        time.sleep(0.05)
    taken, in_time = time.monotonic() - began, clock.within(4 * AIM)
    assert process.wait(timeout=300) == EXIT_PREEMPTED, (start / f"{name}.log").read_text()[-4000:]
    done = steps_done(start, name)
    print(f"{number.name}: saved {taken:.1f} s after the signal, after step {done[-1]}")
    assert 2 <= done[-1] < STEPS - 1 and in_time

    again = launch(start, name, done[-1] + 3)
    assert again.wait(timeout=600) == 0, (start / f"{name}.log").read_text()[-4000:]
    assert steps_done(start, name) == list(range(done[-1] + 3))
    assert not (start / name / PREEMPTED_MARKER).exists()
