"""Run by test_weights.py on 4 gloo ranks; its argument is a directory of tiny checkpoints, named
after their families.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megasd.actor import cpu_backend
from megasd.actor.parallel import Mesh, init_distributed, init_model_parallel
from megasd.config.schema import ActorConfig
from megasd.models import registry
from megasd.models.param_table import global_params
from megasd.weights.export import export_hf, plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.tiny_weights import transformers_logps

IDS = [1, 5, 9, 2, 44, 95, 7, 3]
# name -> family, layout; 4 ranks, what is left over is data parallelism. Every family in the common
# layouts: family_cases.py
CASES = {
    "TP2 DP2": ("qwen3", {"tensor_model_parallel_size": 2}),
    "PP4 tied": ("qwen3_tied", {"pipeline_model_parallel_size": 4}),
    "TP2 PP2 tied": ("qwen3_tied", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "MoE TP2 DP2, experts cut": ("qwen3_moe", {"tensor_model_parallel_size": 2}),
    "MoE EP4": ("qwen3_moe", {"expert_model_parallel_size": 4}),
    "MoE PP2 EP2": ("qwen3_moe", {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}


class MegatronActor:
    """A model of this layout with a checkpoint's weights."""

    def __init__(self, path: Path, layout: dict[str, int]) -> None:
        from megasd.actor import model as build

        config = ActorConfig(dtype="float32", **layout)
        self.mesh: Mesh = init_model_parallel(config, torch.device("cpu"), seed=1)
        self.hf, family = read_hf_config(path), build.family_of(str(path))
        transformer = build.transformer_config(family, config, self.mesh.device)
        self.model, offset = (
            build.build_model(family, transformer, config, self.mesh),
            build.layer_offset(transformer),
        )
        mesh = self.mesh
        first_expert = registry.param_table(self.hf).num_experts // mesh.ep_size * mesh.ep_rank
        self.params = global_params(
            dict(self.model.named_parameters()), layer_offset=offset, expert_offset=first_expert
        )
        with torch.no_grad():
            for param in self.model.parameters():
                param.fill_(torch.nan)
        ranks = {
            "tp_rank": mesh.tp_rank,
            "tp_size": mesh.tp_size,
            "ep_rank": mesh.ep_rank,
            "ep_size": mesh.ep_size,
        }
        load_hf(self.params, path, **ranks)

    def export_hf(self, dtype: torch.dtype | None = None, bucket_bytes: int = 256 << 20) -> dict[str, Tensor]:
        """Whole on world rank 0, empty elsewhere."""
        mesh = self.mesh
        ranks = {"tp_rank": mesh.tp_rank, "tp_size": mesh.tp_size, "ep_size": mesh.ep_size}
        plan = plan_of(self.params, self.hf, dtype=dtype, bucket_bytes=bucket_bytes, **ranks)
        return {name: tensor.clone() for name, tensor in export_hf(Gather(plan, self.params, rank=mesh.rank))}

    @torch.no_grad()
    def score_tokens(self, ids: list[int]) -> list[float]:
        """Without pipelining: every rank runs the same sequence, then gathers the vocabulary shards."""
        self.model.eval()
        # [s, 1, h]
        hidden = self.model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0), None)
        local = (hidden[:, 0] @ self.model.output_weight().T).contiguous()
        shards = [torch.empty_like(local) for _ in range(self.mesh.tp_size)]
        dist.all_gather(shards, local, group=self.mesh.tp_group)
        logps = torch.cat(shards, dim=-1)[:-1, : self.hf["vocab_size"]].log_softmax(-1)
        return logps.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1).tolist()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], case: str) -> None:
    assert found.keys() == wanted.keys(), case
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{case}: {name}"


def round_trip(name: str, path: Path, layout: dict[str, int]) -> MegatronActor:
    """Load into a real GPTModel, export: the file again, bit for bit; logits those of transformers."""
    actor, stored, rank = MegatronActor(path, layout), load_file(path / "model.safetensors"), dist.get_rank()
    assert not any(param.isnan().any() for param in actor.model.parameters()), name
    mesh = actor.mesh
    # one bucket; most tensors alone
    for bucket_bytes in (256 << 20, 5000):
        same(actor.export_hf(bucket_bytes=bucket_bytes), stored if rank == 0 else {}, name)
    same(
        actor.export_hf(dtype=torch.bfloat16),
        {n: t.bfloat16() for n, t in stored.items()} if rank == 0 else {},
        name,
    )
    if mesh.pp_size == 1:
        logps = torch.tensor(actor.score_tokens(IDS))
        # the only one to import transformers
        if rank == 0:
            difference = (logps - torch.tensor(transformers_logps(hf_model(path), IDS))).abs().max().item()
            assert difference < 2e-5, f"{name}: log-probs {difference} from transformers"
    return actor


def hf_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def main(root: Path) -> None:
    cpu_backend.install_cpu_backend()
    init_distributed(timeout_minutes=20)
    for name, (family, layout) in CASES.items():
        start = time.perf_counter()
        actor = round_trip(name, root / family, layout)
        dist.barrier()
        before = time.perf_counter()
        actor.export_hf()
        dist.barrier()
        if dist.get_rank() == 0:
            now = time.perf_counter()
            print(f"ok {name}: {now - start:.2f} s, an export {1e3 * (now - before):.0f} ms", flush=True)
    if dist.get_rank() == 0:
        print("ok all", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
