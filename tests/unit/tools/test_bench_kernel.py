"""tools/bench_kernel.py: the byte meter counts known collectives by formula, the memory meter sees
what a call takes, the rivals compute the loss and the gradient that this project computes, on one
rank and on two, and a tiny --quick run writes the ratios and exits 0.

Does not prove: any speed or any ratio (benchmarks/), CUDA, or that a rival's project still ships
the formula that is written again here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.launch import ROOT, torchrun

# the tools import each other as scripts do
sys.path.insert(0, str(ROOT / "tools"))

from bench_cases import CASES, Setting, make_inputs
from bench_kernel import main
from bench_kernel_report import SAME_LOSS, checks_of, headline, peak_growth, ratios_of
from bench_meters import PeakMemory

CPU = torch.device("cpu")
TINY = Setting(tokens=16, vocab=512, hidden=16, top_k=20, tp=1, dtype="float32", device="cpu", chunk_tokens=4)


def test_two_ranks():
    output = torchrun("tests/unit/tools/bench_kernel_cases.py", 2, timeout=1500)
    for case in ("known_collectives", "gather_and_its_gradient", "cases_equal_one_rank"):
        assert f"passed {case}" in output


@pytest.mark.parametrize("names", SAME_LOSS, ids=" ".join)
def test_rivals_compute_the_same_loss_and_gradient(names):
    results = []
    for name in names:
        if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
            pytest.skip("liger-kernel is not installed")
        job = CASES[name].make(make_inputs(TINY, CASES[name].level, 0, CPU, None))
        # before() restores what the first run destroyed
        for _ in range(2):
            job.before()
            loss = job.forward()
            grads = torch.autograd.grad(loss, job.leaves)
        results.append((loss.item(), grads))
    (expected, expected_grads), *others = results
    assert expected > 0
    for loss, grads in others:
        # the rivals' tails are rounded in float32
        assert loss == pytest.approx(expected, rel=2e-3)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad - expected_grad).norm() <= 1e-2 * expected_grad.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    meter = PeakMemory(CPU)
    # 120 MB that are there already
    before = torch.ones(30_000_000)
    meter.start()
    one = torch.ones(20_000_000)
    del one
    kept = torch.ones(5_000_000)
    peak = meter.stop()
    assert 79e6 < peak < 90e6, (peak, len(before), len(kept))


def test_a_tiny_quick_run_writes_the_ratios(tmp_path):
    out = tmp_path / "quick.json"
    command = [
        sys.executable,
        "tools/bench_kernel.py",
        "--quick",
        "--tokens",
        "16",
        "--vocab",
        "1024",
        "--hidden",
        "32",
        "--repeats",
        "1",
    ]
    done = subprocess.run(
        [*command, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert {"date", "command", "commit", "torch", "machine", "settings", "rows"} <= set(record)
    ratios = record["ratios"]
    assert {
        "bytes_vs_gather",
        "peak_memory_vs_gather",
        "cpu_seconds_vs_gather",
        "unfused_cpu_seconds_vs_gather",
    } <= set(ratios)
    rows = {row["case"]: row for row in record["rows"]}
    assert set(rows) == {"gather", "topk", "gather-linear", "fused-topk"}
    # Both logits, half of them from the other rank; the hidden gradient's all_reduce.
    assert rows["gather"]["forward_bytes_per_token"] == 2 * 1024 * 4 / 2
    assert (
        rows["gather-linear"]["backward_bytes_per_token"]
        == rows["fused-topk"]["backward_bytes_per_token"]
        == 32 * 4
    )
    moved = [
        rows[case]["forward_bytes_per_token"] + rows[case]["backward_bytes_per_token"]
        for case in ("fused-topk", "gather-linear")
    ]
    assert ratios["bytes_vs_gather"] == moved[0] / moved[1]
    assert all(check["ok"] for setting in record["settings"] for check in setting["checks"])


def test_ratios_checks_growth_and_headline():
    def row(case, tokens=8, moved=0.0, **more):
        sizes = {
            "tokens": tokens,
            "vocab": 64,
            "hidden": 4,
            "top_k": 2,
            "tp": 2,
            "dtype": "float32",
            "level": "linear",
        }
        columns = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "peak_bytes": 100, "loss": 1.0, "grad_norm": 1.0}
        return (
            {"case": case, "forward_bytes_per_token": moved, "backward_bytes_per_token": 0.0}
            | sizes
            | columns
            | more
        )

    rows = [row("gather-linear", moved=100.0), row("fused-topk", moved=5.0, loss=1.01)]
    ratios = ratios_of(rows)
    assert ratios == {
        "bytes_vs_gather": 0.05,
        "peak_memory_vs_gather": 1.0,
        "cpu_seconds_vs_gather": 1.0,
        "wall_seconds_vs_gather": 1.0,
    }
    (check,) = checks_of(rows)
    assert not check["ok"] and check["loss"] == pytest.approx(0.01)
    (growth,) = peak_growth([*rows, row("fused-topk", 32, peak_bytes=103)])
    assert growth["case"] == "fused-topk" and growth["tokens"] == [8, 32] and growth["peak_growth"] == 1.03
    one = {"setting": {"tp": 1}, "ratios": {"cpu_seconds_vs_gather": 9.0, "topk_cpu_seconds_vs_trl": 1.05}}
    two = {"setting": {"tp": 2}, "ratios": ratios}
    assert headline([one, two]) == ratios | {"topk_cpu_seconds_vs_trl": 1.05}


@pytest.mark.parametrize(
    "wrong", [["--vocab", "1001", "--tp", "2"], ["--vocab", "64", "--top-k", "64"], ["--cases", "nothing"]]
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        main(wrong)
    assert refused.value.code == 2 and "error" in capsys.readouterr().err
