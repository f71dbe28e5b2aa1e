"""Compare packed with padded microbatches: training steps on lengths with a long tail.

    # CPU, about three minutes on two cores
    python tools/bench_packing.py --json packing.json
    python tools/bench_packing.py --device cuda --hidden 4096 --layers 8 --budget 32768 \\
        --longest 16384 --dtype bfloat16

The real actor runs the teacher's forward and the update. The same batch is cut into microbatches in
four ways: padded or packed, by a fixed number of samples or by a token budget. The four ways take
turns within each repeat, so that other load on the machine falls on all of them. What is measured
is said in benchmarks/README.md. The exit code is 1 if two ways disagree on the first step's loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
# Threads that wait must not count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from bench_meters import PeakMemory

from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.actor.rank_batch import active_samples
from megasd.batch.batch import Batch
from megasd.batch.shard import plan_ranks
from megasd.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DistillTerm,
    QuestionWeightConfig,
    TeacherConfig,
)

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, dict[str, Any]] = {
    "padded, by count": {"packing": False},
    "packed, by count": {"packing": True},
    "padded, by tokens": {"packing": False, "budget": True},
    "packed, by tokens": {"packing": True, "budget": True},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a response at most")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lognormal response lengths")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a microbatch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def lengths(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """List (prompt, response, teacher's prompt) of each sample, in tokens.

    A question has 8 samples. Responses are lognormal. The teacher reads a sibling's response too.
    """
    rng, found = random.Random(11), []
    median = options.longest / 10
    for _ in range(options.samples // 8):
        prompt = rng.randint(16, 64)
        responses = [
            min(options.longest, max(4, round(median * rng.lognormvariate(0.0, options.sigma))))
            for _ in range(8)
        ]
        found += [
            (prompt, response, prompt + 16 + min(options.longest // 4, rng.choice(responses)))
            for response in responses
        ]
    return found


def make_batch(options: argparse.Namespace) -> Batch:
    """A batch of random tokens with these lengths."""
    g, sizes = torch.Generator().manual_seed(5), lengths(options)
    prompts, responses, contexts = (torch.tensor(column) for column in zip(*sizes, strict=True))

    def draw(count: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, options.vocab, (int(count),), generator=g)

    return Batch(
        prompt_ids=draw(prompts.sum()),
        prompt_lens=prompts,
        context_ids=draw(contexts.sum()),
        context_lens=contexts[:, None],
        response_ids=draw(responses.sum()),
        response_lens=responses,
        question_weight=torch.full((len(sizes),), 0.5, dtype=torch.float64),
        question_size=torch.full((len(sizes),), 8),
        scored=torch.ones(len(sizes), dtype=torch.bool),
        streams={
            "rollout_logp": torch.full((int(responses.sum()),), -8.0),
            "advantage": torch.zeros(int(responses.sum())),
        },
    )


def make_model(options: argparse.Namespace, directory: Path) -> None:
    """A random Qwen3 as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    heads = max(4, options.hidden // 128)
    shape = dict(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
    )
    shape |= dict(num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=options.hidden // heads)
    config = AutoConfig.for_model(
        "qwen3", **shape, max_position_embeddings=4 * options.longest, tie_word_embeddings=False
    )
    AutoModelForCausalLM.from_config(config).to(getattr(torch, options.dtype)).save_pretrained(directory)


def make_actor(options: argparse.Namespace, model: Path, device: torch.device) -> Actor:
    config = Config()
    config.model.path, config.run.steps = str(model), 1000
    config.actor = ActorConfig(dtype=options.dtype, micro_batch_size=options.micro_batch_size)
    weight = QuestionWeightConfig(kind="none")
    config.algorithm = AlgorithmConfig(
        distill=DistillTerm(top_k=20), teacher=TeacherConfig(), question_weight=weight
    )
    # With lr=0 a step is whole and the weights stay as they are, so every way has the same loss.
    config.optimizer.lr = 0.0
    return Actor(config, init_model_parallel(config.actor, device, seed=1))


def set_way(actor: Actor, options: argparse.Namespace, name: str) -> None:
    """Let the actor cut the next batches this way; its model stays the same."""
    way = WAYS[name]
    config = replace(
        actor.config.actor,
        packing=way["packing"],
        max_tokens_per_microbatch=options.budget if way.get("budget") else None,
    )
    actor.config.actor, actor.costs = config, replace(actor.costs, actor=config)
    actor.student = actor.learner.student = replace(actor.student, actor=config)


def step(actor: Actor, batch: Batch) -> tuple[float, float, dict[str, float]]:
    """Run a step; return its wall seconds, process seconds (all threads) and metrics.

    The time runs from the whole batch to the updated weights.
    """
    if actor.mesh.device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    batches = actor.shard(batch)
    # The actor reads the metrics at the end, so all work is done by then.
    metrics = actor.update(batches, actor.teacher_forward(batches))
    return time.perf_counter() - start, time.process_time() - cpu_start, metrics


def balance(actor: Actor, batch: Batch) -> dict[str, float]:
    """FLOPs of the costliest rank over the mean, with 2, 4 and 8 data-parallel ranks.

    This is computed from the plan and not run.
    """
    active = active_samples(batch, actor.algorithm)
    return {
        str(ranks): round(
            plan_ranks(batch, active, actor.algorithm, actor.costs, ranks)[0].metrics["flops_balance"], 4
        )
        for ranks in (2, 4, 8)
    }


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row of measurements for each way."""
    batch = make_batch(options)
    tokens = int(batch.prompt_lens.sum() + batch.context_lens.sum() + 2 * batch.response_lens.sum())
    with tempfile.TemporaryDirectory() as directory:
        make_model(options, Path(directory))
        actor = make_actor(options, Path(directory), device)
    rows: dict[str, dict[str, Any]] = {}
    # The first step of each way warms up, and gives the metrics that do not depend on time.
    for name in WAYS:
        set_way(actor, options, name)
        metrics = step(actor, batch)[2]
        kept = ("microbatches", "padding_share", "teacher_padding_share", "loss", "grad_norm")
        rows[name] = {"way": name, "flops_balance": balance(actor, batch)} | {
            key: metrics[key] for key in kept
        }
        rows[name] |= {"peak_mib": 0.0, "seconds_all": [], "cpu_seconds_all": []}
    for _ in range(options.repeats):
        for name, row in rows.items():
            set_way(actor, options, name)
            meter = PeakMemory(device)
            meter.start()
            wall, cpu, _ = step(actor, batch)
            row["peak_mib"] = max(row["peak_mib"], round(meter.stop() / 2**20, 1))
            row["seconds_all"].append(round(wall, 4))
            row["cpu_seconds_all"].append(round(cpu, 4))
    for row in rows.values():
        row["tokens"] = tokens
        row["tokens_per_second"] = round(tokens / statistics.median(row["seconds_all"]), 1)
        row["tokens_per_cpu_second"] = round(tokens / statistics.median(row["cpu_seconds_all"]), 1)
    return list(rows.values())


PAIRS = {
    "packed_over_padded_by_count": ("packed, by count", "padded, by count"),
    "packed_over_padded_by_tokens": ("packed, by tokens", "padded, by tokens"),
    "tokens_over_count_packed": ("packed, by tokens", "packed, by count"),
    "tokens_over_count_padded": ("padded, by tokens", "padded, by count"),
    "packed_by_tokens_over_padded_by_count": ("packed, by tokens", "padded, by count"),
}


def ratios(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Tokens per second of one way over another's, for each of PAIRS.

    It is the median over repeats of the ratio within a repeat, so that other load on the machine
    falls on both ways.
    """
    by = {row["way"]: row[key] for row in rows}
    pairs = {name: zip(by[ours], by[theirs], strict=True) for name, (ours, theirs) in PAIRS.items()}
    return {name: round(statistics.median(b / a for a, b in both), 3) for name, both in pairs.items()}


def machine(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "commit": commit,
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'':<20}{'tokens/s':>10}{'per CPU s':>11}{'peak MiB':>10}{'microb.':>9}{'padding':>9}"
        f"{'teacher':>9}{'loss':>14}"
    )
    lines = [
        f"{r['way']:<20}{r['tokens_per_second']:>10.0f}{r['tokens_per_cpu_second']:>11.0f}"
        f"{r['peak_mib']:>10.0f}{r['microbatches']:>9.0f}"
        f"{r['padding_share']:>9.1%}{r['teacher_padding_share']:>9.1%}{r['loss']:>14.6e}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    options = parse()
    device = init_distributed()
    if device.type != options.device:
        sys.exit(f"bench_packing: --device {options.device}, but this process runs on {device.type}")
    rows = measure(options, device)
    found = {"wall": ratios(rows, "seconds_all"), "cpu": ratios(rows, "cpu_seconds_all")}
    print(table(rows))
    print(
        "\n".join(
            f"{name}: {found['wall'][name]:.2f} (CPU seconds: {found['cpu'][name]:.2f})" for name in PAIRS
        )
    )
    if options.json:
        record = {"command": shlex.join(sys.argv), "machine": machine(device), "ratios": found, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    losses = [row["loss"] for row in rows]
    tolerance = 1e-5 if options.dtype == "float32" else 5e-2
    return int(max(losses) - min(losses) > tolerance * abs(losses[0]))


if __name__ == "__main__":
    sys.exit(main())
