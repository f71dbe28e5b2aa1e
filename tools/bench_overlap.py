"""Compare rollout.overlap=0 with =1 on the quickstart: step time, accuracy, staleness, peak memory.

    # Once: makes the model and the rows.
    make quickstart
    # Two runs of each mode, 80 steps: about ten minutes on two idle cores.
    python tools/bench_overlap.py --json benchmarks/overlap_cpu.json

The quickstart's answers have eight tokens, so that its steps do not wait for sampling. A job that
does, for the wall time alone (random weights, which answer at length and are never right):

    python tools/bench_overlap.py --steps 14 --eval-samples 1 --json FILE \\
        --model runs/quickstart-start/model algorithm.recipe=opcd algorithm.tis_clip=2.0 \\
        rollout.num_prompts=16 rollout.max_response_tokens=160 actor.micro_batch_size=16 \\
        evaluation.num_prompts=8

The two modes take turns. In both, the engine is kept on one core and the trainer on another, so
that neither takes time from the other, as on a machine where they have devices of their own. A
run's seconds are those of its steps without the first two. A ratio is overlap 1 over overlap 0 of
the same round. Other load on the machine is recorded too. Config and seed are otherwise the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bench_kernel import ROOT, commit, machine

from megasd.trainer.metrics import read_metrics

# Steps at the start of a run that are not counted.
WARM = 2
PHASES = ("rollout", "wait", "teach", "train", "sync")
ENGINE = "megasd.engine.sglang_cpu"


def run(overlap: int, args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run one `megasd train` and return its measurements."""
    start = Path(args.start)
    command = [
        sys.executable,
        "-m",
        "megasd.cli",
        "train",
        "configs/quickstart.yaml",
        f"rollout.overlap={overlap}",
        f"run.steps={args.steps}",
        f"run.dir={directory}",
        f"model.path={args.model}",
        f"data.train={start}/train.jsonl",
        f"data.eval={start}/eval.jsonl",
        "actor.tensor_model_parallel_size=1",
        "run.export=false",
        "run.tensorboard=false",
        "checkpoint.save_at_end=false",
        f"evaluation.num_samples={args.eval_samples}",
        *args.overrides,
    ]
    load = []
    with (directory.parent / f"{directory.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peaks = {"trainer": 0, "engine": 0}
        while process.poll() is None:
            keep_apart(psutil.Process(process.pid), args.cores, peaks)
            load.append(os.getloadavg()[0])
            time.sleep(1.0)
    if process.returncode:
        raise SystemExit(
            f"overlap={overlap} ended with {process.returncode}:\n{Path(log.name).read_text()[-3000:]}"
        )
    return measurements(directory, overlap, args.steps) | {
        "peak_rss_bytes": peaks,
        "load_average_1min": [round(min(load), 1), round(statistics.median(load), 1), round(max(load), 1)],
    }


def keep_apart(trainer: psutil.Process, cores: list[int], peaks: dict[str, int]) -> None:
    """Pin the trainer to the first core and its engine's processes to the second.

    `peaks` is updated with the largest resident memory of each side so far.
    """
    try:
        family = trainer.children(recursive=True)
        servers = [one for one in family if ENGINE in one.cmdline()]
        engine = {one.pid for server in servers for one in [server, *server.children(recursive=True)]}
        sizes = {"trainer": 0, "engine": 0}
        for one in [trainer, *family]:
            side = "engine" if one.pid in engine else "trainer"
            for thread in one.threads():
                os.sched_setaffinity(thread.id, {cores[side == "engine"]})
            sizes[side] += one.memory_info().rss
        for side, size in sizes.items():
            peaks[side] = max(peaks[side], size)
    except (psutil.NoSuchProcess, ProcessLookupError):
        # A process has just ended.
        pass


def measurements(directory: Path, overlap: int, steps: int) -> dict[str, Any]:
    """Numbers out of the metrics and the summary of a finished run."""
    rows, summary = (
        read_metrics(directory / "metrics.jsonl"),
        json.loads((directory / "summary.json").read_text()),
    )
    counted = rows[WARM:]
    median = {
        phase: statistics.median(row.get(f"seconds/{phase}", 0.0) for row in counted) for phase in PHASES
    }
    return {
        "overlap": overlap,
        "steps": steps,
        "seconds_of_steps": sum(row["seconds/step"] for row in counted),
        "median_step_seconds": statistics.median(row["seconds/step"] for row in counted),
        "median_phase_seconds": median,
        "stale_samples": [row["rollout/stale_samples"] for row in rows],
        "max_staleness": max(row["rollout/max_staleness"] for row in rows),
        "samples_a_step": rows[0]["rollout/samples"],
        "mean_tis": statistics.mean(row["train/tis"] for row in rows),
        "mean_rollout_gap": statistics.mean(row["train/rollout_gap"] for row in rows),
        "before": summary["before"],
        "after": summary["after"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each mode, in turn (default 2)")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples a held-out question (default 8)")
    parser.add_argument("--model", default="runs/quickstart-warmup/hf")
    parser.add_argument(
        "--start", default="runs/quickstart-start", help="directory of train.jsonl and eval.jsonl"
    )
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], metavar=("TRAINER", "ENGINE"))
    parser.add_argument("--json", help="file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of both modes")
    args = parser.parse_args()
    started, runs = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(args.rounds):
            for overlap in (0, 1) if number % 2 == 0 else (1, 0):
                runs.append(run(overlap, args, Path(directory) / f"run-{number}-{overlap}"))
                done = runs[-1]
                mean = done["after"]["mean_at_k"]
                print(
                    f"overlap {overlap}: {done['seconds_of_steps']:.1f} s, mean@k {mean:.1%}, load"
                    f" {done['load_average_1min']}",
                    flush=True,
                )
    pairs = [sorted(runs[i : i + 2], key=lambda one: one["overlap"]) for i in range(0, len(runs), 2)]
    ratios = {
        name: [b[name] / a[name] for a, b in pairs] for name in ("seconds_of_steps", "median_step_seconds")
    }
    result = {
        "what": "quickstart, TP 1, rollout.overlap 1 over 0; engine and trainer on a core each",
        "overrides": args.overrides,
        "ratios": ratios,
        "held_out_mean_at_k": {
            str(o): [one["after"]["mean_at_k"] for one in runs if one["overlap"] == o] for o in (0, 1)
        },
        "peak_trainer_rss_ratio": [
            b["peak_rss_bytes"]["trainer"] / a["peak_rss_bytes"]["trainer"] for a, b in pairs
        ],
        "runs": runs,
        "command": " ".join(sys.argv),
        "started": started,
        "commit": commit(),
        "machine": machine(),
    }
    print(
        json.dumps(
            {name: result[name] for name in ("ratios", "held_out_mean_at_k", "peak_trainer_rss_ratio")},
            indent=2,
        )
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
