"""Time a training step of a random-weight model: tokens/s, MFU, peak memory, time of the loss.

    # anywhere, to see that it works
    python tools/bench_step.py --model tiny --device cpu
    # a GPU with torch and megatron-core alone
    python tools/bench_step.py --model Qwen3-8B --layers 8 --spec local
    # bf16 and FP8 in one run
    python tools/bench_step.py --model Qwen3-8B --layers 16 --fp8 tensorwise --fp8 blockwise \\
        --fp8-param-gather --gpu h200-141g

One rank. The step is the actor's own: Megatron's schedule over packed or padded microbatches, the
fused loss (Jensen-Shannon on the top 100 tokens of the student against a teacher's hidden states,
which are random and cost nothing here), gradients into fp32 buffers, Adam with fp32 main
parameters. Left out are sampling, the teacher's forward, and the push of weights.

    MFU = (3 x forward FLOPs of all sequences, megasd/models/flops.py) / seconds / peak

peak is the bf16 rate of cluster/planner/hardware.py. FP8 rows are divided by the same bf16 peak, so
that the numbers compare. Recomputation is not counted as work. The loss's part is device time
between CUDA events around it (wall time on a CPU), forward with its own gradients; its backward of
the hidden states is a multiplication. --spec local: the CPU's layers (torch's attention, unfused
norms), without TransformerEngine and FP8.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
warnings.filterwarnings("ignore")

import torch
from bench_kernel import ROOT, commit

from megasd.actor import cpu_backend
from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh, init_distributed, init_model_parallel
from megasd.batch.microbatch import Microbatch
from megasd.cluster.planner.hardware import GPU_KINDS
from megasd.config.schema import ActorConfig, ConfigError, OptimizerConfig
from megasd.config.validate_actor import check_machine
from megasd.loss.divergence import divergence
from megasd.loss.megatron_scaling import megatron_loss
from megasd.models import flops
from megasd.models.registry import config_from_hf
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_loss
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec

TINY = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
TOP_K = 100


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen3-8B", help="a name of configs/model, or tiny")
    parser.add_argument("--layers", type=int, help="of them; default all")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu")
    )
    parser.add_argument(
        "--spec", choices=("te", "local"), help="layers; default te on a GPU that has TransformerEngine"
    )
    parser.add_argument(
        "--fp8",
        action="append",
        default=[],
        choices=("delayed", "tensorwise", "blockwise"),
        help="recipe; may repeat",
    )
    parser.add_argument(
        "--fp8-param-gather", action="store_true", help="each recipe also with FP8 parameters"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of a sequence, half of them the response (default 4096)"
    )
    parser.add_argument("--rows", type=int, default=1, help="sequences of a microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--packing", action="store_true", help="packed rather than padded rows")
    parser.add_argument("--recompute", choices=("full", "selective"), help="actor.recompute_granularity")
    parser.add_argument("--steps", type=int, default=5, help="timed, after --warmup; medians are given")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--gpu", help="row of megasd/cluster/planner/hardware.py for the peak")
    parser.add_argument("--peak", type=float, help="bf16 FLOP/s, in place of --gpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to this JSON list")
    return parser


def shape_of(name: str, layers: int | None) -> dict[str, Any]:
    hf = (
        dict(TINY)
        if name == "tiny"
        else json.loads((ROOT / "configs" / "model" / f"{name}.json").read_text())
    )
    if layers is not None:
        hf["num_hidden_layers"] = layers
        if hf.get("layer_types"):
            hf["layer_types"] = hf["layer_types"][:layers]
    return hf


def make_batch(
    hf: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> tuple[list[Microbatch], torch.Tensor]:
    """Microbatches of random tokens and the target ids [R].

    All rows have one length; their second halves are predicted.
    """
    length, rows, half = args.tokens, args.rows, args.tokens // 2
    made, count = [], rows * half
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(length)
    for number in range(args.microbatches):
        tokens = torch.randint(hf["vocab_size"], (rows, length), generator=generator)
        # Position q predicts the token at q + 1.
        predicting = position[half - 1 : -1]
        if args.packing:
            tokens, positions = tokens.reshape(1, -1), position.repeat(rows)[None]
            index = torch.cat([row * length + predicting for row in range(rows)])
        else:
            positions = position.expand(rows, -1)
            index = torch.cat([predicting * rows + row for row in range(rows)])
        made.append(
            Microbatch(
                tokens=tokens,
                position_ids=positions,
                cu_seqlens=(
                    torch.arange(0, rows * length + 1, length, dtype=torch.int32) if args.packing else None
                ),
                max_seqlen=length,
                rows=index,
                response_index=torch.arange(number * count, (number + 1) * count),
                valid=torch.ones(count, dtype=torch.bool),
                is_filler=False,
            )
        )
    targets = torch.randint(hf["vocab_size"], (args.microbatches * count,), generator=generator)
    return [one.to(device) for one in made], targets.to(device)


class Clock:
    """Times the loss within a step, by CUDA events read after it; on a CPU by wall time."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.spans = device.type == "cuda", []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        spans, self.spans = self.spans, []
        return sum(a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in spans)


def memory(device: torch.device) -> int:
    """Peak bytes of torch's allocator; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def measure(
    name: str, hf: dict[str, Any], actor: ActorConfig, mesh: Mesh, args: argparse.Namespace
) -> dict[str, Any]:
    """Build one configuration, warm it up, time it, and return its row."""
    device, clock = mesh.device, Clock(mesh.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    family = config_from_hf(hf)
    config = build.transformer_config(family, actor, device)
    model = build.build_model(family, config, actor, mesh, local_spec=args.spec == "local")
    ddp = build.wrap_data_parallel(model, config, actor)
    optimizer, _ = build.build_optimizer(ddp, OptimizerConfig(), actor, num_steps=args.steps)
    built = memory(device)
    microbatches, targets = make_batch(hf, args, device)
    spec, teacher = LogProbsSpec(hf["vocab_size"], "student", min(TOP_K, hf["vocab_size"])), {}
    scale = 1.0 / len(targets)

    def loss_fn(log_probs: LogProbs, tokens: slice) -> tuple[torch.Tensor, dict]:
        return (
            divergence(log_probs.student_logq_TB, log_probs.teacher_logq_TB, beta=0.5, normalised=True)
            * scale,
            {},
        )

    def loss(microbatch: Microbatch, hidden: torch.Tensor) -> tuple:
        weight = model.output_weight()
        if "hidden" not in teacher:
            teacher["hidden"] = (hidden.detach() + 0.1 * torch.randn_like(hidden)).to(weight.dtype)
        start = clock.now()
        head = TeacherHead(teacher["hidden"], weight.detach())
        value, _ = fused_linear_loss(
            hidden.to(weight.dtype), weight, targets[microbatch.response_index], spec, loss_fn,
            teacher=head, tp_group=None, memory_bytes=actor.loss_memory_mib * 2**20,
        )  # fmt: skip
        clock.spans.append((start, clock.now()))
        losses.append(value.detach())
        return megatron_loss(value)

    steps, shares, values = [], [], []
    for step in range(args.warmup + args.steps):
        losses: list[torch.Tensor] = []
        wait(device)
        start = time.perf_counter()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        run_microbatches(ddp, microbatches, mesh, config, loss, forward_only=False)
        _, norm, _ = optimizer.step()
        wait(device)
        taken = time.perf_counter() - start
        spent = clock.seconds()
        values.append(float(sum(losses)))
        if step >= args.warmup:
            steps.append(taken)
            shares.append(spent / taken)
    seconds, sequences = statistics.median(steps), args.rows * args.microbatches
    work = 3 * sequences * flops.forward_flops(hf, args.tokens, args.tokens // 2)
    found = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "seconds_all": steps,
        "tokens_per_second": sequences * args.tokens / seconds,
        "tflops_per_second": work / seconds / 1e12,
        "mfu": work / seconds / args.peak if args.peak else None,
        "loss_share": statistics.median(shares),
        "built_bytes": built,
        "peak_bytes": memory(device),
        "first_loss": values[0],
        "last_loss": values[-1],
        "grad_norm": float(norm),
        "actor": {k: v for k, v in asdict(actor).items() if v != asdict(ActorConfig())[k]},
    }
    return found


def wait(device: torch.device) -> None:
    """Wait until the GPU has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def configurations(args: argparse.Namespace) -> dict[str, ActorConfig]:
    """bf16, then each FP8 recipe; all else equal."""
    first = {"packing": args.packing, "recompute_granularity": args.recompute, "micro_batch_size": args.rows}
    made = {"bf16": ActorConfig(**first)}
    for recipe in args.fp8:
        fp8 = first | {"fp8": "hybrid", "fp8_recipe": recipe, "first_last_layers_bf16": recipe != "delayed"}
        made[f"fp8 {recipe}"] = ActorConfig(**fp8)
        if args.fp8_param_gather:
            made[f"fp8 {recipe} parameters"] = ActorConfig(**fp8, fp8_param_gather=True)
    return made


def main(argv: list[str]) -> int:
    parser = options()
    args = parser.parse_args(argv)
    if args.device == "cpu" and torch.cuda.is_available():
        parser.error("--device cpu: hide the GPU instead (CUDA_VISIBLE_DEVICES=)")
    args.spec = args.spec or ("te" if args.device == "cuda" and find_spec("transformer_engine") else "local")
    if args.spec == "local" and args.fp8:
        parser.error("--fp8: needs --spec te, that is TransformerEngine")
    try:
        for actor in configurations(args).values():
            check_machine(actor)
    except ConfigError as error:
        parser.error(str(error))
    if args.gpu and args.gpu not in GPU_KINDS:
        parser.error(f"--gpu: one of {', '.join(GPU_KINDS)}")
    args.peak = args.peak or (GPU_KINDS[args.gpu].bf16 if args.gpu else None)
    hf = shape_of(args.model, args.layers)
    cpu_backend.install_cpu_backend()
    device = init_distributed()
    mesh = init_model_parallel(ActorConfig(), device, seed=1)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    run = {
        "commit": commit(),
        "torch": torch.__version__,
        "device": name,
        "spec": args.spec,
        "model": args.model,
        "layers": hf["num_hidden_layers"],
        "tokens": args.tokens,
        "rows": args.rows,
        "microbatches": args.microbatches,
        "peak": args.peak,
        "results": [],
    }
    print(
        f"{args.model}, {run['layers']} layers, {args.microbatches} x {args.rows} x {args.tokens} tokens,"
        f" spec {args.spec}, {name}"
    )
    print(
        f"{'':28}{'s/step':>9}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}{'loss':>7}{'built GiB':>11}"
        f"{'peak GiB':>10}"
    )
    for label, actor in configurations(args).items():
        one = measure(label, hf, actor, mesh, args)
        # the model and its optimizer hold each other
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        run["results"].append(one)
        mfu = f"{one['mfu']:7.1%}" if one["mfu"] is not None else f"{'-':>7}"
        print(
            f"{label:28}{one['seconds']:9.3f}{one['tokens_per_second']:11.0f}{one['tflops_per_second']:9.2f}{mfu}"
            f"{one['loss_share']:7.1%}{one['built_bytes'] / 2**30:11.2f}{one['peak_bytes'] / 2**30:10.2f}"
            f"   loss {one['first_loss']:.5f} -> {one['last_loss']:.5f}",
            flush=True,
        )
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*kept, run], indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
