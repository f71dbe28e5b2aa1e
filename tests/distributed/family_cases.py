"""Run by test_families.py on 4 gloo ranks; its argument: a directory of tiny checkpoints with
reference.safetensors, named after MODELS.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from safetensors.torch import load_file
from torch import Tensor

from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh, init_distributed, init_model_parallel
from megasd.batch.microbatch import Microbatch, make_microbatches
from megasd.config.schema import ActorConfig, OptimizerConfig
from megasd.loss.megatron_scaling import megatron_loss
from megasd.models import registry, tp_layouts
from megasd.models.param_table import global_params
from megasd.types import UserError
from megasd.weights.export import export_hf, plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.families_reference import VOCAB, make_batch
from tests.te_stand_ins import transformer_engine_spec
from tests.tiny_weights import MODELS

TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
SP = {"sequence_parallel": True}
ALL, MOE, WINDOWS = tuple(MODELS), ("qwen3_moe",), ("mistral_window", "olmo3")
MAIN = tuple(
    family
    for family in ALL
    if family not in ("qwen2_yarn", "qwen2_tied", "llama_tied", "llama_mqa", "mistral")
)
# layout -> families; 4 ranks, what is left over is data parallelism
CASES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "tp1": ({}, ALL),
    "tp2": ({TP: 2}, MAIN),
    "tp2 sp packed": ({TP: 2, **SP, "packing": True}, ALL),
    "tp4": ({TP: 4}, ALL),
    "pp2": ({PP: 2}, ALL),
    "tp2 pp2 sp recompute": ({TP: 2, PP: 2, **SP, "recompute_granularity": "full"}, MAIN),
    "cp2": ({CP: 2}, WINDOWS),
    "cp2 tp2 packed": ({CP: 2, TP: 2, "packing": True}, WINDOWS),
    "ep2": ({EP: 2}, MOE),
    "tp2 ep2 sp": ({TP: 2, EP: 2, **SP}, MOE),
    "pp2 ep2": ({PP: 2, EP: 2}, MOE),
}
# The GPU's layer spec with stand-ins for its modules (tests/te_stand_ins.py): TransformerEngine's
# parameter names.
TE_NAMES, TE_FAMILIES = (
    "tp2 pp2 sp, names of TransformerEngine",
    ("qwen2", "qwen3_moe", "llama_tied", "mistral_window", "olmo2", "olmo3"),
)
# largest difference; largest relative difference (Frobenius) of a parameter's gradient
LOGITS, GRADIENTS = 1e-4, 1e-4


class FamilyModel:
    """A family's GPTModel in one layout (or the virtual stages of one), with a checkpoint's weights."""

    def __init__(self, path: Path, actor: dict, mesh: Mesh, virtual_stages: int | None = None) -> None:
        self.mesh, self.hf = mesh, read_hf_config(path)
        fixed = {"dtype": "float32", "make_vocab_size_divisible_by": 20, "use_distributed_optimizer": False}
        self.actor = ActorConfig(**(fixed | actor))
        family = build.family_of(str(path))
        self.config = build.transformer_config(family, self.actor, mesh.device)
        self.config.virtual_pipeline_model_parallel_size = virtual_stages
        self.table = registry.param_table(self.hf)
        # Megatron refuses to train experts under tensor parallelism without sequence parallelism.
        self.trains = mesh.tp_size == 1 or self.actor.sequence_parallel or not self.table.num_experts
        self.chunks, self.params = [], {}
        for stage in range(virtual_stages) if virtual_stages else (None,):
            chunk = build.build_model(family, self.config, self.actor, mesh, vp_stage=stage)
            with torch.no_grad():
                for param in chunk.parameters():
                    param.fill_(torch.nan)
            self.chunks.append(chunk)
            offset, first_expert = (
                build.layer_offset(self.config, stage),
                self.table.num_experts // mesh.ep_size * mesh.ep_rank,
            )
            self.params |= global_params(
                dict(chunk.named_parameters()), layer_offset=offset, expert_offset=first_expert
            )
        load_hf(
            self.params,
            path,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            ep_rank=mesh.ep_rank,
            ep_size=mesh.ep_size,
        )
        assert not any(param.isnan().any() for param in self.params.values())

    def export(self) -> dict[str, Tensor]:
        """Whole on world rank 0, empty elsewhere."""
        mesh = self.mesh
        plan = plan_of(
            self.params,
            self.hf,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            ep_size=mesh.ep_size,
            bucket_bytes=20_000,
        )
        return {
            name: tensor.clone()
            for name, tensor in export_hf(Gather(plan, self.params, rank=mesh.rank, device=mesh.device))
        }

    def microbatches(self) -> list[Microbatch]:
        mesh, actor, batch = self.mesh, self.actor, make_batch()
        multiple = (2 * mesh.cp_size if mesh.cp_size > 1 else 1) * (
            mesh.tp_size if actor.sequence_parallel else 1
        )
        place = {"cp_rank": mesh.cp_rank, "cp_size": mesh.cp_size, "multiple": multiple}
        return make_microbatches(batch, [[0, 1], [2]], None, packing=actor.packing, **place)

    def logits(self, hidden: Tensor, chunk: build.Backbone) -> Tensor:
        """This rank's vocabulary columns; those of padding cannot be chosen."""
        weight = chunk.output_weight()
        logits = (hidden.to(weight.dtype) @ weight.t()).float()
        real = max(0, min(logits.size(1), VOCAB - self.mesh.tp_rank * logits.size(1)))
        return torch.cat([logits[:, :real], torch.full_like(logits[:, real:], -1e30)], 1)

    def gathered(self, logits: Tensor) -> Tensor:
        shards = [torch.empty_like(logits) for _ in range(self.mesh.tp_size)]
        dist.all_gather(shards, logits.contiguous(), group=self.mesh.tp_group)
        return torch.cat(shards, 1)[:, :VOCAB]

    def forward_and_gradients(self) -> Tensor:
        """Raw logits [R, VOCAB] (zeros off the last stage) by the actor's own passes; gradients are
        left in main_grad.
        """
        (chunk,), mesh, batch = self.chunks, self.mesh, make_batch()
        ddp = build.wrap_data_parallel(chunk, self.config, self.actor)
        targets, weights = batch.response_ids.to(mesh.device), batch.streams["weight"].to(mesh.device)
        rows = torch.zeros(len(targets), VOCAB, device=mesh.device)

        def read(microbatch: Microbatch, hidden: Tensor) -> None:
            rows[microbatch.response_index[microbatch.valid]] = self.gathered(self.logits(hidden, chunk))[
                microbatch.valid
            ]

        def loss(microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            with torch.no_grad():
                read(microbatch, hidden)
            if not self.config.sequence_parallel:
                hidden = copy_to_tensor_model_parallel_region(hidden)
            nll = vocab_parallel_cross_entropy(self.logits(hidden, chunk), targets[microbatch.response_index])
            return megatron_loss(
                (nll * weights[microbatch.response_index] * microbatch.valid / mesh.dp_size).sum()
            )

        # elsewhere the training pass alone, for time
        if mesh.tp_size == 1 or not self.trains:
            chunk.eval()
            run_microbatches(ddp, self.microbatches(), mesh, self.config, read, forward_only=True)
        scored = rows.clone()
        if self.trains:
            rows.zero_()
            chunk.train()
            ddp.zero_grad_buffer()
            run_microbatches(ddp, self.microbatches(), mesh, self.config, loss, forward_only=False)
            self.optimizer, _ = build.build_optimizer(ddp, OptimizerConfig(), self.actor, num_steps=1)
            if mesh.tp_size == 1:
                torch.testing.assert_close(
                    rows, scored, rtol=0, atol=LOGITS if self.actor.dtype == "float32" else 0.1
                )
        if mesh.cp_size > 1:
            dist.all_reduce(rows, group=mesh.cp_group)
        return rows

    def worst_gradient(self, reference: dict[str, Tensor]) -> tuple[float, str]:
        """Largest relative difference of this rank's gradients from the parts that the table cuts
        out of transformers' gradients.
        """
        mesh, worst = self.mesh, (0.0, "")
        for name, param in self.params.items() if self.trains else ():
            rule, shape = self.table.rule(name), tuple(param.shape)
            layout = rule.shard(
                shape, *((mesh.tp_rank, mesh.tp_size) if rule.is_cut(shape, mesh.ep_size) else (0, 1))
            )
            wanted = tp_layouts.split([reference[f"grad.{part}"] for part in rule.parts], layout)
            size = wanted.norm().item()
            difference = (param.main_grad.cpu() - wanted).norm().item()
            worst = max(worst, (difference / size if size else difference, name))
        return worst

    def gradient_norm(self, reference: dict[str, Tensor]) -> float:
        """Relative difference of the norm by which Megatron would clip: a part counted twice, or by
        no rank, shows. Steps the optimizer.
        """
        if not self.trains:
            return 0.0
        wanted = torch.stack(
            [reference[f"grad.{name}"].norm() for name in self.table.expected_tensors()]
        ).norm()
        return abs(float(self.optimizer.step()[1]) / float(wanted) - 1)

    def check_checkpoint_shapes(self) -> None:
        """Megatron's distributed checkpoint takes every parameter for the part that it is (else a
        resume in another layout is wrong).
        """
        (chunk,) = self.chunks
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for name, tensor in chunk.sharded_state_dict(metadata={"dp_cp_group": group}).items():
            if name.endswith("layernorm.weight") and "layers" in name:
                (whole,) = self.table.rule(name.replace(name.split(".")[2], "0", 1)).parts.values()
                assert tuple(tensor.global_shape[tensor.prepend_axis_num :]) == whole, (
                    name,
                    tensor.global_shape,
                )

    @torch.no_grad()
    def chained_logits(self) -> Tensor | None:
        """Raw logits [R of sample 1, VOCAB] on the last stage: chunk after chunk, hidden states
        passed on from stage to stage.
        """
        batch, mesh = make_batch().select([1]), self.mesh
        ids = torch.cat([batch.prompt_ids, batch.response_ids])[None]
        hidden, stages = None, [(v, p) for v in range(len(self.chunks)) for p in range(mesh.pp_size)]
        for (v, p), following in zip(stages, [*stages[1:], None], strict=True):
            if mesh.pp_rank == p:
                chunk = self.chunks[v].eval()
                if hidden is not None:
                    chunk.set_input_tensor(hidden)
                hidden = chunk(ids, torch.arange(ids.size(1))[None], None)
                if following is not None:
                    dist.send(hidden, group_dst=following[1], group=mesh.pp_group)
            elif following is not None and mesh.pp_rank == following[1]:
                hidden = torch.empty(ids.size(1), 1, self.config.hidden_size)
                dist.recv(hidden, group_src=p, group=mesh.pp_group)
        if not mesh.is_last_stage:
            return None
        first = int(batch.prompt_lens[0]) - 1
        return self.gathered(self.logits(hidden[first:-1, 0], self.chunks[-1]))


def same(found: dict[str, Tensor], stored: dict[str, Tensor], case: str) -> None:
    """The export is the file, bit for bit."""
    assert found.keys() == stored.keys(), case
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{case}: {name}"


def report(case: str, start: float, logits: float, gradient: tuple[float, str] = (0.0, "")) -> None:
    """The worst over all ranks; raises on all of them together."""
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, (logits, gradient))
    logits, gradient = max(x[0] for x in every), max(x[1] for x in every)
    assert logits < LOGITS, f"{case}: logits differ by {logits:.1e}"
    assert gradient[0] < GRADIENTS, f"{case}: gradient of {gradient[1]} differs by {gradient[0]:.1e}"
    if dist.get_rank() == 0:
        worst = f", gradients {gradient[0]:.1e}" if gradient[1] else ""
        print(f"ok {case}: logits {logits:.1e}{worst}, {time.perf_counter() - start:.1f} s", flush=True)


def run_case(name: str, root: Path, actor: dict, chosen: tuple[str, ...], device: torch.device) -> set[str]:
    """Every family in one layout; returns the names of this rank's parameters as Megatron calls them."""
    names: set[str] = set()
    mesh = init_model_parallel(ActorConfig(**actor), device, seed=1)
    for family in chosen:
        start, path = time.perf_counter(), root / family
        model, reference = FamilyModel(path, actor, mesh), load_file(path / "reference.safetensors")
        same(
            model.export(),
            load_file(path / "model.safetensors") if mesh.rank == 0 else {},
            f"{family} {name}",
        )
        found = model.forward_and_gradients()
        logits = (found - reference["logits"]).abs().max().item() if mesh.is_last_stage else 0.0
        model.check_checkpoint_shapes()
        gradient = model.worst_gradient(reference)
        report(
            f"{family} {name}", start, logits, max(gradient, (model.gradient_norm(reference), "norm of all"))
        )
        names |= {local for chunk in model.chunks for local, _ in chunk.named_parameters()}
    return names


def run_virtual(name: str, root: Path, actor: dict, device: torch.device) -> None:
    """Two virtual stages on each pipeline stage, one layer each: the rank's chunks hold layers 0
    and 2, or 1 and 3.
    """
    mesh = init_model_parallel(ActorConfig(**actor), device, seed=1)
    for family in ALL:
        start, path = time.perf_counter(), root / family
        model = FamilyModel(path, actor, mesh, virtual_stages=2)
        layers = {int(n.split(".")[2]) for n in model.params if n.startswith("decoder.layers.")}
        assert layers == {mesh.pp_rank, mesh.pp_rank + 2}, layers
        same(
            model.export(),
            load_file(path / "model.safetensors") if mesh.rank == 0 else {},
            f"{family} {name}",
        )
        found, batch = model.chained_logits(), make_batch()
        rows = slice(int(batch.response_lens[0]), int(batch.response_lens[:2].sum()))
        reference = load_file(path / "reference.safetensors")["logits"][rows]
        report(f"{family} {name}", start, 0.0 if found is None else (found - reference).abs().max().item())


def refuse_more_ranks_than_key_heads(root: Path, device: torch.device) -> None:
    """The norm over all key heads has no part for a rank without a head of its own."""
    config = ActorConfig(dtype="float32", tensor_model_parallel_size=4)
    mesh = init_model_parallel(config, device, seed=1)
    family = registry.config_from_hf(read_hf_config(root / "olmo2") | {"num_key_value_heads": 2})
    try:
        build.build_model(family, build.transformer_config(family, config, device), config, mesh)
    except UserError as error:
        assert "tensor_model_parallel_size=4" in str(error), error
    else:
        raise AssertionError("2 key heads on 4 ranks were not refused")


def main(root: Path) -> None:
    device = init_distributed(timeout_minutes=20)
    for name, (actor, chosen) in CASES.items():
        run_case(name, root, actor, chosen, device)
    with transformer_engine_spec():
        names = run_case(TE_NAMES, root, {TP: 2, PP: 2, **SP}, TE_FAMILIES, device)
    for suffix in (
        "self_attention.linear_qkv.layer_norm_weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.experts.linear_fc1.weight1",
    ):
        assert any(name.endswith(suffix) for name in names), suffix
    run_virtual("pp2 x 2 virtual stages", root, {PP: 2}, device)
    refuse_more_ranks_than_key_heads(root, device)
    if dist.get_rank() == 0:
        print("ok all", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
