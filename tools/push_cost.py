"""Print what a weight push costs at 8B, 32B and 70B on H100 nodes, as a markdown table.

The bytes come from the plan of weights/gather_plan.py.

    python tools/push_cost.py                                # the table of benchmarks/README.md
    python tools/push_cost.py --models Qwen2.5-72B --actors 8x2@32 --engine-tp 8

An actor TPxPP@GPUs fills its GPUs with data-parallel copies, Megatron's order (tensor parallel
innermost, pipeline outermost), 8 GPUs a node. The bytes are exact: the plan says which rank owns
which piece. The seconds are nominal bandwidths (megasd/cluster/planner/hardware.py) times one
efficiency; formulas and assumptions: megasd/cluster/planner/push.py. NOTHING HERE WAS MEASURED ON A
GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasd.cluster.planner.push import (
    EFFICIENCY,
    FIXED,
    H100,
    NVME_READ,
    NVME_WRITE,
    REQUEST,
    SHM_READ,
    SHM_WRITE,
    Received,
    disk_seconds,
    gather_seconds,
    group_seconds,
    ipc_seconds,
    push_seconds,
)
from megasd.models import registry, tp_layouts
from megasd.weights.gather_plan import GatherPlan, Holding, make_gather_plan

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"
__all__ = ["EFFICIENCY", "FIXED", "HBM", "IB", "NVLINK", "PCIE", "REQUEST", "Layout", "Received"]
# GPUs of a node.
GPUS = 8
HBM, NVLINK, IB, PCIE = H100.hbm, H100.nvlink, H100.network, H100.pcie


@dataclass(frozen=True)
class Layout:
    """An actor's tensor- and pipeline-parallel sizes, and the GPUs that its copies fill."""

    tp: int
    pp: int
    gpus: int

    def rank(self, stage: int, tp_rank: int) -> int:
        """World rank in the first data-parallel copy."""
        return stage * (self.gpus // self.pp) + tp_rank

    @staticmethod
    def parse(text: str) -> Layout:
        """ "4x2@16" -> Layout(4, 2, 16)."""
        sizes, _, gpus = text.partition("@")
        tp, _, pp = sizes.partition("x")
        layout = Layout(int(tp), int(pp or 1), int(gpus or GPUS))
        if layout.gpus % (layout.tp * layout.pp):
            raise ValueError(f"{text}: {layout.gpus} GPUs are no multiple of {layout.tp} x {layout.pp}")
        return layout

    def __str__(self) -> str:
        return (
            f"TP{self.tp} PP{self.pp} DP{self.gpus // self.tp // self.pp}, {-(-self.gpus // GPUS)}"
            f" node{'s' * (self.gpus > GPUS)}"
        )


def holdings(hf: Mapping[str, Any], layout: Layout) -> Iterator[Holding]:
    """What the ranks of the first data-parallel copy hold: layers in equal stages, bfloat16."""
    table = registry.param_table(hf)
    if table.num_layers % layout.pp:
        raise ValueError(f"{table.num_layers} layers in {layout.pp} stages: not equal")
    per_stage = table.num_layers // layout.pp
    for stage in range(layout.pp):
        names = [name for name in table.names() if _stage(name, per_stage, layout.pp) == stage]
        for tp_rank in range(layout.tp):
            params = {}
            for name in names:
                rule = table.rule(name)
                shapes = tuple(rule.parts.values())
                rows = tp_layouts.padded_vocab_size(shapes[0][0], 128, layout.tp) // layout.tp
                more = {"rows": rows} if rule.layout is tp_layouts.vocab else {}
                params[name] = (rule.layout(shapes, tp_rank, layout.tp, **more).shape, torch.bfloat16)
            yield Holding(layout.rank(stage, tp_rank), tp_rank, layout.tp, 1, params)


def _stage(name: str, per_stage: int, stages: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // per_stage
    return 0 if name.startswith("embedding.") else stages - 1


def received(plan: GatherPlan) -> Received:
    """Bytes that reach rank 0, with the padding of the vocabulary, since shards travel whole."""
    found = [0, 0, 0]
    for bucket in plan.buckets:
        for param in bucket.params:
            for piece in param.pieces:
                where = 0 if piece.owner == 0 else 1 if piece.owner < GPUS else 2
                found[where] += torch.Size(piece.layout.shape).numel() * param.dtype.itemsize
    return Received(*found)


def row(model: str, layout: Layout, engine_tp: int, bucket_mib: int) -> dict[str, Any]:
    """A row: one actor, and engines of one size on a node."""
    hf = json.loads((CONFIGS / f"{model}.json").read_text())
    plan = make_gather_plan(
        registry.param_table(hf), list(holdings(hf, layout)), bucket_bytes=bucket_mib << 20
    )
    bytes_, buckets = received(plan), len(plan.buckets)
    gather, engines = gather_seconds(bytes_), GPUS // engine_tp
    memory = disk_seconds(plan.nbytes, engine_tp, SHM_WRITE, SHM_READ)
    drive = disk_seconds(plan.nbytes, engine_tp, NVME_WRITE * EFFICIENCY, NVME_READ * EFFICIENCY)
    return {
        "model": model,
        "actor": str(layout),
        "engine": f"TP{engine_tp}",
        "GB": plan.nbytes / 1e9,
        "buckets": buckets,
        "from NVLink GB": bytes_.same_node / 1e9,
        "from IB GB": bytes_.other_nodes / 1e9,
        "gather s": gather,
        "colocated, IPC s": push_seconds(gather, ipc_seconds(plan.nbytes, engine_tp, engines), buckets),
        "group, NVLink s": push_seconds(gather, group_seconds(plan.nbytes, NVLINK, engine_tp), buckets),
        "group, IB s": push_seconds(gather, group_seconds(plan.nbytes, IB, engine_tp), buckets),
        "disk, shm s": push_seconds(gather, memory[0], buckets, memory[1]),
        "disk, NVMe s": push_seconds(gather, drive[0], buckets, drive[1]),
    }


DEFAULT = {
    "Qwen3-8B": (("1x1@8", "2x1@8", "4x2@8", "4x2@16"), 1),
    "Qwen3-32B": (("8x1@8", "4x2@8", "8x2@16"), 2),
    "Llama-3.1-70B": (("8x1@8", "8x2@16", "8x4@32"), 8),
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * 3 + "---:|" * (len(rows[0]) - 3)]
    for row in rows:
        cells = [
            f"{v:.2f}" if isinstance(v, float) and v < 10 else f"{v:.1f}" if isinstance(v, float) else str(v)
            for v in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help="files of configs/model without .json (default: " + " ".join(DEFAULT) + ")",
    )
    parser.add_argument("--actors", nargs="+", type=Layout.parse, metavar="TPxPP@GPUS")
    parser.add_argument("--engine-tp", type=int, choices=(1, 2, 4, 8), help="default 1, 2, 8 by model")
    parser.add_argument("--bucket-mib", type=int, default=512)
    arguments = parser.parse_args(argv)
    rows = []
    for model in arguments.models or DEFAULT:
        actors, engine_tp = DEFAULT.get(model, (("8x1@8",), 8))
        for layout in arguments.actors or map(Layout.parse, actors):
            rows.append(row(model, layout, arguments.engine_tp or engine_tp, arguments.bucket_mib))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
