"""WeightSync in one process, with a transformers model in the engine's place.

Proves that a push puts the actor's weights, as a directory, in front of the engine; that directories take turns, so that the last confirmed
one is still whole during the next push; that an engine with other weights is found by the probe; that what cannot be right is refused.
Does not prove SGLang's side of it (tests/integration) nor the agreement of several ranks (tests/distributed/test_weights.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megasd import sync as sync_module
from megasd.config import SyncConfig
from megasd.sync import SyncError, WeightSync, check_tensors, max_difference
from tests.tiny_weights import TensorActor, TransformersEngine, tiny_checkpoint

PROBES = [[1, 5, 9, 2], [3, 3, 7]]


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    return str(tiny_checkpoint(tmp_path / "hf", "qwen3"))


def make(model_path: str, tmp_path: Path, engine: TransformersEngine, **config) -> WeightSync:
    actor = TensorActor(model_path)
    return WeightSync(actor, engine, SyncConfig(**config), tmp_path / "run", model_path=model_path, probes=PROBES)


def test_push_puts_live_weights_in_the_engine(model_path: str, tmp_path: Path) -> None:
    engine = TransformersEngine()
    with make(model_path, tmp_path, engine, verify_every=2) as sync:
        first = sync.push(0)
        assert engine.version == 0 and first["sync/probe_max_diff"] < 1e-5 and first["sync/seconds"] > 0
        before = load_file(Path(engine.directory) / "model.safetensors")
        assert first["sync/bytes"] == sum(t.nbytes for t in before.values())
        confirmed = engine.directory
        sync.actor.tensors["model.norm.weight"] *= 2
        second = sync.push(1)
        assert "sync/probe_max_diff" not in second  # every second push
        assert engine.directory != confirmed and (Path(confirmed) / "model.safetensors").is_file()
        assert torch.equal(engine.model.model.norm.weight, sync.actor.tensors["model.norm.weight"])
        assert sync.push(2)["sync/probe_max_diff"] < 1e-5 and engine.directory == confirmed
        root = sync.root
    assert not root.exists()


def test_engine_with_other_weights_is_found(model_path: str, tmp_path: Path) -> None:
    engine = TransformersEngine(ignore={"model.layers.1.mlp.up_proj.weight"})
    with make(model_path, tmp_path, engine, tolerance=1e-3) as sync:
        sync.push(0)  # the engine's first load is whole
        sync.actor.tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
        with pytest.raises(SyncError, match=r"version 1: .* nats .*sync.tolerance=0.001.*actor.dtype"):
            sync.push(1)


def test_tensor_that_the_model_has_not_never_reaches_the_engine(model_path: str, tmp_path: Path) -> None:
    engine = TransformersEngine()
    with make(model_path, tmp_path, engine) as sync:
        sync.actor.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        with pytest.raises(SyncError, match="q_proj.bias"):
            sync.push(0)
        assert engine.version is None


def test_check_tensors_and_max_difference() -> None:
    good = {"a": torch.zeros(2, 3)}
    check_tensors(good, {"a": (2, 3)})
    for tensors, expected in (({}, {"a": (2, 3)}), (good, {"a": (3, 2)}), (good, {})):
        with pytest.raises(SyncError, match="a"):
            check_tensors(tensors, expected)
    assert max_difference([[0.0, 1.0], [2.0]], [[0.0, 1.5], [2.0]]) == 0.5
    for theirs in ([[0.0, float("nan")]], [[0.0]], []):
        assert max_difference([[0.0, 1.0]], theirs) != max_difference([[0.0, 1.0]], theirs)  # NaN


def test_where_the_directories_stand(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(sync_module, "_SHARED_MEMORY", shared)
    with make(model_path, tmp_path, TransformersEngine(), verify_every=0) as sync:
        sync.push(0)
        assert sync.root.parent == shared and sync.root.stat().st_mode & 0o777 == 0o700
        (sync.root / "left-over").touch()
        taken = sync.root
        sync.root = None  # a killed run
        sync.push(1)
        assert sync.root == taken and not (taken / "left-over").exists()
    taken.symlink_to(tmp_path)  # someone else's trap
    for local_engine in (True, False):
        with make(model_path, tmp_path, TransformersEngine(), verify_every=0) as sync:
            sync.local_engine = local_engine
            sync.push(0)
            assert sync.root == tmp_path / "run" / "weights"
    with pytest.raises(ValueError, match="probes"):
        WeightSync(TensorActor(model_path), None, SyncConfig(), tmp_path, model_path=model_path, probes=[])
