"""Run one file of distributed cases under torchrun: many small cases in one process group, one
launch per world size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torchrun(
    script: str, nproc: int, *args: str, timeout: float = 1500, env: dict[str, str] | None = None
) -> str:
    """Run `script` (path from the repository root) on `nproc` gloo ranks; returns its output, fails
    the test with the tail of it.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        script,
        *args,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{script} on {nproc} ranks exited {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def generating(url: str) -> bool:
    """Whether the SGLang server there is at work on a request, by its scheduler's own word: the
    prompt is read, tokens come.
    """
    with urllib.request.urlopen(url + "/v1/loads", timeout=120) as answer:
        return any(load["num_running_reqs"] for load in json.load(answer)["loads"])
