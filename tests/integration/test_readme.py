"""Runs the commands of README.md and docs/*.md: the make targets for real (the quickstart
shortened), train and convert on a tiny model.

Does not prove the numbers that the README shows: they come from a full `make quickstart`. Does not
run `megasd eval`, `analyze`, `launch`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megasd import cli
from tests.tiny_weights import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def commands(page: Path) -> list[str]:
    """The `make` and `megasd` lines of a page's fenced blocks, comments cut off."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if re.match(r"(make|megasd) ", line)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def test_the_readme_names_only_these_make_targets() -> None:
    assert [c for c in commands(ROOT / "README.md") if c.startswith("make ")] == [
        "make quickstart",
        "make test",
    ]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ci.splitlines()


def test_make_quickstart_shortened(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "configs", "tools", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    warmup = "WARMUP_ARGS=run.steps=12 optimizer.lr_warmup_steps=2 rollout.num_prompts=64"
    short = (
        "ARGS=run.steps=2 rollout.num_prompts=8 evaluation.num_prompts=8 evaluation.num_samples=2"
        " actor.micro_batch_size=64"
    )
    done = subprocess.run(
        ["make", "quickstart", warmup, short], cwd=tmp_path, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(
        r"^step 2/2 pass .* informative .* div .* gnorm .* tok/s .* s: rollout", done.stdout, re.MULTILINE
    ), done.stdout
    assert (
        re.search(r"^mean@2 +\S+% +\S+% +[+-]", done.stdout, re.MULTILINE)
        and "try next: megasd train" in done.stdout
    )
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert {"before", "after", "seconds", "steps", "commit"} <= summary.keys() and {
        "mean_at_k",
        "maj_at_k",
    } <= summary["after"].keys()
    held = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "rollouts",
        "checkpoints",
        "hf",
        "engine.log",
        "summary.json",
    } <= held


def test_megasd_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    (model / "tokenizer.json").write_text("{}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    row = json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n"
    (tmp_path / "runs" / "quickstart-start").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart-warmup").mkdir()
    # what `make quickstart` leaves
    (tmp_path / "runs" / "quickstart-warmup" / "hf").symlink_to(model)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(row)
        (tmp_path / "runs" / "quickstart-start" / name).write_text(row)
    trains = [c for c in COMMANDS if c.startswith("megasd train ")]
    assert len(trains) >= 3
    for command in trains:
        arguments = shlex.split(command.replace("/models/Qwen3-8B", str(model)))[1:]
        assert cli.main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0, command
        assert "# ranks " in capsys.readouterr().out


def test_megasd_convert_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one reads what the first made in place of a run's checkpoint
    (tests/unit/convert/test_conversion.py has those).
    """
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    places = {"/models/Qwen3-8B": str(model), "runs/quickstart/checkpoints/step-80": "qwen3-8b-megatron"}
    converts = [c for c in COMMANDS if c.startswith("megasd convert ")]
    assert len(converts) == 2
    for command in converts:
        words = [places.get(word, word) for word in shlex.split(command)]
        assert cli.main(words[1:]) == 0, command
        assert (tmp_path / words[3]).is_dir() and "peak memory" in capsys.readouterr().out
