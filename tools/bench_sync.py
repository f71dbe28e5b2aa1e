"""Push weights into a real SGLang engine: seconds and bytes by transport, bucket size and layout.

    # TP1, TP2, PP2, all transports, about 500 MB; under 5 minutes
    python tools/bench_sync.py --quick --json quick.json
    python tools/bench_sync.py --json all.json                         # also bucket sizes
    python tools/bench_sync.py --engine-tp 2 --layouts TP2 --transports group --bucket-mib 16 64 256

The floor is the same bytes copied once in memory and written once as a safetensors file, timed
before every push in the same process. What is measured, and how: benchmarks/README.md. The exit
code is 1 when a push fails or an engine does not hold what was sent.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_kernel import ROOT, commit, machine

from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.engine.sampler import make_sampler
from megasd.models import registry
from megasd.weights.hf_files import write_weights

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, dict[str, int]] = {"TP1": {}, "TP2": {TP: 2}, "PP2": {PP: 2}, "TP2xPP2": {TP: 2, PP: 2}}
TRANSPORTS = ("disk", "group", "colocated")
FULL = {
    "layouts": ["TP1", "TP2", "PP2"],
    "transports": list(TRANSPORTS),
    "bucket_mib": [24, 64, 256],
    "engine_tp": [1],
    "repeats": 7,
}
QUICK = FULL | {"bucket_mib": [24], "repeats": 5}


def model_config(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """config.json of a Qwen3 with 16 query heads, 4 key heads and an MLP three times as wide."""
    published = json.loads((ROOT / "configs" / "model" / "Qwen3-8B.json").read_text())
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    heads = {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": hidden // 16,
        "max_window_layers": layers,
    }
    return (
        published | sizes | heads | {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 3}
    )


def write_random(directory: Path, hf: dict[str, Any]) -> Path:
    """A random bfloat16 checkpoint."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in registry.param_table(hf).expected_tensors().items():
        scale = torch.full(shape, 0.02, dtype=torch.bfloat16)
        tensors[name] = scale.normal_(0, 0.02, generator=generator) if "norm" not in name else scale.fill_(1)
    write_weights(tensors, directory, directory)
    return directory


def ranks_of(layout: str) -> int:
    """Ranks of an actor layout."""
    sizes = LAYOUTS[layout]
    return sizes.get(TP, 1) * sizes.get(PP, 1)


def run_layout(layout: str, job: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Measure one layout by ranks under a torchrun of its own; return its rows."""
    path, out, log = (directory / f"{layout}.{suffix}" for suffix in ("job.json", "rows.json", "log"))
    out.unlink(missing_ok=True)
    path.write_text(json.dumps(job | {"layout": layout, "actor": LAYOUTS[layout], "out": str(out)}))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks_of(layout)}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, str(ROOT / "tools" / "bench_sync_rank.py"), str(path)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            # torchrun ends its ranks too.
            process.terminate()
            process.wait()
    if code or not out.is_file():
        print("\n".join(log.read_text().splitlines()[-60:]), file=sys.stderr)
        words = re.findall(r"^(?:\[rank\d\]: )?(\w*(?:Error|Exception)\b.*)", log.read_text(), re.MULTILINE)
        error = f"exit {code}: {words[0] if words else 'see above'}"
        return [
            {"layout": layout, "transport": name, "verified": False, "error": error}
            for name in job["transports"]
        ]
    return json.loads(out.read_text())


def headline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per transport: the row with the largest ratio at the first bucket size.

    An entry is verified if all rows of its transport are.
    """
    found = []
    for transport in dict.fromkeys(row["transport"] for row in rows):
        mine = [row for row in rows if row["transport"] == transport]
        timed = [row for row in mine if "seconds" in row and row["bucket_mib"] == mine[0]["bucket_mib"]]
        entry = {"transport": transport, "seconds": None, "bytes": None, "ratio_to_copy_and_write": None}
        if timed:
            worst = max(timed, key=lambda row: row["ratio_to_copy_and_write"])
            entry = {key: worst[key] for key in entry}
        found.append(entry | {"verified": bool(timed) and all(row["verified"] for row in mine)})
    return found


def heading() -> str:
    columns = ("begin", "gather", "send", "commit")
    return (
        f"{'actor':<8}{'engine':>6}{'MiB':>5}"
        f" {'transport':<10}{'MB':>6}{'seconds':>9}{'(spread)':>16}{'ratio':>7}"
        + "".join(f"{name:>8}" for name in columns)
        + f"{'copy':>8}{'write':>8}{'peak MB':>9}{'verify s':>9}  plans, verified"
    )


def line(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return f"{row['layout']:<8}{row['transport']:<10} FAILED: {row['error']}"
    phases = "".join(f"{row['phases'][name]:8.3f}" for name in ("begin", "gather", "send", "commit"))
    floor, spread = row["floor"], "({:.3f}-{:.3f})".format(*row["spread"])
    head = (
        f"{row['layout']:<8}{'TP' + str(row['engine_tp']):>6}{row['bucket_mib']:5}"
        f" {row['transport']:<10}{row['bytes'] / 1e6:6.0f}"
    )
    return (
        f"{head}{row['seconds']:9.3f}{spread:>16}{row['ratio_to_copy_and_write']:7.2f}{phases}"
        f"{floor['copy_warm']:8.3f}{floor['write_memory']:8.3f}{row['peak_bytes'] / 1e6:9.0f}"
        f"{row['verified_seconds']:9.2f}"
        f"  {row['plans_made']}, {'yes' if row['verified'] else 'NO: ' + row['error']}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one bucket size (sync.bucket_mib's default); the other options still count",
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=list(LAYOUTS), help="of the actor (default TP1 TP2 PP2)"
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, help="default: all")
    parser.add_argument("--bucket-mib", type=int, nargs="+", help="default 24 64 256; --quick 24")
    parser.add_argument(
        "--engine-tp", type=int, nargs="+", help="tensor-parallel size of the engine (default 1)"
    )
    parser.add_argument("--repeats", type=int, help="timed pushes of each row (default 7; --quick 5)")
    parser.add_argument(
        "--hidden",
        type=int,
        default=2048,
        help="a multiple of 32 (default 2048: 520 MB with the other defaults)",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument(
        "--memory",
        type=Path,
        default=Path("/dev/shm"),
        help="where the floor's file is written (default /dev/shm)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.repeats < 1 or min(arguments.bucket_mib) < 1 or min(arguments.engine_tp) < 1:
        parser.error("--repeats, --bucket-mib and --engine-tp must be 1 or more")
    if arguments.hidden % 32 or arguments.layers % 2:
        parser.error("--hidden must be a multiple of 32 and --layers of 2")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    # A SIGTERM then ends the engines and removes the files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, load, rows = time.time(), os.getloadavg(), []
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tools/bench_sync.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "torch": torch.__version__,
    }
    with (
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory(dir=arguments.memory) as memory,
    ):
        directory, hf = Path(temporary), model_config(arguments.hidden, arguments.layers, arguments.vocab)
        model = write_random(directory / "model", hf)
        print(heading(), flush=True)
        for size in arguments.engine_tp:
            engine = EngineConfig(tensor_parallel_size=size, max_total_tokens=4096)
            with make_sampler(
                RolloutConfig(engine=engine),
                model_path=str(model),
                device="cpu",
                dtype="bfloat16",
                run_dir=directory / f"engine{size}",
                seed=1,
                stop_token_ids=[],
                vocab_size=arguments.vocab,
            ) as rollout:
                job = {
                    "model": str(model),
                    "run_dir": str(directory / "run"),
                    "memory": memory,
                    "urls": [rollout.pool.engines[0].url],
                    "engine_tp": size,
                    "vocab_size": arguments.vocab,
                    "transports": arguments.transports,
                    "bucket_mib": arguments.bucket_mib,
                    "repeats": arguments.repeats,
                }
                (directory / "run").mkdir(exist_ok=True)
                for layout in arguments.layouts:
                    here = run_layout(layout, job, directory)
                    print("\n".join(line(row) for row in here), flush=True)
                    rows += here
    record |= {
        "machine": machine() | {"load_at_start": load, "load_at_end": os.getloadavg()},
        "model": {
            "hidden": arguments.hidden,
            "layers": arguments.layers,
            "vocab": arguments.vocab,
            "dtype": "bfloat16",
        },
        "seconds": time.time() - started,
        "transports": headline(rows),
        "rows": rows,
    }
    for entry in record["transports"]:
        print(json.dumps(entry))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(entry["verified"] for entry in record["transports"]) else 1


if __name__ == "__main__":
    sys.exit(main())
