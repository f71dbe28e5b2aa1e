"""Convert a large random model both ways: seconds, peak memory, and the result after kill -9.

    python tools/bench_convert.py --dir /tmp/bench_convert --kills 10 --json convert.json

Makes a bfloat16 model in Qwen3's shape (2.3 GiB, shards of about 0.6 GiB, 2048 wide, 151936 tokens)
and removes the directory at the end. Every conversion is a process of its own, `megasd convert`;
peak memory is its VmHWM, which it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch

from megasd.models import registry
from megasd.weights import hf_files as files
from megasd.weights.safetensors_io import RawShards, as_bytes

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def make_model(directory: Path, layers: int, shard_bytes: int) -> None:
    """Write a random checkpoint, with one tensor in memory at a time."""
    source = directory.with_name(directory.name + "-config")
    source.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    generator, files.SHARD_BYTES = torch.Generator().manual_seed(0), shard_bytes
    with files.HFWriter(directory, source, torch.bfloat16) as writer:
        for name, shape in registry.param_table(config).expected_tensors().items():
            writer.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator))


def command(source: Path, target: Path, file_mib: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "megasd.cli",
        "convert",
        str(source),
        str(target),
        "--file-mib",
        str(file_mib),
    ]


def convert(source: Path, target: Path, file_mib: int) -> dict[str, float]:
    """Convert, and return seconds and MiB as the tool prints them."""
    done = subprocess.run(command(source, target, file_mib), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    seconds, peak, before = re.search(
        r"([\d.]+) s; peak memory (\d+) MiB \(VmHWM of this process; (\d+) MiB", done.stdout
    ).groups()
    print(done.stdout, end="", flush=True)
    return {"seconds": float(seconds), "peak_mib": float(peak), "libraries_mib": float(before)}


def convert_killed(
    source: Path, target: Path, file_mib: int, kills: int, seconds: float, rng: random.Random
) -> list[int]:
    """Kill the conversion `kills` times at random moments, then let it end.

    Returns the number of whole files at each kill. A conversion that ends before its kill is thrown
    away and begins again.
    """
    whole: list[int] = []
    while len(whole) < kills:
        process = subprocess.Popen(command(source, target, file_mib), stdout=subprocess.DEVNULL)
        # Imports take 1.5 s.
        time.sleep(1.5 + rng.uniform(0, seconds / 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            shutil.rmtree(target)
        else:
            whole.append(len(list(target.with_name(target.name + ".partial").glob(".done/*.json"))))
    convert(source, target, file_mib)
    return whole


def sums(directory: Path) -> dict[str, int]:
    """CRC-32 of every file below a directory."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(16 << 20):
                crc = zlib.crc32(block, crc)
        found[str(path.relative_to(directory))] = crc
    return found


def tensor_sums(directory: Path) -> dict[str, int]:
    """CRC-32 of every tensor of a Hugging Face directory."""
    with ExitStack() as stack:
        shards = RawShards(directory, {path.name for path in directory.glob("*.safetensors")}, stack)
        return {
            name: zlib.crc32(as_bytes(shards.read(name, 0, place.shape[0])))
            for name, place in shards.places.items()
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/tmp/megasd_bench_convert"))
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--shard-mib", type=int, default=600)
    parser.add_argument(
        "--file-mib", type=int, default=256, help="of the conversions: what one kill can cost"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        help="kill -9 each direction at so many random points and compare the results",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root, rng = arguments.dir, random.Random(0)
    shutil.rmtree(root, ignore_errors=True)
    hf, megatron, back = root / "hf", root / "megatron", root / "back"
    make_model(hf, arguments.layers, arguments.shard_mib << 20)
    shards = [path.stat().st_size for path in hf.glob("*.safetensors")]
    print(
        f"model: {sum(shards) / 2**30:.2f} GiB in {len(shards)} shards, the largest"
        f" {max(shards) / 2**20:.0f} MiB",
        flush=True,
    )
    record: dict[str, object] = {
        "command": " ".join(sys.argv),
        "cores": os.cpu_count(),
        "model_bytes": sum(shards),
        "largest_shard_mib": max(shards) / 2**20,
    }
    ok = True
    for name, source, target in (("to_megatron", hf, megatron), ("to_hf", megatron, back)):
        found = convert(source, target, arguments.file_mib)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, root / "copy"], check=True)
        subprocess.run(["sync", root / "copy"], check=True)
        found["copy_seconds"] = time.perf_counter() - start
        shutil.rmtree(root / "copy")
        found["peak_over_largest_shard"] = found["peak_mib"] / record["largest_shard_mib"]
        ok &= found["peak_over_largest_shard"] < 2
        if arguments.kills:
            wanted = sums(target)
            target.rename(root / "whole")
            found["whole_files_at_kills"] = convert_killed(
                source, target, arguments.file_mib, arguments.kills, found["seconds"], rng
            )
            found["equal_after_kills"] = sums(target) == wanted
            ok &= found["equal_after_kills"]
            shutil.rmtree(root / "whole")
        record[name] = found
    record["round_trip_equal"] = tensor_sums(hf) == tensor_sums(back)
    print(json.dumps(record, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(root)
    return 0 if ok and record["round_trip_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
