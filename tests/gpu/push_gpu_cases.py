"""A random 8B model pushed into a real SGLang engine on CUDA.

    push_gpu_cases.py ROOT TRANSPORT

test_push_gpu.py runs it under torchrun. With TRANSPORT=group the engine runs on the second GPU, and
the run gets its URL: NCCL refuses two ranks on one GPU.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megasd.actor import model as build
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import ActorConfig, EngineConfig, RolloutConfig, SyncConfig
from megasd.engine.client import EngineClient
from megasd.engine.sampler import make_sampler
from megasd.models import registry
from megasd.models.param_table import global_params
from megasd.weight_sync.sync import WeightSync
from megasd.weights.export import plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import HFWriter, read_hf_config
from megasd.weights.load import load_hf

PUBLISHED = Path(__file__).resolve().parents[2] / "configs" / "model" / "Qwen3-8B.json"


def write_random(directory: Path) -> Path:
    """A checkpoint of the published sizes with random bfloat16 weights, tensor by tensor."""
    hf = json.loads(PUBLISHED.read_text())
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    generator = torch.Generator(device="cuda").manual_seed(0)
    with HFWriter(directory, directory) as writer:
        for name, shape in registry.param_table(hf).expected_tensors().items():
            if "norm" in name:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = (0.02 * torch.randn(shape, generator=generator, device="cuda")).bfloat16().cpu()
            writer.add(name, tensor)
    return directory


class Weights:
    """The model of an actor without its optimizer, which would not fit next to an engine."""

    is_fp8 = False

    def __init__(self, path: Path, device: torch.device) -> None:
        config, family = ActorConfig(), build.family_of(str(path))
        mesh = init_model_parallel(config, device, seed=1)
        self.hf, self.device = read_hf_config(path), device
        self.model = build.build_model(family, build.transformer_config(family, config, device), config, mesh)
        self.params = global_params(dict(self.model.named_parameters()))
        load_hf(self.params, path, tp_rank=0, tp_size=1)

    def gather(self, *, dtype: torch.dtype | None, bucket_bytes: int, make_buffer: object) -> Gather:
        plan = plan_of(self.params, self.hf, bucket_bytes=bucket_bytes, dtype=dtype)
        return Gather(plan, self.params, device=self.device, make_buffer=make_buffer)


def start_elsewhere(settings: EngineConfig, model: Path, root: Path) -> EngineClient:
    """An engine on the second GPU, which answers."""
    engine = EngineClient(
        settings,
        index=1,
        model_path=str(model),
        device="cuda",
        dtype="bfloat16",
        log_path=root / "other.log",
        seed=1,
    )

    async def start() -> None:
        engine.launch()
        try:
            await engine.wait_ready()
        finally:
            await engine.disconnect()

    try:
        asyncio.run(start())
    except BaseException:
        engine.kill()
        raise
    return engine


def main(root: Path, transport: str) -> None:
    device, model = init_distributed(), write_random(root / "model")
    engine = EngineConfig(mem_fraction_static=0.4)
    other = start_elsewhere(engine, model, root) if transport == "group" else None
    if other is not None:
        engine = replace(engine, urls=[other.url])
    rollout = make_sampler(
        RolloutConfig(engine=engine),
        model_path=str(model),
        device="cuda",
        dtype="bfloat16",
        run_dir=root,
        seed=1,
        stop_token_ids=[151645],
        vocab_size=151936,
    )
    rollout.pool.launch()
    try:
        actor = Weights(model, device)
        rollout.pool.wait_ready()
        settings = SyncConfig(transport=transport, verify="full", verify_every=0)
        with WeightSync(
            actor, rollout, settings, root / "run", model_path=str(model), probes=[], device=device
        ) as sync:
            for version in range(4):
                with torch.no_grad():
                    for param in actor.params.values():
                        param.mul_(1.001)
                metrics = sync.push(version)
                print(
                    f"{transport} push {version}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()),
                    flush=True,
                )
        settings = SyncConfig(transport=transport, verify_every=0)
        with WeightSync(
            actor, rollout, settings, root / "run", model_path=str(model), probes=[], device=device
        ) as sync:
            for version in range(4, 8):
                print(
                    f"{transport} push {version}, unverified: {sync.push(version)['sync/seconds']:.3f} s",
                    flush=True,
                )
    finally:
        rollout.pool.close()
        if other is not None:
            other.kill()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
