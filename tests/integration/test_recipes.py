"""Every row of `megasd recipes` for three steps, end to end: real SGLang, real Megatron, its
teacher, its weights, its loss.

Proves: each recipe runs as `megasd train` runs it, its loss and gradient norm are finite, it learns
something, and the metric that is its own has a sensible value. Does not prove: that its loss is the
paper's (tests/distributed/test_methods.py), layouts (tests/distributed/test_golden.py), that it
helps (examples/methods).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megasd.algo.recipes import RECIPES
from megasd.data.chat import Chat
from megasd.data.prompts import load_prompts
from megasd.trainer.metrics import read_metrics
from tests.integration.recipe_cases import STEPS
from tests.integration.test_train import teach_to_toss
from tests.launch import ROOT
from tests.metric_names import documented
from tools import make_quickstart

pytestmark = pytest.mark.nightly

Rows = list[dict[str, float]]


def each(name: str, holds: Callable[[float], bool]) -> Callable[[Rows], bool]:
    """The metric is in every line, and holds."""
    return lambda rows: all(name in row and holds(row[name]) for row in rows)


def between(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


SHARE = between(0.0, 1.0)
TAUGHT = each("train/taught_tokens", lambda n: n > 0)
DIVERGES = each("train/divergence", lambda d: d > 0)
LEAD = each("train/log_ratio", math.isfinite)
OWN: dict[str, list[Callable[[Rows], bool]]] = {
    "sft": [each("train/logp", lambda x: x < 0)],
    "ssd": [each("rollout/samples", lambda n: n == 48), each("train/nll_samples", lambda n: n == 44)],
    "dapo": [each("rollout/batches", between(1, 4)), each("train/updates", lambda n: n == 2)],
    "gspo": [each("train/updates", lambda n: n == 3)],
    "cispo": [each("train/updates", lambda n: n == 3)],
    "sdpo": [DIVERGES, TAUGHT],
    "sc_sdpo": [
        DIVERGES,
        each("weight/mean", between(0.25, 0.5)),
        each("weight/informative_questions", between(1, 6)),
    ],
    "sdpo_paced": [DIVERGES, each("weight/mean", between(0.0, 0.25))],
    "paced": [
        each("weight/mean", between(0.0, 0.25)),
        lambda rows: "reward/pass_rate" in rows[2] and "reward/pass_rate" not in rows[0],
    ],
    # a clipped sum may be negative
    "opsd": [each("train/divergence", lambda d: d < 1)],
    "rlsd": [LEAD, each("train/credit_clipped", SHARE), lambda rows: rows[-1]["train/teacher_copies"] == 1],
    "rlcsd": [
        LEAD,
        each("train/second_path", SHARE),
        lambda rows: any(row["train/second_path"] > 0 for row in rows),
    ],
    "antisd": [
        LEAD,
        lambda rows: rows[0]["train/gate"] == 0,
        each("train/gate", lambda g: g in (0, 1)),
        each("train/phi", math.isfinite),
    ],
    "egrsd": [LEAD, each("train/credit_clipped", SHARE)],
    "cl_egrsd": [LEAD, each("train/credit_clipped", SHARE)],
    "srpo": [
        DIVERGES,
        each("train/distill_samples", lambda n: n > 0),
        each("train/policy_gradient_samples", lambda n: n > 0),
    ],
    "ssopd": [each("train/distill_samples", between(1, 6))],
    "sdft": [DIVERGES],
    "opcd": [each("train/divergence", math.isfinite)],
    "gkd": [each("rollout/dataset_questions", between(0, 6))],
    "akl": [each("train/divergence", lambda d: d >= 0)],
    "minillm": [LEAD, each("train/updates", lambda n: n == 2)],
    "tml_opd": [LEAD],
    "uni_opd": [LEAD],
    "atesd": [each("teacher/prefix_fraction", between(0.0, 1.0))],
    "ropd": [each("reward/score", between(0.0, 1.0))],
    "drift": [DIVERGES, lambda rows: "train/policy_gradient_samples" in rows[2]],
}
# the teacher is the start model itself: nothing to learn in the first step
STILL = ("gkd", "akl", "minillm", "tml_opd", "uni_opd")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    start, out = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("recipes")
    for name in ("model", "warm"):
        make_quickstart.write_tokenizer(start / name)
    make_quickstart.write_model(start / "model", seed=1)
    rows = [
        {"id": f"row-{i}", "prompt": f"{i % 7}+{i}=", "answer": str(i % 7 + i), "solution": str(i % 7 + i)}
        for i in range(12)
    ]
    (start / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm = AutoModelForCausalLM.from_pretrained(start / "model", dtype=torch.float32)
    teach_to_toss(warm, Chat(start / "model"), load_prompts(start / "solved.jsonl"))
    warm.save_pretrained(start / "warm")
    command = [sys.executable, "tests/integration/recipe_cases.py", str(start), str(out)]
    with (out / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=1500
        )
    said = (out / "log").read_text()
    assert done.returncode == 0, said[-5000:]
    print("\n".join(line for line in said.splitlines() if line.startswith('{"recipe"')))
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps(runs: Path, name: str) -> None:
    rows = read_metrics(runs / name / "metrics.jsonl")
    assert not {metric for row in rows for metric in row} - documented(), "explain them in docs/metrics.md"
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
        assert "sync/probe_max_diff" not in row or row["sync/probe_max_diff"] < 1e-3
    assert any(row["train/grad_norm"] > 0 for row in rows), "nothing was learned"
    for k, holds in enumerate(OWN.get(name, [])):
        assert holds(rows), f"{name}: check {k} of its own metrics: {rows}"
