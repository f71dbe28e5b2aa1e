"""No torch call in the microbatch loop makes the host wait for the device.

The loop is the teacher's forward and the student's forward and backward, on one CPU rank. The test
looks at every torch call in it. A call that would make a GPU's host wait (a value is read, a mask
is an index, a copy blocks) fails the test, with the line that made the call. Code that stands in
for GPU kernels on a CPU is left out. Does not prove kernels and TransformerEngine, nor what C++
does: tests/gpu/test_sync_gpu.py lets CUDA's driver check those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode

from megasd.actor import student as student_module
from megasd.actor import teacher as teacher_module
from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import ActorConfig, DistillTerm, PolicyGradientTerm, TeacherConfig
from tests.distributed.golden_cases import TOP_K, credit, make_batch, make_config, methods_batch
from tests.tiny_weights import tiny_checkpoint

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "argwhere",
    "masked_select",
    "equal",
}
READS |= {"allclose", "unique", "unique_consecutive", "bincount", "cuda"}
# files that stand in for GPU kernels on a CPU
STAND_INS = (
    "ops/kernels_torch.py",
    "actor/cpu_layers.py",
    "actor/cpu_backend.py",
    "ops/divergence_terms.py",
)
# the first forward of a run moves rotary frequencies to the device
FIRST = ("actor/layers.py",)
# Megatron reads lengths of packed sequences without actor.apply_rope_fusion
MEGATRON = ("rope_utils.py",)
ROOT = Path(__file__).resolve().parents[3]


class Waits(TorchFunctionMode):
    """Finds calls that would make a GPU's host wait, as "name file:line"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.calls += 1
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        indexed = name in ("__getitem__", "__setitem__") and _reads(args[1])
        moved = (
            name == "to"
            and not kwargs.get("non_blocking")
            and any(isinstance(a, torch.device | str) for a in (*args[1:], *kwargs.values()))
        )
        repeated = (
            name == "repeat_interleave" and isinstance(args[-1], torch.Tensor) and "output_size" not in kwargs
        )
        if name in READS or indexed or moved or repeated or (name == "where" and len(args) == 1):
            where = _caller()
            if not any(file in where for file in (*STAND_INS, *FIRST, *MEGATRON)):
                self.found.append(f"{name} {where}")
        return func(*args, **kwargs)


def _reads(index: object) -> bool:
    """Whether an index is a mask, or a list that is copied to the device first."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list) or (isinstance(p, torch.Tensor) and p.dtype == torch.bool) for p in parts)


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None and (
        "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    init_distributed()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield str(tiny_checkpoint(tmp_path_factory.mktemp("waits") / "qwen3", "qwen3"))
    torch.set_num_threads(threads)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    mode, real = Waits(), student_module.run_microbatches

    def watched(*args: object, **kwargs: object) -> object:
        with mode:
            return real(*args, **kwargs)

    for module in (student_module, teacher_module):
        monkeypatch.setattr(module, "run_microbatches", watched)
    return mode


def test_the_meter_sees_what_waits() -> None:
    x = torch.arange(4.0)
    for wrong in (
        x.sum().item,
        x.tolist,
        x.cpu,
        lambda: x[x > 1],
        lambda: x.to("cpu"),
        lambda: bool(x[0]),
        lambda: x[[0, 1]],
        x.nonzero,
    ):
        with Waits() as mode:
            wrong()
        assert len(mode.found) == 1 and __file__.rsplit("/", 1)[-1] not in mode.found[0]
    with Waits() as mode:
        x[torch.tensor([0, 2])] = 1.0
        x.to(torch.float64)[1:2].repeat_interleave(2)
    assert mode.found == [] and mode.calls > 3


CASES: dict[str, tuple[dict, dict]] = {
    "bucket": ({}, {}),
    "packed, budget": ({"packing": True, "max_tokens_per_microbatch": 60}, {}),
    "full": ({}, {"distill": DistillTerm(support="full", beta=0.0)}),
    "record": (
        {},
        {
            "distill": DistillTerm(support="teacher", top_k=TOP_K, beta=0.0),
            "teacher": TeacherConfig(transport="record"),
        },
    ),
    "policy gradient": ({}, {"policy_gradient": PolicyGradientTerm(coefficient=0.3)}),
    "credit": ({"packing": True}, credit("cepo")),
    "scan": (
        {},
        {"distill": DistillTerm(support="full", beta=0.0, token_weight="scan", token_weight_scale=5.0)},
    ),
    "two updates": ({}, {"policy_gradient": PolicyGradientTerm(surrogate="gspo"), "minibatches": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_nobody_waits(name: str, model: str, waits: Waits) -> None:
    layout, algorithm = CASES[name]
    config = make_config(model, {"micro_batch_size": 8} | layout, **algorithm)
    actor = Actor(config, init_model_parallel(ActorConfig(), torch.device("cpu"), seed=1))
    batch = methods_batch() if name == "credit" else make_batch()
    batches = actor.shard(batch)
    actor.update(batches, actor.teacher_forward(batches))
    assert waits.found == [] and waits.calls > 500
