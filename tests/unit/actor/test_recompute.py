"""Activations that are recomputed, on one rank of the CPU path.

Proves that settings of recompute_granularity, _method, _num_layers and _modules give the loss and
gradient norm of none, in float32 to rounding, with experts too, and that they really recompute
what they say (counted calls). Does not prove that memory falls (tests/gpu/test_fp8_gpu.py does, on
a GPU), nor anything about pipelines (tests/distributed).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megasd.actor import static_shapes as fixed_shape
from megasd.actor.forward import run_microbatches
from megasd.actor.model import wrap_data_parallel
from megasd.actor.parallel import Mesh, init_distributed, init_model_parallel
from megasd.batch.microbatch import Microbatch
from megasd.config.schema import ActorConfig
from megasd.loss.megatron_scaling import megatron_loss
from tests.distributed.family_cases import FamilyModel
from tests.tiny_weights import tiny_checkpoint

FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
BLOCK = FULL | {"recompute_method": "block"}
LAYERS, MICROBATCHES = 4, 2
# family, settings, layers whose attention is recomputed, and layers whose MLP (or experts) is
CASES: list[tuple[str, dict, int, int]] = [
    ("qwen3", FULL | {"recompute_num_layers": 2}, 4, 4),
    ("qwen3", FULL | {"recompute_num_layers": 4, "packing": True}, 4, 4),
    ("qwen3", BLOCK | {"recompute_num_layers": 3}, 3, 3),
    ("qwen3", SELECTIVE, 4, 0),
    ("qwen3", SELECTIVE | {"packing": True}, 4, 0),
    ("qwen3", SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]}, 4, 4),
    ("qwen3_moe", SELECTIVE | {"recompute_modules": ["moe"]}, 0, 4),
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    device, threads = init_distributed(), torch.get_num_threads()
    # tiny products: more threads only wait for each other
    torch.set_num_threads(1)
    yield init_model_parallel(ActorConfig(), device, seed=1)
    torch.set_num_threads(threads)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recompute")
    return {family: tiny_checkpoint(root / family, family) for family in ("qwen3", "qwen3_moe")}


def trained(path: Path, settings: dict, mesh: Mesh) -> tuple[float, float, int, int]:
    """Loss, gradient norm, calls of the attention and of the MLPs."""
    model = FamilyModel(path, settings, mesh)
    (chunk,), counts = model.chunks, {"attention": 0, "mlp": 0}
    ddp, losses = wrap_data_parallel(chunk, model.config, model.actor), []
    for layer in chunk.decoder.layers:
        # A mixture of experts recomputes itself within its own forward.
        for name, module in (
            ("attention", layer.self_attention.core_attention),
            ("mlp", getattr(layer.mlp, "router", layer.mlp)),
        ):
            module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))

    def loss(microbatch: Microbatch, hidden: torch.Tensor) -> tuple:
        value = (hidden.float().pow(2) * torch.linspace(-1, 1, hidden.size(1))).sum()
        losses.append(float(value.detach()))
        return megatron_loss(value)

    ddp.zero_grad_buffer()
    run_microbatches(ddp, model.microbatches(), mesh, model.config, loss, forward_only=False)
    norm = torch.cat([p.main_grad.flatten() for p in chunk.parameters()]).norm()
    return sum(losses), float(norm), counts["attention"], counts["mlp"]


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path], mesh: Mesh) -> dict[tuple[str, bool], tuple]:
    """What comes out without recomputation."""
    kinds = {(family, settings.get("packing", False)) for family, settings, _, _ in CASES}
    return {
        (family, packing): trained(checkpoints[family], {"packing": packing}, mesh)
        for family, packing in kinds
    }


@pytest.mark.parametrize(
    ("family", "settings", "attention", "mlp"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES]
)
def test_same_loss_and_gradient(
    family: str, settings: dict, attention: int, mlp: int, checkpoints: dict, plain: dict, mesh: Mesh
) -> None:
    without, found = (
        plain[family, settings.get("packing", False)],
        trained(checkpoints[family], settings, mesh),
    )
    assert found[:2] == pytest.approx(without[:2], rel=1e-6)
    assert without[2:] == (LAYERS * MICROBATCHES, LAYERS * MICROBATCHES)
    assert found[2:] == ((LAYERS + attention) * MICROBATCHES, (LAYERS + mlp) * MICROBATCHES)


def test_rows_of_a_fixed_shape(checkpoints: dict, mesh: Mesh) -> None:
    """Filler rows change no hidden state; a longer sequence is refused."""
    model = FamilyModel(checkpoints["qwen3"], {}, mesh)
    actor = ActorConfig(micro_batch_size=4, cuda_graph=True)
    plain = model.microbatches()
    length = plain[0].max_seqlen
    plain = [one for one in plain if one.max_seqlen == length]
    fixed = fixed_shape.fix_shapes(plain, actor, length, is_student=True)
    assert [one.tokens.shape for one in fixed] == [(4, length)] * len(fixed)
    found = []
    for microbatches in (plain, fixed):
        hidden: list[torch.Tensor] = []
        model.chunks[0].eval()
        run_microbatches(
            model.chunks[0],
            microbatches,
            mesh,
            model.config,
            lambda _, h, to=hidden: to.append(h),
            forward_only=True,
        )
        found.append(torch.cat(hidden))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    # a teacher's pass goes outside the graphs
    assert fixed_shape.fix_shapes(plain, actor, length - 1, is_student=False) is plain
    with pytest.raises(Exception, match="raise those, or set actor.cuda_graph=false"):
        fixed_shape.fix_shapes(plain, actor, length - 1, is_student=True)


def test_outside_graphs_asks_no_graph() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cudagraph_manager = torch.nn.Identity()

        def _should_call_local_cudagraph(self) -> bool:
            return hasattr(self, "cudagraph_manager")

    model = torch.nn.Sequential(Layer(), torch.nn.Linear(1, 1))
    with fixed_shape.outside_graphs(model):
        assert not model[0]._should_call_local_cudagraph() and len(list(model.modules())) == 4
    assert model[0]._should_call_local_cudagraph()
