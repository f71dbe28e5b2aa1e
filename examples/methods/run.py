"""Methods side by side on the quickstart's task: the same warm start, prompts and number of
samples, three seeds each.

    python examples/methods/run.py [--methods grpo,sdpo,sdpo_paced,sc_sdpo] [--seeds 1,2,3] [--steps 60] [--out runs/methods]

Each seed has its own data, model and warm start. A finished run is not made again. Writes
OUT/table.md, OUT/results.json (every number, commit, machine) and OUT/curves.png (needs matplotlib:
pip install -e ".[bench]"). Whatever comes out is written as it is.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from megasd.data.rollout_log import load_groups
from megasd.evaluation.estimators import summarise
from megasd.trainer.metrics import read_metrics
from megasd.types import Group

ROOT = Path(__file__).resolve().parents[2]
# of each held-out question
SAMPLES = 16
# what the warm start has learned to read
SELF_TAUGHT = ("algorithm.teacher.template={prompt}({solution})",)
# no teacher; every other method has one
OVERRIDES = {"grpo": (), "dr_grpo": (), "dapo": (), "gspo": (), "cispo": ()}
FORMATS = {
    "mean@16": "{:.1%}",
    "maj@16": "{:.1%}",
    "pass@16": "{:.1%}",
    "length": "{:.2f}",
    "seconds": "{:.0f}",
}
COLUMNS = tuple(FORMATS)


def megasd(*arguments: str, log: Path) -> None:
    """`megasd train`, its output in `log`; a failure ends the comparison with the log's last lines."""
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "megasd.cli", "train", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(
            f"megasd train failed ({done.returncode}); the end of {log}:\n"
            + "\n".join(log.read_text().splitlines()[-15:])
        )


def warm_start(directory: Path, seed: int) -> None:
    """Data, a random model and its supervised warm-up."""
    if (directory / "warm" / "hf" / "config.json").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "tools/make_quickstart.py", directory / "start", "--seed", str(seed)],
        cwd=ROOT,
        check=True,
    )
    megasd(
        "configs/quickstart_warmup.yaml", f"run.seed={seed}", f"model.path={directory}/start/model",
        f"data.train={directory}/start/warmup.jsonl", f"run.dir={directory}/warm", log=directory / "warm.log",
    )  # fmt: skip


def train(directory: Path, method: str, seed: int, steps: int) -> None:
    """One method from the warm start, with an evaluation before and after."""
    run_dir = directory / method
    if (run_dir / "summary.json").exists() and json.loads((run_dir / "summary.json").read_text())[
        "steps"
    ] == steps:
        return
    megasd(
        "configs/quickstart_task.yaml",
        f"algorithm.recipe={method}",
        *OVERRIDES.get(method, SELF_TAUGHT),
        f"run.seed={seed}",
        f"model.path={directory}/warm/hf",
        f"data.train={directory}/start/train.jsonl",
        f"data.eval={directory}/start/eval.jsonl",
        f"run.dir={run_dir}",
        f"run.steps={steps}",
        f"evaluation.num_samples={SAMPLES}",
        "run.overwrite=true",
        "run.export=false",
        "run.tensorboard=false",
        "checkpoint.save_at_end=false",
        log=directory / f"{method}.log",
    )


def figures(groups: list[Group]) -> dict[str, float]:
    """Of one evaluation. maj@16: one vote over the 16 samples; pass@16: any of them right; length:
    tokens of a response.
    """
    samples, found = [s for g in groups for s in g.samples], summarise(groups, lambda text: text.strip())
    shares = {f"{name}@16": found[f"{name}_at_k"] for name in ("mean", "maj", "pass")}
    return shares | {"length": sum(len(s.response_ids) for s in samples) / len(samples)}


def collect(directory: Path, method: str, steps: int) -> dict:
    """Figures before and after, the training pass rate of each step, seconds of a step."""
    run_dir = directory / method
    rows = read_metrics(run_dir / "metrics.jsonl")
    before, after = (
        figures(load_groups(run_dir / "rollouts" / f"eval-step-{step:06d}.jsonl")) for step in (0, steps)
    )
    return {
        "before": before,
        "after": after | {"seconds": sum(row["seconds/step"] for row in rows)},
        "pass_rate": [row["reward/pass_rate"] for row in rows],
        "length": [row["rollout/mean_response_tokens"] for row in rows],
        "commit": json.loads((run_dir / "summary.json").read_text())["commit"],
    }


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: one row a method and seed, and the mean over seeds."""
    lines = ["| method | seed | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]

    def row(method: str, seed: str, values: dict[str, float]) -> str:
        return f"| {method} | {seed} | " + " | ".join(FORMATS[c].format(values[c]) for c in COLUMNS) + " |"

    def mean(parts: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}

    first = next(iter(results.values()))
    starts = {seed: one["before"] | {"seconds": 0.0} for seed, one in first.items()}
    for method, seeds in {
        "warm start": starts,
        **{m: {s: one["after"] for s, one in r.items()} for m, r in results.items()},
    }.items():
        lines += [row(method, seed, values) for seed, values in seeds.items()]
        lines.append(row(f"**{method}**", "mean", mean(list(seeds.values()))))
    return "\n".join(lines) + "\n"


def running_mean(values: list[float], width: int = 10) -> list[float]:
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Training pass rate over steps, a running mean of ten steps: thin lines are seeds, thick ones
    their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for colour, (method, seeds) in enumerate(results.items()):
        smooth = [running_mean(one["pass_rate"]) for one in seeds.values()]
        for line in smooth:
            axes.plot(line, color=f"C{colour}", alpha=0.25, linewidth=1)
        axes.plot(
            [sum(values) / len(values) for values in zip(*smooth, strict=True)],
            color=f"C{colour}",
            linewidth=2.5,
            label=method,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("pass rate of the step's questions, mean of ten steps")
    axes.set_title("Quickstart task, same warm start and prompts, mean of seeds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="grpo,sdpo,sdpo_paced,sc_sdpo")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    args = parser.parse_args()
    out, results = args.out.absolute(), {}
    # a seed at a time, so that an interrupted comparison has whole seeds
    for seed in args.seeds.split(","):
        directory = out / f"seed-{seed}"
        warm_start(directory, int(seed))
        for method in args.methods.split(","):
            train(directory, method, int(seed), args.steps)
            results.setdefault(method, {})[seed] = collect(directory, method, args.steps)
            print(f"seed {seed} {method}: {results[method][seed]['after']}", flush=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    (out / "results.json").write_text(
        json.dumps({"machine": machine, "steps": args.steps, "results": results}, indent=1) + "\n"
    )
    (out / "table.md").write_text(table(results))
    print(table(results))
    plot(results, out / "curves.png")


if __name__ == "__main__":
    main()
