"""The Triton kernels, executed by Triton's interpreter on a CPU (triton_cases.py, one subprocess:
the variable must be set before import).

Proves: select, gather, gradient_, full_sums and full_gradient_ equal float64 twins written from the
definitions, and kernels_torch, for float32, bfloat16 and float16, ties, masks, extremes, overflow
of the candidates, NaN, padding, strides, temperatures, beta, clip and `out`; the relative error of
expm1 and log1p. Does not prove: what the compiler makes of the kernels, races between lanes, the
GPU's own exp, speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
CASES = (
    "expm1_and_log1p",
    "select_kinds",
    "select_every_k",
    "select_temperatures",
    "select_nan",
    "gather",
    "gradient",
    "full",
    "no_rows_and_errors",
)


def test_triton_passes_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/unit/ops/triton_cases.py"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    for case in CASES:
        assert f"passed {case} " in done.stdout
