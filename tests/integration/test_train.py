"""Whole runs through the command line: Megatron under TP 2 on gloo, a real SGLang server, and what
lies in the run directory afterwards.

Proves: a run's files, lines and table; every push reaches the engine, checksum for checksum; the
engine's death in the middle of a rollout loses and doubles no sample, and the new one gets the
weights from the actor's ranks; a run that is preempted saves within 10 s and goes on at the
next step with the same questions; 7 + 6 + 7 steps with two resumes are the same numbers, bit for
bit, as 20 in one go; a checkpoint of TP 2 goes on under TP 1, DP 2 and PP 2. Does not prove: that
anything is learned (make quickstart), CUDA, several machines.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from megasd.data.chat import Chat
from megasd.data.prompts import PromptIterator, load_prompts
from megasd.data.rollout_log import load_groups, rollout_path, save_groups
from megasd.trainer.metrics import read_metrics
from megasd.types import Group, Prompt, Sample, Verdict
from tests.launch import ROOT, generating, torchrun
from tests.metric_names import documented
from tools import make_quickstart

P, G, STEPS = 8, 8, 4
# response tokens: a rollout lasts some seconds
LONG = 120
WARM_STEPS = 35
TEMPLATE = "algorithm.teacher.template={prompt}({solution})"


def megasd(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """`megasd train` as a user starts it; its output goes to `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "megasd.cli", "train", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen[bytes], log: Path, timeout: float = 1200) -> str:
    """Wait for exit 0; returns the output. Whatever happens, no process of the run is left."""
    tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                child.kill()
            process.wait()
    text = log.read_text()
    assert code == 0, f"exit code {code}:\n{text[-4000:]}"
    assert not psutil.wait_procs(tree, timeout=120)[1]
    return text


def train(*arguments: str, log: Path) -> str:
    return finish(megasd(*arguments, log=log), log)


# ---- models and rows -----------------------------------------------------------------------------


def write_rows(path: Path, numbers: range) -> None:
    rows = [{"id": f"row-{i}", "prompt": f"{i % 7}+{i}=", "answer": str(i % 7 + i)} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def teach_to_toss(model: torch.nn.Module, chat: Chat, prompts: list[Prompt]) -> None:
    """A model that answers right, wrong, or endlessly: most questions are informative, and rollouts last."""
    sequences, lens = [], []
    for prompt in prompts:
        start = chat.encode_prompt(prompt.messages)
        right, wrong, endless = (
            chat.encode_response(prompt.answer),
            chat.encode_response("x"),
            chat.encode_response("~" * 12)[:-1],
        )
        for answer in (right, right, wrong, endless):
            sequences.append(torch.tensor(start + answer))
            lens.append(len(start))
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    places = torch.arange(ids.shape[1])
    inside = (places >= torch.tensor(lens)[:, None]) & (
        places < torch.tensor([len(s) for s in sequences])[:, None]
    )
    labels = torch.where(inside, ids, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(WARM_STEPS):
        logits = model(ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        loss = losses.sum() / inside.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ (the quickstart's, random), warm/ (it tosses a coin), small/ (two layers, for
    pipelines), rows.jsonl, held_out.jsonl.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("start")
    for name in ("model", "warm", "small"):
        make_quickstart.write_tokenizer(directory / name)
    make_quickstart.write_model(directory / "model", seed=1)
    write_rows(directory / "rows.jsonl", range(14))
    # rows it knows
    write_rows(directory / "held_out.jsonl", range(4))

    warm = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    teach_to_toss(
        warm, Chat(directory / "model"), load_prompts(directory / "rows.jsonl", max_row_bytes=10_000)
    )
    warm.save_pretrained(directory / "warm")

    small = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "hidden_size": 64}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory / "model", **small)
    ).float().save_pretrained(directory / "small")
    return directory


# ---- one job, and the death of its engine --------------------------------------------------------


@dataclass
class Job:
    """A finished run of 4 steps, whose engine was killed in the rollout of step 1 (the second)."""

    run: Path
    output: str
    # processes of the engine
    killed: int


def engine_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The SGLang server under a run, and its children."""
    family = psutil.Process(process.pid).children(recursive=True)
    servers = [p for p in family if "megasd.engine.sglang_cpu" in arguments_of(p)]
    found = {p.pid: p for server in servers for p in [server, *server.children(recursive=True)]}
    return list(found.values())


def arguments_of(process: psutil.Process) -> list[str]:
    """Empty for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_until_it_samples(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the engine of a run is at work on requests, by its own word."""
    while True:
        assert process.poll() is None, log.read_text()
        for part in engine_of(process):
            options = arguments_of(part)
            if "--port" in options and generating(f"http://127.0.0.1:{options[options.index('--port') + 1]}"):
                return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def job(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("job")
    run, log = directory / "run", directory / "run.log"
    arguments = [
        f"model.path={start}/warm",
        f"data.train={start}/rows.jsonl",
        f"data.eval={start}/held_out.jsonl",
        TEMPLATE,
        f"rollout.num_prompts={P}",
        f"rollout.num_samples={G}",
        "rollout.max_prompt_tokens=32",
        f"rollout.max_response_tokens={LONG}",
        "rollout.max_concurrency=32",
        "reward.verifier=exact_match",
        "evaluation.num_samples=2",
        "evaluation.max_response_tokens=4",
        "actor.dtype=float32",
        "actor.micro_batch_size=16",
        "actor.tensor_model_parallel_size=2",
        # a restarted engine can have the weights from the actor alone
        "sync.transport=group",
        "sync.verify=full",
        "optimizer.lr=1e-4",
        "optimizer.lr_warmup_steps=2",
        f"run.steps={STEPS}",
        f"run.dir={run}",
    ]
    process = megasd(*arguments, log=log)
    engine: list[psutil.Process] = []
    try:
        while (
            process.poll() is None
            and not (run / "metrics.jsonl").is_file()
            or not (run / "metrics.jsonl").read_text()
        ):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        # the line of step 0 is its last act: it is step 1 that samples now
        wait_until_it_samples(process, log)
        engine = engine_of(process)
        for part in engine:
            part.kill()
        assert not rollout_path(run / "rollouts", 1).exists(), "killed too late"
    finally:
        output = finish(process, log)
    # of the second engine
    assert not [p for p in psutil.process_iter(["cmdline"]) if f"{start}/warm" in (p.info["cmdline"] or [])]
    return Job(run, output, len(engine))


def test_the_run_directory(job: Job) -> None:
    from transformers import AutoModelForCausalLM

    names = {path.name for path in job.run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "rollouts",
        "checkpoints",
        "hf",
        "engine.log",
    }
    assert not any(name.startswith(".") or name == "weights" for name in names)
    assert {path.name for path in (job.run / "rollouts").iterdir()} == {
        *(f"step-{step:06d}.jsonl" for step in range(STEPS)),
        "eval-step-000000.jsonl",
        f"eval-step-{STEPS:06d}.jsonl",
    }
    assert [path.name for path in (job.run / "checkpoints").iterdir()] == [f"step-{STEPS}"]
    assert any((job.run / "tensorboard").glob("events.out.tfevents.*"))
    summary = json.loads((job.run / "summary.json").read_text())
    assert list(summary) == ["before", "after", "seconds", "steps", "commit"]
    assert summary["steps"] == STEPS and set(summary["before"]) == set(summary["after"]) >= {
        "mean_at_k",
        "maj_at_k",
    }
    model = AutoModelForCausalLM.from_pretrained(job.run / "hf", dtype=torch.float32)
    ids = torch.tensor([Chat(job.run / "hf").encode_prompt([{"role": "user", "content": "3+3="}])])
    assert torch.isfinite(model(ids).logits).all()


def test_lines_and_table(job: Job) -> None:
    lines = job.output.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step + 1}/{STEPS}" for step in range(STEPS)]
    assert all(
        word in line
        for line in steps
        for word in ("pass", "informative", "loss", "gnorm", "tok/s", "rollout", "train", "sync")
    )
    assert [line.split()[0] for line in lines if "held-out" in line or "@2" in line] == [
        "held-out",
        "mean@2",
        "maj@2",
    ]
    assert str(job.run) in lines[-1]
    assert "Traceback" not in job.output and "Warning" not in job.output
    rows = read_metrics(job.run / "metrics.jsonl")
    assert not {name for row in rows for name in row} - documented(), "explain them in docs/metrics.md"
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert (
            row["weight/informative_questions"] > 0 and row["train/loss"] > 0 and row["train/grad_norm"] > 0
        )
        assert 0 <= row["sync/probe_max_diff"] < 1e-3 and row["train/rollout_gap"] < 1e-3
        assert abs(row["train/tis"] - 1) < 1e-3


def test_the_resolved_config_starts_the_same_run(job: Job, tmp_path: Path) -> None:
    again = tmp_path / "again.log"
    printed = train(str(job.run / "config.yaml"), "run.overwrite=true", "--dry-run", log=again)
    config = "".join(line + "\n" for line in printed.splitlines() if not line.startswith("#"))
    assert config == (job.run / "config.yaml").read_text().replace("overwrite: false", "overwrite: true")
    printed = train(str(job.run / "config.yaml"), "run.resume=auto", "run.steps=9", "--dry-run", log=again)
    assert "run          9 steps" in printed


def test_a_dead_engine_costs_no_sample(job: Job) -> None:
    """The whole SGLang tree was killed with requests in flight. Of every step P x G samples, each
    once, none of other weights.
    """
    rows = read_metrics(job.run / "metrics.jsonl")
    assert job.killed >= 2
    assert [row["rollout/restarts"] for row in rows] == [0, 1, 0, 0]
    assert rows[1]["rollout/retries"] > 0
    for step in range(STEPS):
        groups = load_groups(rollout_path(job.run / "rollouts", step))
        samples = [sample for group in groups for sample in group.samples]
        assert len(samples) == P * G and len(groups) == P
        assert len({(sample.prompt_id, sample.index) for sample in samples}) == P * G
        assert {sample.version for sample in samples} == {step}
        assert rows[step]["rollout/samples"] == P * G


# ---- preemption -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, ranks",
    [(signal.SIGUSR1, 2), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.nightly)],
)
def test_told_to_leave_it_saves_and_goes_on(
    number: signal.Signals, ranks: int, start: Path, tmp_path: Path
) -> None:
    """The signal reaches `megasd train` (under 2 ranks: torchrun's agent) while step 1 is sampled;
    then the same command again.
    """
    run, log = tmp_path / "run", tmp_path / "run.log"
    arguments = [
        f"model.path={start}/warm",
        f"data.train={start}/rows.jsonl",
        TEMPLATE,
        "run.resume=auto",
        "run.export=false",
        f"rollout.num_prompts={P}",
        f"rollout.num_samples={G}",
        "rollout.max_prompt_tokens=32",
        f"rollout.max_response_tokens={LONG}",
        "rollout.max_concurrency=32",
        "reward.verifier=exact_match",
        "actor.dtype=float32",
        "actor.micro_batch_size=16",
        f"actor.tensor_model_parallel_size={ranks}",
        "run.steps=3",
        f"run.dir={run}",
    ]
    process = megasd(*arguments, log=log)
    tree: list[psutil.Process] = []
    try:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        wait_until_it_samples(process, log)
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        began = time.monotonic()
        while not (run / "preempted").is_file() and process.poll() is None:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        assert process.wait(300) == 85, log.read_text()
    finally:
        for child in [*tree, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    print(
        f"{number.name}, {ranks} ranks: saved after {seconds:.1f} s, gone after"
        f" {time.monotonic() - began:.1f} s"
    )
    assert "saved step 1" in log.read_text() and "Traceback" not in log.read_text()
    # it did not wait for the samples
    assert not rollout_path(run / "rollouts", 1).exists()
    assert json.loads((run / "preempted").read_text()) == {"step": 1, "signal": int(number)}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    assert not psutil.wait_procs(tree, timeout=120)[1]

    train(*arguments, log=log)
    assert not (run / "preempted").exists()
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]
    batches = PromptIterator(load_prompts(start / "rows.jsonl", max_row_bytes=10_000), P, seed=1)
    for step in range(3):
        assert [group.prompt.id for group in load_groups(rollout_path(run / "rollouts", step))] == [
            p.id for p in batches.next()
        ]


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose rollouts/ hold 20 steps of right and wrong answers, as an engine would
    have sampled them.
    """
    directory = tmp_path_factory.mktemp("replayed")
    chat, rng = Chat(start / "small"), random.Random(0)
    batches = PromptIterator(load_prompts(start / "rows.jsonl", max_row_bytes=10_000), P, seed=1)
    for step in range(20):
        groups = []
        for prompt in batches.next():
            group = Group(prompt)
            for index in range(4):
                right = rng.random() < 0.5
                text = prompt.answer if right else str(rng.randrange(100, 10 ** rng.randint(3, 9)))
                ids = chat.encode_response(text)
                group.samples.append(
                    Sample(
                        prompt.id,
                        index,
                        chat.encode_prompt(prompt.messages),
                        ids,
                        [-4.9 + rng.random() * 0.1 for _ in ids],
                        text,
                        "stop",
                        version=step,
                        verdict=Verdict.RIGHT if right else Verdict.WRONG,
                    )
                )
            groups.append(group)
        save_groups(rollout_path(directory / "rollouts", step), groups)
    return directory


def replay(start: Path, replayed: Path, run: Path, steps: int, *arguments: str) -> list[str]:
    """Arguments of a run under TP 2 to `steps` on the recorded rollouts."""
    return [
        f"model.path={start}/small",
        f"data.train={start}/rows.jsonl",
        f"rollout.replay_dir={replayed}",
        TEMPLATE,
        f"rollout.num_prompts={P}",
        "rollout.num_samples=4",
        "rollout.max_prompt_tokens=32",
        "rollout.max_response_tokens=16",
        "actor.dtype=float32",
        "actor.micro_batch_size=16",
        "actor.tensor_model_parallel_size=2",
        # a restarted engine can have the weights from the actor alone
        "sync.transport=group",
        "sync.verify=full",
        "optimizer.lr=1e-3",
        "optimizer.lr_warmup_steps=10",
        "checkpoint.keep=9",
        "run.tensorboard=false",
        "run.export=false",
        f"run.dir={run}",
        f"run.steps={steps}",
        *arguments,
    ]


def trace_of(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step in metrics.jsonl."""
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], rows[0]["step"] + len(rows)))
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def runs(start: Path, replayed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories: once (20 steps), parts (7 + 6 + 7, the first resume in new processes), dp2,
    pp2, tp1 (from parts, step 13 to 16).
    """
    runs = tmp_path_factory.mktemp("runs")
    go = functools.partial(replay, start, replayed)
    tp, pp, num = (
        "actor.tensor_model_parallel_size",
        "actor.pipeline_model_parallel_size",
        "run.num_processes",
    )
    resume = f"run.resume={runs}/parts/checkpoints/step-13"
    first = [go(runs / "once", 20), go(runs / "parts", 7, "run.resume=auto")]
    second = [
        go(runs / "parts", 13, "run.resume=auto"),
        go(runs / "parts", 20, "run.resume=auto"),
        go(runs / "dp2", 16, resume, f"{tp}=1", f"{num}=2"),
        go(runs / "pp2", 16, resume, f"{tp}=1", f"{pp}=2"),
    ]
    for arguments in (first, second):
        torchrun("tests/integration/train_cases.py", 2, json.dumps(arguments))
    train(*go(runs / "tp1", 16, resume, f"{tp}=1"), log=runs / "tp1.log")
    return runs


def test_resumed_steps_are_the_same_bit_for_bit(runs: Path) -> None:
    """TP 2, EMA teacher, warm-up across the first resume, epochs that end inside a batch: loss and
    gradient norm of all 20 steps.
    """
    once, parts = trace_of(runs / "once"), trace_of(runs / "parts")
    assert len(set(once)) == 20 and all(loss > 0 and norm > 0 for loss, norm in once)
    assert parts == once


@pytest.mark.parametrize("layout", ["tp1", "dp2", "pp2"])
def test_a_checkpoint_goes_on_under_another_layout(runs: Path, layout: str) -> None:
    """Saved under TP 2 after 13 steps; three more from it."""
    found, expected = trace_of(runs / layout), trace_of(runs / "once")[13:16]
    worst = max(
        abs(a - b) / abs(b)
        for row, want in zip(found, expected, strict=True)
        for a, b in zip(row, want, strict=True)
    )
    print(f"{layout}: relative difference {worst:.1e}")
    assert worst < 1e-5
