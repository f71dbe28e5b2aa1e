"""Measures a real actor's tensors by category, next to the plan of megasd/cluster/planner/memory.py.

A script, for one process or for torchrun:

    python tests/distributed/planner_cases.py '[{"model": {}, "items": ["actor.recompute_granularity=full"]}]'

It prints a line of JSON per case and pipeline stage: {"stage": ..., "planned": {category: bytes},
"measured": {category: bytes}}. The measure of a category is that of the rank of the stage that has
most of it. sync is rank 0's.

weights, gradients, optimizer, teacher, signal, batch, sync: bytes of the distinct storages of those
tensors. activations: peak of the distinct storages that autograd keeps between the first forward
and the end of the backward (saved-tensor hooks; parameters and what the loss keeps are left out).
loss: peak of what is allocated while the loss is computed, from the profiler's memory events.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.algo.recipes import RECIPES
from megasd.batch.batch import Batch
from megasd.cluster.planner import memory
from megasd.cluster.planner.hardware import GPU_KINDS
from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.shapes import Model
from megasd.config.load import load_config
from megasd.config.schema import Config
from megasd.loss.token_weights import TokenWeights
from megasd.models import registry
from megasd.ops.fused_linear_loss import TeacherHead

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "attention_bias": False,
}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Distinct storages: address -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


class Saved:
    """Bytes of the distinct storages that autograd keeps, now (`live`) and at most (`peak`)."""

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self.left_out, self.users, self.live, self.peak, self.counts = set(storages(left_out)), {}, 0, 0, True

    class Held:
        def __init__(self, owner: Saved, tensor: Tensor) -> None:
            self.owner, self.tensor, self.key = owner, tensor, tensor.untyped_storage().data_ptr()
            self.size = tensor.untyped_storage().nbytes()
            owner.users[self.key] = owner.users.get(self.key, 0) + 1
            if owner.users[self.key] == 1:
                owner.live += self.size
                owner.peak = max(owner.peak, owner.live)

        def __del__(self) -> None:
            self.owner.users[self.key] -= 1
            if self.owner.users[self.key] == 0:
                self.owner.live -= self.size

    def pack(self, tensor: Tensor) -> Any:
        if not self.counts or not tensor.numel() or tensor.untyped_storage().data_ptr() in self.left_out:
            return tensor
        return self.Held(self, tensor)

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, Saved.Held) else kept

    @contextmanager
    def paused(self):
        self.counts = False
        yield
        self.counts = True


def peak_allocated(profiled: profile) -> int:
    live = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def longest_batch(config: Config, vocab: int, context: int) -> Batch:
    """Every prompt and response as long as the config allows."""
    rollout, generator = config.rollout, torch.Generator().manual_seed(0)
    n, p, r = (
        rollout.num_prompts * rollout.num_samples,
        rollout.max_prompt_tokens,
        rollout.max_response_tokens,
    )

    def ids(count: int) -> Tensor:
        return torch.randint(0, vocab, (count,), generator=generator)

    return Batch(
        prompt_ids=ids(n * p),
        prompt_lens=torch.full((n,), p),
        context_ids=ids(n * context),
        context_lens=torch.full((n, 1), context),
        response_ids=ids(n * r),
        response_lens=torch.full((n,), r),
        question_weight=torch.ones(n, dtype=torch.float64),
        question_size=torch.full((n,), rollout.num_samples),
        scored=torch.ones(n, dtype=torch.bool),
        right=torch.arange(n) % 2 == 0,
        streams={"rollout_logp": torch.zeros(n * r), "advantage": torch.ones(n * r)},
    )


def measure(actor: Actor, config: Config, job: PlannedRun) -> dict[str, int]:
    params = list(actor.model.parameters())
    batch = longest_batch(config, actor.vocab_size, job.longest_teacher - config.rollout.max_response_tokens)
    batches = actor.shard(batch)
    signals = actor.teacher_forward(batches)
    found = {
        "weights": nbytes(params),
        "gradients": nbytes(b.grad_data for b in (*actor.ddp.buffers, *actor.ddp.expert_parallel_buffers)),
        "teacher": nbytes(actor.teacher.weights.shadow.values()) if actor.teacher.passes else 0,
    }
    (signal,) = signals
    # Without a distillation term nothing is kept.
    if len(signal.slot_R):
        copied = [signal.kept.weight_Vh] if isinstance(signal.kept, TeacherHead) else []
        kept = storages([signal.slot_R, *signal.rows, *copied])
        shadows = storages(actor.teacher.weights.shadow.values())
        found["signal"] = sum(
            size for key, size in kept.items() if key not in shadows and key not in storages(params)
        )
    learner = actor.learner
    saved, workspaces, own_loss = Saved(params), [0], learner._loss
    read: list[TokenWeights] = []

    def loss(*args: Any) -> Any:
        read.append(next(one for one in args if isinstance(one, TokenWeights)))
        with saved.paused(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = own_loss(*args)
        workspaces.append(peak_allocated(profiled))
        return result

    learner._loss = loss
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        actor.update(batches, signals)
    learner._loss = own_loss
    microbatches = actor.student.microbatches(batches[0].batch, batches[0].microbatches)
    streams = [*batches[0].streams.values(), *(t for one in read[:1] for t in one.streams.values())]
    found["batch"] = nbytes(
        [t for one in microbatches for t in vars(one).values() if isinstance(t, Tensor)]
    ) + nbytes(streams)
    found |= {"activations": saved.peak, "loss": max(workspaces), "optimizer": optimizer_bytes(actor, params)}
    gather = actor.gather(dtype=None, bucket_bytes=(config.sync.bucket_mib or 24) << 20)
    for _ in gather.replay():
        pass
    found["sync"] = nbytes(
        t for slot in gather._slots for t in (slot.flat, *slot.incoming.values()) if t is not None
    )
    return found


def optimizer_bytes(actor: Actor, params: list[Tensor]) -> int:
    """Main copies and moments, without main copies that are the parameters themselves."""
    tensors = []
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        tensors += [
            t
            for state in part.optimizer.state.values()
            for t in state.values()
            if isinstance(t, Tensor) and t.dim()
        ]
    own = {key: size for key, size in storages(tensors).items() if key not in storages(params)}
    return sum(own.values())


def run(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    hf = QWEN3 | case.get("model", {})
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(hf))
        generator = torch.Generator().manual_seed(0)
        shapes = registry.param_table(hf).expected_tensors()
        save_file(
            {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()},
            directory / "model.safetensors",
        )
    dist.barrier()
    config = load_config([], [f"model.path={directory}", "data.train=none", *case["items"]], RECIPES)
    device = torch.device("cpu")
    mesh = init_model_parallel(config.actor, device, seed=1)
    job = PlannedRun(config, Model.of(hf), GPU_KINDS["cpu"], gpus=dist.get_world_size())
    measured = measure(Actor(config, mesh), config, job)
    stage = mesh.pp_rank
    causes = {"sync": 0.0} | memory.static(job, stage) | memory.training_memory(job, stage)
    causes |= {"signal": memory.signal_bytes(job, stage)}
    # The tensors that enter the loss are made before it, and are not measured with it.
    if mesh.is_last_stage:
        causes["loss"] -= memory.loss(job)["entering"]
    if dist.get_rank() != 0:
        measured["sync"] = 0
    return {"stage": stage, "planned": {name: int(causes[name]) for name in measured}, "measured": measured}


def by_stage(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result of each stage, with the largest measure of every category."""
    found: dict[int, dict[str, Any]] = {}
    for result in results:
        one = found.setdefault(result["stage"], result)
        one["measured"] = {
            name: max(value, result["measured"][name]) for name, value in one["measured"].items()
        }
    return [found[stage] for stage in sorted(found)]


def main() -> None:
    init_distributed(timeout_minutes=20)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    for number, case in enumerate(json.loads(sys.argv[1])):
        mine = run(case, Path(folder[0]) / str(number))
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            for result in by_stage(everyone):
                print("CASE " + json.dumps({"case": number} | result), flush=True)


if __name__ == "__main__":
    main()
