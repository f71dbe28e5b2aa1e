"""Checkpoints of a run: model, optimizer, teacher, learning-rate schedule and RNG.

Megatron's dist_checkpointing writes them in its torch_dist format. A checkpoint is written to
`<dir>/.writing-step-<n>` and renamed to `<dir>/step-<n>` when it is whole, so a killed run leaves a
whole checkpoint or none. Tensors are resharded on load: a run with another TP, PP, CP or DP can go
on from a checkpoint. Megatron's own container files are pickles: load only checkpoints of runs that
you trust.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import convert_cuda_rng_state

from megasd.actor.model import Backbone
from megasd.actor.parallel import Mesh
from megasd.actor.teacher_weights import KINDS, TeacherState
from megasd.types import UserError

MEGATRON_FILES = (".metadata", "metadata.json", "common.pt")
# the run's own state: step, data position, layout, kind of teacher
STATE_FILE = "megasd.json"
# entries that every run saves (trainer/trainer.py)
ORCHESTRATOR_STATE = ("prompts", "memory", "gate")


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds of a rank, and where the rank stands."""

    model: Backbone
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    teacher: TeacherState
    mesh: Mesh


def save(directory: Path, step: int, state: dict, parts: Parts, *, keep: int) -> Path:
    """Write `<directory>/step-<step>` and drop all but the `keep` newest checkpoints.

    state: rank 0's JSON-able dict. Collectives: Megatron's save over all ranks, three barriers.
    """
    mesh, teacher = parts.mesh, parts.teacher
    writing, final = directory / f".writing-step-{step}", directory / f"step-{step}"
    if mesh.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    sharded = _sharded_state(parts, is_loading=False)
    # No other process awaits the results of this save. Megatron's own queue would start an
    # interpreter, which takes seconds on each rank.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(sharded | {"scheduler": parts.scheduler.state_dict()}, str(writing))
    dist.barrier()
    if mesh.rank == 0:
        about = {"step": step, "layout": _layout(mesh), "teacher": bool(teacher.shadow)}
        (writing / STATE_FILE).write_text(json.dumps(state | about | teacher.state()))
        replaced = directory / f".replaced-step-{step}"
        if final.exists():
            final.rename(replaced)
        writing.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        for other in list_checkpoints(directory):
            # A resume from an older checkpoint leaves those of the abandoned branch behind.
            if _step_of(other) > step:
                shutil.rmtree(other)
        for old in list_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, parts: Parts) -> dict:
    """Fill the parts in place from a checkpoint of any layout; the saved `state` with its "step".

    The RNG state is restored when the layout is the same. UserError when the checkpoint lacks the
    teacher that the algorithm reads. Collectives: Megatron's load over all ranks.
    """
    teacher = parts.teacher
    state = read_state(path, teacher_weights=teacher.kind)
    same_layout = state["layout"] == _layout(parts.mesh)
    sharded = _sharded_state(parts, is_loading=True)
    if not same_layout:
        del sharded["rng"]
    loaded = dist_checkpointing.load(sharded | {"scheduler": parts.scheduler.state_dict()}, str(path))
    parts.model.load_state_dict(loaded["model"])
    parts.optimizer.load_state_dict(loaded["optimizer"])
    parts.scheduler.load_state_dict(loaded["scheduler"])
    for name, shadow in teacher.shadow.items():
        shadow.copy_(loaded["teacher"][name])
    teacher.restore(state)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return state


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in directory.glob("step-*") if (p / STATE_FILE).is_file()]
    return sorted(found, key=_step_of)


def read_state(path: Path, *, teacher_weights: str) -> dict:
    """The JSON state of a checkpoint.

    UserError when `path` is not a whole one, lacks the teacher that `teacher_weights` needs or
    holds one of another kind, or comes from a version that did not save the orchestrator's state.
    """
    for name in (STATE_FILE, *MEGATRON_FILES):
        if not (path / name).is_file():
            raise UserError(
                f"run.resume: {path} is not a whole checkpoint (no {name}); give a directory like"
                " runs/x/checkpoints/step-100"
            )
    try:
        state = json.loads((path / STATE_FILE).read_text())
    except ValueError as error:
        raise UserError(
            f"run.resume: {path / STATE_FILE} is damaged ({error}); resume from another checkpoint"
        ) from error
    if KINDS[teacher_weights].has_shadow:
        if not state["teacher"]:
            raise UserError(
                f"run.resume: {path} holds no teacher, and algorithm.teacher.weights={teacher_weights} needs"
                " one; set it to live, or resume from a checkpoint of a run that had one"
            )
        if (saved := state.get("teacher_weights", teacher_weights)) != teacher_weights:
            raise UserError(
                f"run.resume: {path} holds a teacher of algorithm.teacher.weights={saved}, which cannot go on"
                f" as {teacher_weights}; set it to {saved}, or start a new run"
            )
    missing = [name for name in ORCHESTRATOR_STATE if name not in state]
    if missing:
        raise UserError(
            f"run.resume: {path / STATE_FILE} has no {missing[0]!r}: an earlier version of megasd wrote it;"
            " resume with that version, or start a new run from its exported weights (model.path)"
        )
    return state


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint's directory."""
    return int(path.name.removeprefix("step-"))


def _layout(mesh: Mesh) -> list[int]:
    """A checkpoint's random states fit only the same layout."""
    return [mesh.tp_size, mesh.pp_size, mesh.cp_size, mesh.ep_size, mesh.dp_size]


def _sharded_state(parts: Parts, *, is_loading: bool) -> dict:
    """What Megatron saves or fills: every tensor with its place in the whole tensor."""
    model, teacher, mesh = parts.model, parts.teacher, parts.mesh
    metadata = {
        # Any TP, PP and DP can load such a checkpoint.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model_state = model.sharded_state_dict(metadata=metadata)
    sharded = {
        "model": model_state,
        "optimizer": parts.optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=metadata
        ),
        "rng": ShardedObject("rng", _rng_state(), (mesh.world_size,), (mesh.rank,), replica_id=0),
    }
    if teacher.shadow:
        name_of = {id(p): name for name, p in model.named_parameters()}
        sharded["teacher"] = {
            name_of[id(entry.data)]: _with_data(entry, teacher.shadow[name_of[id(entry.data)]])
            for entry in model.sharded_state_dict(metadata=metadata).values()
            if id(entry.data) in name_of
        }
    return sharded


def _with_data(entry: Any, tensor: torch.Tensor) -> Any:
    """The same shard description under the key "teacher.<key>", holding the teacher's fp32 copy."""
    changes: dict[str, Any] = {"key": f"teacher.{entry.key}", "data": tensor}
    if hasattr(entry, "dtype"):
        changes["dtype"] = tensor.dtype
    return dataclasses.replace(entry, **changes)


def _rng_state() -> dict:
    """torch's random state and those of Megatron's tracker.

    They are plain tensors, although the tracker holds generators under CUDA graphs.
    """
    states = get_cuda_rng_tracker().get_states()
    return {
        "torch": torch.get_rng_state(),
        "tracker": {name: convert_cuda_rng_state(s) for name, s in states.items()},
    }


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    tracker = get_cuda_rng_tracker()
    graphable = getattr(tracker, "use_cudagraphable_rng", False)
    tracker.set_states(
        {name: convert_cuda_rng_state(s, to_graphable=graphable) for name, s in state["tracker"].items()}
    )
