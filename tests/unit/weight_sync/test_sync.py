"""What a push is made of, without engines and process groups.

Proves that a bucket is a safetensors data section without gaps, that any bucket size gives the file
back, that a fingerprint sees one changed bit, how the parameters of SGLang's ranks are put
together, that the GPU checksum is that of its published steps, and where pushed files lie. Does not
prove that an engine takes them, nor reports these checksums (tests/integration/test_push.py,
tests/gpu).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megasd.config.schema import SyncConfig
from megasd.models import registry
from megasd.models.param_table import global_params
from megasd.types import UserError
from megasd.weight_sync import staging
from megasd.weight_sync.delta import Fingerprints, tensor_fingerprint
from megasd.weight_sync.disk_transport import DiskTransport
from megasd.weight_sync.engine_checksums import EngineWeights, checksum, words_hash
from megasd.weight_sync.sync import WeightSync
from megasd.weight_sync.verify import max_difference
from megasd.weights.export import plan_of
from megasd.weights.gather import Gather
from megasd.weights.gather_plan import Holding, make_gather_plan
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from tests.tiny_weights import local_params, tiny_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "qwen3_moe", "qwen3_moe")


def loaded(path: Path) -> dict[str, torch.Tensor]:
    params = global_params(local_params(read_hf_config(path), tp_size=1))
    load_hf(params, path, tp_rank=0, tp_size=1)
    return params


# ---- plan and buckets ----------------------------------------------------------------------------


@given(bucket_bytes=st.integers(1, 60_000))
@settings(max_examples=20, deadline=None)
def test_any_bucket_size_covers_the_model_without_gaps(dense: Path, bucket_bytes: int) -> None:
    hf, params = read_hf_config(dense), loaded(dense)
    plan = plan_of(params, hf, bucket_bytes=bucket_bytes)
    assert list(plan.tensors()) == list(registry.param_table(hf).expected_tensors())
    for bucket in plan.buckets:
        assert bucket.nbytes <= bucket_bytes or len(bucket.params) == 1
        end = 0
        for entry in bucket.tensors.values():
            assert entry.offset == end
            end += entry.nbytes
        assert end == bucket.nbytes
    stored = load_file(dense / "model.safetensors")
    for bucket, flat in Gather(plan, params).replay():
        for name, tensor in bucket.views(flat).items():
            assert torch.equal(tensor, stored[name])


def test_two_buffers_take_turns(dense: Path) -> None:
    params, made = loaded(dense), []

    def make_buffer(nbytes: int) -> torch.Tensor:
        made.append(torch.empty(nbytes, dtype=torch.uint8))
        return made[-1]

    gather = Gather(
        plan_of(params, read_hf_config(dense), bucket_bytes=10_000), params, make_buffer=make_buffer
    )
    asked = []
    for _ in range(2):
        places = [flat.data_ptr() for _, flat in gather.replay(ready=asked.append)]
        assert places == [made[i % 2].data_ptr() for i in range(len(places))] and len(made) == 2
    assert asked == [*range(len(places))] * 2


def test_a_plan_that_cannot_be_right_names_the_parameter(dense: Path) -> None:
    hf = read_hf_config(dense)
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in loaded(dense).items()}
    table = registry.param_table(hf)

    def plan(params: dict) -> None:
        make_gather_plan(table, [Holding(0, 0, 1, 1, params)], bucket_bytes=1000)

    with pytest.raises(
        UserError, match=r"no rank holds decoder\.layers\.3.*model\.layers\.3\.mlp\.down_proj"
    ):
        plan(
            {name: kind for name, kind in shapes.items() if name != "decoder.layers.3.mlp.linear_fc2.weight"}
        )
    with pytest.raises(UserError, match=r"layers\.9"):
        plan(shapes | {"decoder.layers.9.mlp.linear_fc2.weight": ((1, 1), torch.float32)})
    with pytest.raises(UserError, match="linear_fc1.weight has local shape"):
        plan(shapes | {"decoder.layers.0.mlp.linear_fc1.weight": ((5, 32), torch.float32)})
    with pytest.raises(UserError, match="no rank holds tensor-parallel part 1 of embedding"):
        make_gather_plan(
            table,
            [Holding(0, 0, 2, 1, {n: ((s[0] // 2, *s[1:]), d) for n, (s, d) in shapes.items()})],
            bucket_bytes=1000,
        )


class Engines:
    """A fleet that only remembers what it was told to load."""

    def __init__(self, model_path: Path) -> None:
        self.model_path = str(model_path)

    def push(self, directory: str, version: int) -> None:
        self.directory, self.version = directory, version


def test_the_file_of_a_push_is_a_safetensors_file_and_two_take_turns(dense: Path, tmp_path: Path) -> None:
    fleet, params = Engines(dense), loaded(dense)
    gather = Gather(plan_of(params, read_hf_config(dense), bucket_bytes=7000, dtype=torch.bfloat16), params)
    transport = DiskTransport(fleet, torch.device("cpu"), (tmp_path / "a", tmp_path / "b"))
    for version, directory in enumerate(("a", "b", "a")):
        transport.begin(gather.plan, version)
        for bucket, flat in gather.replay():
            transport.send(bucket, flat, last=False).wait()
        transport.commit(version)
        assert fleet.directory == str(tmp_path / directory) and fleet.version == version
        assert read_hf_config(fleet.directory)["dtype"] == "bfloat16"
        written, stored = (
            load_file(tmp_path / directory / "model.safetensors"),
            load_file(dense / "model.safetensors"),
        )
        assert written.keys() == stored.keys() and all(
            torch.equal(t, stored[name].bfloat16()) for name, t in written.items()
        )


# ---- what has changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_fingerprint_sees_one_bit_and_an_exchange(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5).to(dtype)
    assert (
        tensor_fingerprint(tensor)
        == tensor_fingerprint(tensor.clone())
        == tensor_fingerprint(tensor.T.contiguous().T)
    )
    seen = {tensor_fingerprint(tensor)}
    data = tensor.contiguous().view(torch.uint8).reshape(-1)
    for place in range(data.numel()):
        data[place] ^= 1 << place % 8
        seen.add(tensor_fingerprint(tensor))
        data[place] ^= 1 << place % 8
    assert len(seen) == data.numel() + 1
    swapped = torch.cat([tensor[1:2], tensor[:1], tensor[2:]])
    assert tensor_fingerprint(swapped) not in seen


def test_only_what_changed_since_it_was_kept(dense: Path) -> None:
    params = loaded(dense)
    plan, prints = plan_of(params, read_hf_config(dense)), Fingerprints()
    assert prints.take(plan, params) is None
    prints.keep()
    params["decoder.final_layernorm.weight"] += 1
    # a push that failed changes nothing
    for _ in range(2):
        assert prints.take(plan, params) == {"decoder.final_layernorm.weight"}
    prints.keep()
    assert prints.take(plan, params) == frozenset()
    prints.forget()
    assert prints.take(plan, params) is None


# ---- what an engine holds ------------------------------------------------------------------------


def sha(*parts: torch.Tensor) -> str:
    return hashlib.sha256(torch.cat(parts).contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_engine_parameters_are_put_together_as_sglang_does(dense: Path, moe: Path, size: int) -> None:
    stored, hf = load_file(dense / "model.safetensors"), read_hf_config(dense)
    weights = EngineWeights(hf, size)
    # as on a GPU
    weights.width_padding = 1
    # in any order
    for name, tensor in reversed(stored.items()):
        weights.feed(name, tensor)
    q, k, v = (stored[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    gate, up = (stored[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    for rank in range(size):
        found = weights.checksums[rank]
        # two key heads: with four ranks, two ranks hold the same one
        group = rank * 2 // size
        heads = [k, v] if size == 1 else [t[16 * group : 16 * (group + 1)] for t in (k, v)]
        assert found["model.layers.1.self_attn.qkv_proj.weight"] == sha(q.chunk(size)[rank], *heads)
        assert found["model.layers.1.mlp.gate_up_proj.weight"] == sha(
            gate.chunk(size)[rank], up.chunk(size)[rank]
        )
        down = stored["model.layers.1.mlp.down_proj.weight"].chunk(size, dim=1)[rank]
        assert found["model.layers.1.mlp.down_proj.weight"] == sha(down)
        # 96 tokens become 128
        padded = torch.cat([stored["lm_head.weight"], torch.zeros(32, 32)])
        assert found["lm_head.weight"] == sha(padded.chunk(size)[rank])
        assert found["model.norm.weight"] == sha(stored["model.norm.weight"])
    assert not weights._filling
    stored, weights = load_file(moe / "model.safetensors"), EngineWeights(read_hf_config(moe), size)
    weights.width_padding = 1
    for name, tensor in stored.items():
        weights.feed(name, tensor)
    expert = [
        [stored[f"model.layers.0.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
        for e in range(4)
    ]
    for rank in range(size):
        w13 = [torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]) for gate, up, _ in expert]
        assert weights.checksums[rank]["model.layers.0.mlp.experts.w13_weight"] == sha(*w13)
        w2 = [down.chunk(size, dim=1)[rank] for _, _, down in expert]
        assert weights.checksums[rank]["model.layers.0.mlp.experts.w2_weight"] == sha(*w2)


def test_only_followed_parameters_are_kept(dense: Path) -> None:
    weights = EngineWeights(read_hf_config(dense), 1, frozenset({"model.norm.weight"}))
    for name, tensor in load_file(dense / "model.safetensors").items():
        weights.feed(name, tensor)
    assert list(weights.checksums[0]) == ["model.norm.weight"]


def test_the_cpu_checksum_is_the_head_of_a_sha256() -> None:
    tensor = torch.randn(3, 5).bfloat16()
    assert (
        checksum(tensor.T, on_cpu=True)
        == hashlib.sha256(tensor.T.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    )


def by_the_book(data: bytes) -> int:
    """The GPU checksum word by word, in Python's integers."""
    mask = 0xFFFFFFFF
    data += b"\0" * (-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]

    def fmix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
        return x ^ (x >> 16)

    seed = 0x243F6A88
    seed2 = ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & mask
    total = 0
    for tile in range(0, len(words), 8192):
        sums = [0, 0]
        for i, word in list(enumerate(words))[tile : tile + 8192]:
            for half, (s, factor, turn) in enumerate(((seed, 0x27D4EB2D, 15), (seed2, 0x165667B1, 13))):
                place = ((i * factor + s) & mask) ^ (((i << turn) | (i >> (32 - turn))) & mask)
                sums[half] = (sums[half] + fmix(word ^ place)) & mask
        high, low = (fmix(s ^ (len(words) * 4 & mask)) for s in sums)
        total += (high << 32) | low
    x = total & (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (1 << 64) - 1
    return x ^ (x >> 31)


@pytest.mark.parametrize("nbytes", [0, 1, 4, 1001, 4 * 8192, 4 * 8192 + 3, 100_000])
def test_the_gpu_checksum_is_that_of_the_book(nbytes: int) -> None:
    data = torch.randint(
        0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes)
    )
    assert words_hash(data) == (by_the_book(bytes(data.numpy())) if nbytes else 0)


# ---- the rest ------------------------------------------------------------------------------------


def test_max_difference() -> None:
    assert max_difference([[0.0, 1.0], [2.0]], [[0.0, 1.5], [2.0]]) == 0.5
    for theirs in ([[0.0, float("nan")]], [[0.0]], []):
        # NaN
        assert max_difference([[0.0, 1.0]], theirs) != max_difference([[0.0, 1.0]], theirs)
    with pytest.raises(ValueError, match="probes"):
        WeightSync(None, None, SyncConfig(), "x", model_path="x", probes=[])


def test_where_pushed_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, run = tmp_path / "shm", tmp_path / "run"
    shared.mkdir()
    monkeypatch.setattr(staging, "_SHARED_MEMORY", shared)
    killed = staging.staging_directory(run, 100, True)
    with killed as root:
        assert root.parent == shared and root.stat().st_mode & 0o777 == 0o700
        (root / "left-over").touch()
        # after a run that was killed
        with staging.staging_directory(run, 100, True) as again:
            assert again == root and not (root / "left-over").exists()
    assert not root.exists()
    # someone else's trap
    root.symlink_to(tmp_path)
    for local, nbytes in ((True, 100), (False, 100), (True, 1 << 60)):
        with staging.staging_directory(run, nbytes, local) as root:
            assert root == run / "weights"
