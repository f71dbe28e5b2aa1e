"""Compare the distillation loss with its rivals: time, peak memory, bytes per token, value.

    # TP=2, V=152064, top-k and gather only, under three minutes
    python tools/bench_kernel.py --quick --json quick.json
    python tools/bench_kernel.py --json all.json --plot all.png       # every case at TP=1 and TP=2
    python tools/bench_kernel.py --tokens 512 2048 --tp 2 --cases fused-topk fused-full
    python tools/bench_kernel.py --device cuda --tp 1 --tokens 8192 --hidden 4096 \\
        --dtype bfloat16 --chunk-tokens 2048

What is compared with what, and how each number is taken: benchmarks/README.md. The exit code is 1
when a case fails or when cases that compute the same loss disagree. One process group per case,
gloo on a CPU (cores / TP threads a rank) and NCCL on GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from bench_cases import CASES, Inputs, Job, Setting, make_inputs
from bench_kernel_report import (
    checks_of,
    comparison,
    heading,
    headline,
    line,
    peak_growth,
    plot,
    ratios_of,
)
from bench_meters import PeakMemory, RingBytes

ROOT = Path(__file__).resolve().parent.parent
FULL = {
    "tokens": [512],
    "vocab": [152064],
    "top_k": [100],
    "tp": [1, 2],
    "dtype": ["float32"],
    "hidden": 512,
    "repeats": 3,
}
QUICK = FULL | {"tp": [2], "repeats": 5, "cases": ["gather", "topk", "gather-linear", "fused-topk"]}


def measure(job: Job, small: Job, device: torch.device, repeats: int) -> dict:
    """A few tokens to warm up; one run for memory, bytes and values; then `repeats` timed runs."""

    def run(meter: RingBytes) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = job.forward()
        meter.phase = "backward"
        return loss.detach(), torch.autograd.grad(loss, job.leaves) if job.leaves else ()

    small.before()
    loss = small.forward()
    if small.leaves:
        torch.autograd.grad(loss, small.leaves)
    del loss, small
    job.before()
    memory = PeakMemory(device)
    with RingBytes() as meter:
        memory.start()
        loss, grads = run(meter)
        peak = memory.stop()
    # The gradient is [V, h] or [T, V] in float64, so the peak is read before.
    square = grads[-1].double().square().sum().item() if grads else 0.0
    found = {"peak_bytes": peak, "received": meter.received, "loss": loss.item(), "grad_square": square}
    del loss, grads
    times: dict[str, list[float]] = {"cpu": [], "wall": [], "device": []}
    for _ in range(repeats):
        job.before()
        if dist.get_world_size() > 1:
            dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        cpu, wall = time.process_time(), time.perf_counter()
        kept = run(meter)
        if device.type == "cuda":
            end.record()
            torch.cuda.synchronize(device)
            times["device"].append(begin.elapsed_time(end) / 1e3)
        times["cpu"].append(time.process_time() - cpu)
        times["wall"].append(time.perf_counter() - wall)
        del kept
    return found | {"seconds": times}


def worker(rank: int, name: str, setting: Setting, repeats: int, threads: int, directory: str) -> None:
    """One rank of one case: its measurements as JSON in `directory`."""
    # all_gather_into_tensor, under its new name from torch 2.13 on
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)
    device = torch.device(setting.device, rank) if setting.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    rendezvous = {"init_method": f"file://{directory}/rendezvous", "rank": rank, "world_size": setting.tp}
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10), **rendezvous)
    group = dist.new_group(list(range(setting.tp))) if setting.tp > 1 else None
    case = CASES[name]
    inputs: Inputs = make_inputs(setting, case.level, rank, device, group)
    small, job = case.make(inputs.first(8)), case.make(inputs)
    del inputs
    found = measure(job, small, device, repeats)
    Path(directory, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_case(name: str, setting: Setting, repeats: int) -> dict:
    """A row of the table, measured in a fresh process group.

    The slowest rank counts, and of the repeats the best (on a GPU the median).
    """
    case = CASES[name]
    row = {"case": name, "source": case.source, "label": case.label, "level": case.level, **asdict(setting)}
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return row | {"skipped": "liger-kernel is not installed (pip install -e '.[bench]')"}
    threads = max(1, len(os.sched_getaffinity(0)) // setting.tp)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin at a barrier on a shared machine count as CPU time, tenfold at worst.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as directory:
        try:
            torch.multiprocessing.spawn(
                worker, (name, setting, repeats, threads, directory), nprocs=setting.tp
            )
        # A case that fails (out of memory, an unfinished backend) must not end the other cases.
        except Exception as error:
            print(error, file=sys.stderr)
            return row | {"error": str(error).strip().splitlines()[-1]}
        ranks = [json.loads(Path(directory, f"rank{r}.json").read_text()) for r in range(setting.tp)]
    slowest = {
        unit: [max(of) for of in zip(*(r["seconds"][unit] for r in ranks), strict=True)]
        for unit in ("cpu", "wall", "device")
    }
    row |= {
        "threads": threads,
        "cpu_seconds": min(slowest["cpu"]),
        "wall_seconds": min(slowest["wall"]),
        "repeats": slowest,
    }
    if slowest["device"]:
        row |= {"device_seconds": statistics.median(slowest["device"])}
    row |= {"peak_bytes": max(r["peak_bytes"] for r in ranks)}
    for phase in ("forward", "backward"):
        row[f"{phase}_bytes_per_token"] = max(r["received"][phase] for r in ranks) / setting.tokens
    # a bound computes no loss
    if case.source != "e":
        row |= {"loss": ranks[0]["loss"], "grad_norm": sum(r["grad_square"] for r in ranks) ** 0.5}
    return row


def machine() -> dict:
    """Where this ran."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def commit() -> str:
    """HEAD, with -dirty when tracked files differ from it; "unknown" outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="TP=2 and the four cases of the ratios; the other options still count",
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="T (default 512)")
    parser.add_argument(
        "--vocab", type=int, nargs="+", help="V over all ranks, divisible by TP (default 152064)"
    )
    parser.add_argument("--top-k", type=int, nargs="+", help="K (default 100)")
    parser.add_argument("--tp", type=int, nargs="+", help="ranks (default 1 2)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        help="of logits, hidden states and weight (default float32)",
    )
    parser.add_argument("--hidden", type=int, help="h (default 512)")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), metavar="CASE", help="of: " + " ".join(CASES)
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each case (default 3; --quick 5)")
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=256,
        help="tokens whose logits the chunked cases may hold (default 256)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else FULL | {"cases": list(CASES)}).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for vocab, tp, k in itertools.product(arguments.vocab, arguments.tp, arguments.top_k):
        if vocab % tp or not 1 <= k < vocab:
            parser.error(f"V={vocab} must be divisible by TP={tp} and larger than K={k}")
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if arguments.device == "cuda" and torch.cuda.device_count() < max(arguments.tp):
        parser.error(f"TP={max(arguments.tp)} needs as many GPUs, there are {torch.cuda.device_count()}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the grid of settings, print and write the results; exit code 1 if a case is wrong."""
    arguments = parse(argv)
    # one machine: no name of its own needed
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    started, load = time.time(), os.getloadavg()
    rows, settings = [], []
    grid = itertools.product(
        arguments.dtype, arguments.tp, arguments.vocab, arguments.tokens, arguments.top_k
    )
    for dtype, tp, vocab, tokens, k in grid:
        setting = Setting(
            tokens,
            vocab,
            arguments.hidden,
            k,
            tp,
            dtype,
            arguments.device,
            arguments.chunk_tokens,
            arguments.seed,
        )
        print(heading(setting), flush=True)
        here = []
        for name in arguments.cases:
            case = CASES[name]
            if (case.one_rank and tp > 1) or (not case.reads_k and k != arguments.top_k[0]):
                continue
            here.append(run_case(name, setting, arguments.repeats))
            print(line(here[-1]), flush=True)
        found = {"setting": asdict(setting), "ratios": ratios_of(here), "checks": checks_of(here)}
        for text in comparison(found["checks"], found["ratios"]):
            print(text)
        rows += here
        settings.append(found)
    growth = peak_growth(rows)
    for entry in growth:
        few, many = entry["tokens"]
        print(
            f"peak of {entry['case']} TP={entry['tp']} at T={many} over T={few}: {entry['peak_growth']:.3f}"
        )
    if arguments.json:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(
                ["python", "tools/bench_kernel.py", *(sys.argv[1:] if argv is None else argv)]
            ),
            "commit": commit(),
            "torch": torch.__version__,
            "machine": machine() | {"load_at_start": load, "load_at_end": os.getloadavg()},
            "seconds": time.time() - started,
            "ratios": headline(settings),
            "settings": settings,
            "peak_growth": growth,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    wrong = [row["case"] for row in rows if "error" in row] + [
        c["cases"] for s in settings for c in s["checks"] if not c["ok"]
    ]
    if wrong:
        print(f"failed: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
