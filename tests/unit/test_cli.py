"""Proves what the command line does before and around the loop: refusals in one line without torch,
the dry run, the ranks it starts, and its exit codes. The loop itself is a stand-in of a few lines
here (`megasd.train` is put in place by a sitecustomize).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config
from tests.clock import processor_seconds
from tests.unit.fake_model import write_inputs

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Seconds. A safety net: on a busy machine torchrun's agent alone may import torch for minutes.
PATIENCE = 400

STAND_IN = """
import sys, types
def main(config, stop):
    import os
    rank = os.environ.get("RANK", "none")
    {body}
train = types.ModuleType("megasd.train")
train.main = main
sys.modules["megasd.train"] = train
"""


def environment(tmp_path: Path, body: str | None = None, **extra: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    (tmp_path / "site").mkdir(exist_ok=True)
    if body is not None:
        (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN.format(body=body))
    return {
        **env,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def megasd(
    tmp_path: Path, *args: str, body: str | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megasd.cli", *args]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(tmp_path, body, **extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def assert_refused(done: subprocess.CompletedProcess[str], expected: str) -> None:
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done
    assert lines[0].startswith("megasd: ") and expected in lines[0]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["train", "--dryrun"], "unrecognized argument --dryrun"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "arguments are required: COMMAND"),
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "run.stepz=3"], "did you mean run.steps?"),
    ],
)
def test_refusals(args, expected, tmp_path):
    assert_refused(megasd(tmp_path, *args), expected)


def test_a_config_is_refused_quickly_and_before_ranks_start(tmp_path):
    """Aim: 2 s. Asserted at 5 s of the processor, which do not depend on what else the machine does."""
    start = processor_seconds()
    done = megasd(
        tmp_path,
        "train",
        *write_inputs(tmp_path),
        "actor.tensor_model_parallel_size=3",
        body="raise SystemExit(9)",
    )
    taken = processor_seconds() - start
    assert_refused(done, "actor.tensor_model_parallel_size=3: does not divide num_attention_heads=8")
    print(f"refused in {taken:.2f} s of the processor")
    assert taken < 5


def test_dry_run_prints_a_config_that_loads_and_the_plan(tmp_path):
    (tmp_path / "a.yaml").write_text("rollout: {num_prompts: 4}\nactor: {micro_batch_size: 4}\n")
    (tmp_path / "b.yaml").write_text("actor: {tensor_model_parallel_size: 2}\n")
    inputs = write_inputs(tmp_path)
    done = megasd(
        tmp_path,
        "train",
        "a.yaml",
        "--dry-run",
        "b.yaml",
        *inputs,
        "run.num_processes=4",
        body="raise SystemExit(9)",
    )
    assert done.returncode == 0 and done.stderr == "", done
    assert "# ranks        4 = TP 2 x PP 1 x CP 1 x DP 2" in done.stdout
    assert "# step         32 samples, at most 65536 tokens" in done.stdout
    assert "# rank         16 samples a step = 4 microbatches of 4" in done.stdout
    assert "checkpoints/, hf/" in done.stdout
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    config = load_config([str(tmp_path / "resolved.yaml")], [], RECIPES)
    assert (config.rollout.num_prompts, config.actor.tensor_model_parallel_size) == (4, 2)
    assert not (tmp_path / "run").exists()


def test_dry_run_takes_the_world_size_of_torchrun(tmp_path):
    done = megasd(
        tmp_path, "train", *write_inputs(tmp_path), "--dry-run", RANK="0", WORLD_SIZE="8", LOCAL_RANK="0"
    )
    assert "# ranks        8 = TP 1 x PP 1 x CP 1 x DP 8" in done.stdout
    done = megasd(
        tmp_path, "train", *write_inputs(tmp_path), "--dry-run", RANK="0", WORLD_SIZE="many", LOCAL_RANK="0"
    )
    assert_refused(done, "WORLD_SIZE='many' is not a number")


def test_one_rank_runs_here_and_its_errors_are_one_line(tmp_path):
    inputs = write_inputs(tmp_path)
    done = megasd(tmp_path, "train", *inputs, body='print("rank", rank, config.run.steps)')
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank none 100\n", "")
    body = 'from megasd.types import UserError; raise UserError("rows.jsonl:3: no answer; add one")'
    assert_refused(megasd(tmp_path, "train", *inputs, body=body), "megasd: rows.jsonl:3: no answer; add one")
    done = megasd(tmp_path, "train", *inputs, body='raise RuntimeError("a bug")')
    # a bug is not dressed up
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_ranks_are_started_and_their_refusal_is_one_line(tmp_path):
    body = 'open(rank, "w").write(os.environ["WORLD_SIZE"])'
    inputs = [*write_inputs(tmp_path), "actor.tensor_model_parallel_size=2"]
    done = megasd(tmp_path, "train", *inputs, body=body)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]

    # Rank 0 refuses; rank 1, left alone, is ended by SIGTERM and still unwinds.
    body = """from megasd.types import UserError; import time
    while rank == "0":
        if os.path.exists("ready"):
            raise UserError("rows.jsonl:3: no answer; add one")
        time.sleep(0.05)
    try:
        open("ready", "w").close()
        time.sleep(600)
    finally:
        open("closed", "w").close()"""
    assert_refused(megasd(tmp_path, "train", *inputs, body=body), "megasd: rows.jsonl:3: no answer; add one")
    assert (tmp_path / "closed").exists()


# A rank says that it has started inside of what must unwind, and goes on until it is told.
UNTIL_TOLD = """import time
    try:
        open("started" + rank, "w").close()
        time.sleep(600)
    finally:
        open("closed" + rank, "w").close()"""
# In the agent: every rank runs, and the agent is still inside of the call that started the last one.
INTERRUPTED_START = """
import os, signal, subprocess, time
class Popen(subprocess.Popen):
    def __init__(self, *args, env=None, **kwargs):
        super().__init__(*args, env=env, **kwargs)
        if env is not None and env.get("LOCAL_RANK") == "1":
            while not (os.path.exists("started0") and os.path.exists("started1")):
                time.sleep(0.05)
            signal.raise_signal(signal.SIGINT)
if "RANK" not in os.environ:
    subprocess.Popen = Popen
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupt_unwinds_every_rank(ranks, tmp_path):
    inputs = [*write_inputs(tmp_path), f"actor.tensor_model_parallel_size={ranks}"]
    command = [sys.executable, "-m", "megasd.cli", "train", *inputs]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path, UNTIL_TOLD), stderr=subprocess.PIPE, text=True
    )
    try:
        while len(list(tmp_path.glob("started*"))) < ranks:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "megasd: interrupted\n")
    assert len(list(tmp_path.glob("closed*"))) == ranks


def test_an_interrupt_while_ranks_are_started_leaves_none_behind(tmp_path):
    env = environment(tmp_path, UNTIL_TOLD)
    with (tmp_path / "site" / "sitecustomize.py").open("a") as file:
        file.write(INTERRUPTED_START)
    command = [
        sys.executable,
        "-m",
        "megasd.cli",
        "train",
        *write_inputs(tmp_path),
        "actor.tensor_model_parallel_size=2",
    ]
    # Ranks that were left behind would hold stderr open.
    done = subprocess.run(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (130, "megasd: interrupted\n")
    assert len(list(tmp_path.glob("closed*"))) == 2
