"""Jobs on a real Slurm of two nodes (make test-slurm starts one, see tools/slurm_here.py),
submitted with the program's own launchers.

Proves: the script of `megasd launch slurm` and the experiment of `megasd launch nemo-run` train
over two nodes and end COMPLETED; a job that is preempted, by its time limit or by hand, saves,
is queued again by its own script, and goes on at the next step, each step once; a rank that fails
or is killed ends the job at once with its traceback or signal in the job's output; engines on a
node of their own serve a run on another. Does not prove: GPUs (the nodes have device files with
nothing behind them), containers, two machines (both nodes are this host), speed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megasd.trainer.metrics import read_metrics
from tests.launch import ROOT
from tools import make_quickstart

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
# questions, samples, response tokens: a step lasts a second or more
P, G, LONG = 8, 8, 150
SETUP = f'"source {sys.prefix}/bin/activate"'


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the quickstart's model and rows."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode:
        pytest.fail("no Slurm answers here: run these tests with make test-slurm")
    directory = tmp_path_factory.mktemp("start")
    make_quickstart.main([str(directory)])
    return directory


@dataclass
class SlurmJob:
    """A submitted job and its run directory."""

    id: str
    run: Path

    def log(self) -> str:
        path = self.run / "launch" / f"{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        return [row["step"] for row in read_metrics(path)] if path.exists() else []

    def restarts(self) -> int:
        found = re.search(r"Restarts=(\d+)", ask("scontrol", "show", "job", self.id))
        return int(found[1]) if found else 0

    def state(self) -> str:
        """squeue's word for it: PENDING, RUNNING, ...; "" once it has ended, "?" when Slurm is too
        busy to say.
        """
        done = subprocess.run(
            ["squeue", "--noheader", "--job", self.id, "--format=%T"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip() if done.returncode == 0 or "Invalid job id" in done.stderr else "?"

    def wait_for(self, what: str, is_so: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            # in this order: it may end in between
            ended = not self.state() and not is_so()
            if ended or time.monotonic() > end:
                pytest.fail(
                    f"job {self.id}: no"
                    f" {what}{'; it has ended' if ended else f' in {seconds} s'}\n{self.log()[-6000:]}"
                )
            time.sleep(0.2)

    def end(self, seconds: float = 240) -> list[str]:
        """Wait for its end; what sacct says of each start: ["COMPLETED 0:0"]."""
        limit = time.monotonic() + seconds
        while True:
            rows = ask(
                "sacct",
                "--duplicates",
                "--allocations",
                "--noheader",
                "--parsable2",
                "--job",
                self.id,
                "--format=State,ExitCode",
            )
            states = [row.replace("|", " ") for row in rows.split("\n") if row]
            if states and not self.state() and not states[-1].startswith(("PENDING", "RUNNING", "REQUEUED")):
                print(f"sacct, job {self.id}: {', '.join(states)}")
                return states
            if time.monotonic() > limit:
                pytest.fail(f"job {self.id} has not ended in {seconds} s: {states}\n{self.log()[-6000:]}")
            time.sleep(0.5)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def megasd(*arguments: str, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    """`megasd ...` as a user runs it; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "megasd.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def submit(run: Path, *items: str) -> SlurmJob:
    found = re.search(r"Submitted batch job (\d+)", megasd("launch", "slurm", *items, f"run.dir={run}"))
    assert found
    return SlurmJob(found[1], run)


@pytest.fixture(autouse=True)
def no_job_is_left():
    yield
    ask("scancel", "--user", "root")


def common() -> list[str]:
    return [
        "cluster.actor_nodes=2",
        "cluster.gpus_per_node=1",
        "cluster.time=00:10:00",
        "cluster.signal_seconds=60",
        f"cluster.setup=[{SETUP}]",
        "run.resume=auto",
        "run.export=false",
        "run.tensorboard=false",
        "checkpoint.save_at_end=false",
    ]


def sampled(start: Path) -> list[str]:
    """The quickstart with an engine: questions, answers of the random model, which rarely ends one."""
    return [
        "configs/quickstart.yaml",
        f"model.path={start}/model",
        f"data.train={start}/train.jsonl",
        "data.eval=null",
        *common(),
        f"rollout.num_prompts={P}",
        f"rollout.num_samples={G}",
        f"rollout.max_response_tokens={LONG}",
        "actor.micro_batch_size=16",
    ]


def taught(start: Path) -> list[str]:
    """The quickstart's warm-up: no engine."""
    return [
        "configs/quickstart_warmup.yaml",
        f"model.path={start}/model",
        f"data.train={start}/warmup.jsonl",
        *common(),
        "optimizer.lr_warmup_steps=0",
        "optimizer.lr_decay_style=constant",
    ]


# ---- whole runs ----------------------------------------------------------------------------------


def test_sbatch_over_two_nodes(start: Path, tmp_path: Path) -> None:
    job = submit(tmp_path / "run", *sampled(start), "run.steps=2")
    assert job.end() == ["COMPLETED 0:0"], job.log()
    assert (job.run / "summary.json").is_file() and job.steps() == [0, 1]
    nodes = ask("sacct", "--noheader", "--parsable2", "--job", f"{job.id}.0", "--format=NodeList,NTasks")
    assert nodes.strip() in ("n1-2|2", "n[1-2]|2")


# ---- preempted -----------------------------------------------------------------------------------


def assert_no_error(log: str) -> None:
    """But for torchrun's way of saying that it was told to end."""
    assert len(re.findall("Traceback", log)) == len(re.findall("SignalException: Process", log)), log
    assert not re.search(r"\w(Error|Exception): (?!Process \d+ got signal)", log), log


def tell_to_leave(job: SlurmJob, *options: str) -> None:
    """USR1 after its first step; returns when it is queued again."""
    job.wait_for("step", lambda: bool(job.steps()))
    began = time.monotonic()
    ask("scancel", "--signal=USR1", *options, job.id)
    job.wait_for("requeue", lambda: job.restarts() > 0, seconds=60)
    print(
        f"job {job.id}: saved and queued again {time.monotonic() - began:.1f} s after USR1,"
        f" {len(job.steps())} steps done"
    )
    assert json.loads((job.run / "preempted").read_text())["step"] == len(job.steps()) < 3


def assert_it_went_on(job: SlurmJob) -> None:
    assert job.end() == ["REQUEUED 0:0", "COMPLETED 0:0"], job.log()
    assert job.steps() == [0, 1, 2], job.log()
    assert (job.run / "summary.json").is_file() and not (job.run / "preempted").exists()
    assert_no_error(job.log())


def test_preempted_it_goes_on(start: Path, tmp_path: Path) -> None:
    """As sbatch's --signal=B:USR1 does it: to the batch shell."""
    job = submit(tmp_path / "run", *sampled(start), "run.steps=3", "checkpoint.every=100")
    tell_to_leave(job, "--batch")
    assert_it_went_on(job)


def test_engines_on_a_node_of_their_own(start: Path, tmp_path: Path) -> None:
    """The trainer on n1, `megasd serve` on n2. A plain scancel tells the processes of both steps to
    leave; engines are not for that.
    """
    apart = [
        "cluster.actor_nodes=1",
        "cluster.engine_nodes=1",
        "rollout.engine.served=1",
        "actor.tensor_model_parallel_size=1",
    ]
    job = submit(tmp_path / "run", *sampled(start), *apart, "run.steps=3", "checkpoint.every=100")
    tell_to_leave(job)
    assert_it_went_on(job)
    assert len(re.findall(r"engine 0 answers at http://n2:\d+", job.log())) == 2
    steps = ask(
        "sacct", "--noheader", "--parsable2", "--job", job.id, "--format=NodeList,State,ExitCode"
    ).split()
    assert sorted(steps[-2:]) == ["n1|COMPLETED|0:0", "n2|COMPLETED|0:0"], steps


def test_the_time_limit_tells_it_to_leave(start: Path, tmp_path: Path) -> None:
    """--time=2 and --signal=B:USR1@30: Slurm itself tells it. Told again, it is not queued more
    often than max_requeues.
    """
    limits = ["cluster.time=00:02:00", "cluster.signal_seconds=30", "cluster.max_requeues=1"]
    job = submit(tmp_path / "run", *taught(start), *limits, "run.steps=100000", "checkpoint.every=100000")
    job.wait_for("step", lambda: bool(job.steps()))
    began = time.monotonic()
    job.wait_for("requeue", lambda: job.restarts() > 0, seconds=150)
    print(f"queued again {time.monotonic() - began:.0f} s after its first step")
    first = len(job.steps())
    # on a busy machine Slurm is first this time
    job.wait_for("step", lambda: len(job.steps()) > first or not job.state())
    ask("scancel", "--signal=USR1", "--batch", job.id)
    assert job.end() == ["REQUEUED 0:0", "FAILED 85:0"], job.log()
    assert job.steps() == list(range(len(job.steps())))
    assert "submit the job again" in job.log()
    assert_no_error(job.log())


def test_nemo_run_over_two_nodes(start: Path, tmp_path: Path) -> None:
    """nemo-run waits for the job, which is preempted in the middle and queued again by
    nemo-run's script.
    """
    run, log = tmp_path / "run", tmp_path / "nemo.log"
    arguments = [
        "launch",
        "nemo-run",
        *taught(start),
        "run.steps=25",
        "checkpoint.every=100",
        f"run.dir={run}",
    ]
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "nemo")}
    with log.open("wb") as file:
        waiting = subprocess.Popen(
            [sys.executable, "-m", "megasd.cli", *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        job = SlurmJob("0", run)
        while not job.steps():
            assert waiting.poll() is None, log.read_text()[-6000:]
            time.sleep(0.2)
        job.id = ask("squeue", "--noheader", "--format=%A").strip()
        ask("scancel", "--signal=USR1", job.id)
        assert waiting.wait(300) == 0, log.read_text()[-6000:]
    finally:
        waiting.kill()
    assert job.end() == ["REQUEUED 0:0", "COMPLETED 0:0"], log.read_text()[-6000:]
    assert "\x1b" not in "".join(path.read_text() for path in (tmp_path / "nemo").rglob("log-*.out"))
    assert (
        "SUCCEEDED" in log.read_text() and (run / "summary.json").is_file() and job.steps() == list(range(25))
    )


# ---- failures ------------------------------------------------------------------------------------


def test_a_failing_rank_ends_the_job_with_its_traceback(start: Path, tmp_path: Path) -> None:
    """The second node has another installation: a module that the actor imports is broken there."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "safetensors.py").write_text(
        "raise RuntimeError('this node is not like the others')\n"
    )
    there = f'if [ "$SLURM_NODEID" = 1 ]; then export PYTHONPATH={tmp_path}/broken; fi'
    job = submit(tmp_path / "run", *taught(start), "run.steps=3", f"cluster.setup=[{SETUP},{there!r}]")
    states = job.end(seconds=120)
    assert len(states) == 1 and re.fullmatch(r"FAILED [1-9]\d*:0", states[0]), job.log()
    first = job.log().split("Traceback (most recent call last)")[1]
    assert "this node is not like the others" in first and "1: " in first
    assert re.search(r"exitcode\s*: 1 ", job.log()) and not (job.run / "preempted").exists()


def test_a_killed_rank_ends_the_job(start: Path, tmp_path: Path) -> None:
    """As the kernel does it when memory is short."""
    job = submit(tmp_path / "run", *taught(start), "run.steps=100000", "checkpoint.every=100000")
    job.wait_for("step", lambda: bool(job.steps()))
    os.kill(pid_of_rank(1, job), 9)
    states = job.end(seconds=120)
    assert len(states) == 1 and re.fullmatch(r"FAILED [1-9]\d*:0", states[0]), job.log()
    assert "Signal 9 (SIGKILL)" in job.log(), job.log()


def pid_of_rank(rank: int, job: SlurmJob) -> int:
    import psutil

    for process in psutil.process_iter(["environ", "cmdline"]):
        env = process.info["environ"] or {}
        if (
            env.get("RANK") == str(rank)
            and env.get("SLURM_JOB_ID") == job.id
            and "megasd.cli" in process.info["cmdline"]
        ):
            return process.pid
    raise AssertionError(f"no rank {rank}")
