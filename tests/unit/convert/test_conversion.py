"""Conversion between Hugging Face directories and Megatron checkpoints, without Megatron.

Proves, for every tiny model: HF -> Megatron -> HF gives every tensor back byte for byte, with
tokenizer and templates; casts; a run's checkpoint and its teacher; equal files after kill -9 at 10
random points each way; what is refused, by name, and that nothing is left at the target; that no
pickle of a checkpoint runs anything. That Megatron itself loads the directory:
tests/distributed/test_conversion.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasd.cli import main
from megasd.convert import resumable_dir as work
from megasd.convert.common import ConversionOptions, ConversionResult
from megasd.convert.hf_to_megatron import to_megatron
from megasd.convert.megatron_to_hf import to_hf
from megasd.types import UserError
from megasd.weights.hf_files import HFWriter
from megasd.weights.safetensors_io import as_bytes
from tests.tiny_weights import MODELS, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[3]
# bytes of a file: several of them
SMALL = 30_000


def with_side_files(directory: Path) -> Path:
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3 in several files with an index."""
    from megasd.weights import hf_files as files

    source = with_side_files(tiny_checkpoint(tmp_path_factory.mktemp("source") / "qwen3", "qwen3"))
    target = tmp_path_factory.mktemp("hf") / "qwen3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", SMALL)
        files.save_hf(load_file(source / "model.safetensors"), source, target)
    return target


@pytest.fixture(scope="module")
def megatron(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("megatron") / "qwen3"
    to_megatron(hf, target, ConversionOptions(file_bytes=SMALL))
    return target


@pytest.fixture
def hf_copy(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "hf"))


@pytest.fixture
def megatron_copy(megatron: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(megatron, tmp_path / "megatron"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and as_bytes(found[name]) == as_bytes(tensor), name


def convert(source: Path, target: Path, **options) -> ConversionResult:
    return (to_hf if (source / ".metadata").exists() else to_megatron)(
        source, target, ConversionOptions(**{"file_bytes": SMALL} | options)
    )


# ---- what comes out ----


@pytest.mark.parametrize("family", MODELS)
def test_round_trip(family: str, tmp_path: Path) -> None:
    source = with_side_files(tiny_checkpoint(tmp_path / "hf", family))
    convert(source, tmp_path / "megatron", check=True)
    result = convert(tmp_path / "megatron", tmp_path / "back", check=True)
    same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert result.parameters == sum(t.numel() for t in tensors_of(source).values())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    wanted, found = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "back"))
    assert wanted == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "megatron"]


def test_transformers_loads_the_target(hf: Path, megatron: Path, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    convert(megatron, tmp_path / "back", dtype=torch.bfloat16)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert model.dtype == torch.bfloat16
    wanted = tensors_of(hf)["model.layers.3.self_attn.q_proj.weight"].bfloat16()
    assert torch.equal(model.state_dict()["model.layers.3.self_attn.q_proj.weight"], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_on_either_side_is_the_same(
    hf: Path, megatron: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    convert(megatron, tmp_path / "late", dtype=dtype, check=True)
    convert(hf, tmp_path / "early-megatron", dtype=dtype, check=True)
    convert(tmp_path / "early-megatron", tmp_path / "early")
    same(tensors_of(tmp_path / "early"), {name: tensor.to(dtype) for name, tensor in tensors_of(hf).items()})
    same(tensors_of(tmp_path / "late"), tensors_of(tmp_path / "early"))


def test_norms_kept_in_another_dtype(hf: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copyfile(hf / "config.json", source / "config.json")
    save_file(
        {n: t if "norm" in n else t.bfloat16() for n, t in tensors_of(hf).items()},
        source / "model.safetensors",
    )
    convert(source, tmp_path / "megatron", check=True)
    convert(tmp_path / "megatron", tmp_path / "back", check=True)
    same(tensors_of(tmp_path / "back"), tensors_of(source))


def as_run(checkpoint: Path, run: Path, hf_dir: Path, teacher: bool) -> Path:
    """Disguise a converted directory as step 7 of a run: optimizer state, padded vocabulary left
    out, perhaps a teacher.
    """
    step = Path(
        shutil.copytree(
            checkpoint, run / "checkpoints" / "step-7", ignore=shutil.ignore_patterns("hf", "conversion.json")
        )
    )
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for key in [k for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")]:
        for prefix in ["optimizer.state.exp_avg."] + ["teacher."] * teacher:
            metadata.state_dict_metadata[prefix + key] = metadata.state_dict_metadata[key]
            for index, place in list(metadata.storage_data.items()):
                if index.fqn == key:
                    metadata.storage_data[type(index)(prefix + key, index.offset)] = place
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    (step / "megasd.json").write_text(json.dumps({"step": 7}))
    (run / "config.yaml").write_text(
        json.dumps({"model": {"path": str(hf_dir)}, "algorithm": {"recipe": "sc_sdpo"}})
    )
    return step


def test_checkpoint_of_a_run(hf: Path, megatron: Path, tmp_path: Path) -> None:
    step = as_run(megatron, tmp_path / "run", hf, teacher=True)
    convert(step, tmp_path / "model")
    convert(step, tmp_path / "teacher", teacher=True)
    same(tensors_of(tmp_path / "model"), tensors_of(hf))
    same(tensors_of(tmp_path / "teacher"), tensors_of(hf))
    card = (tmp_path / "model" / "README.md").read_text()
    for fact in (
        "| step | 7 |",
        "| recipe | sc_sdpo |",
        "| dtype | float32 |",
        "| parameters | 49,568 |",
        "megasd 0",
    ):
        assert fact in card, card
    # a path that the user did not give
    assert str(hf) not in card
    assert "teacher" in (tmp_path / "teacher" / "README.md").read_text()


def test_pickled_weights_when_asked(hf: Path, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    shutil.copyfile(hf / "config.json", source / "config.json")
    torch.save(tensors_of(hf), source / "pytorch_model.bin")
    convert(source, tmp_path / "megatron", allow_pickle=True)
    convert(tmp_path / "megatron", tmp_path / "back")
    same(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_command_line(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(hf), str(tmp_path / "megatron")]) == 0
    printed = capsys.readouterr().out
    assert "49,568 parameters" in printed and "peak memory" in printed and "VmHWM" in printed
    assert main(["convert", "--to", "megatron", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 2
    assert "is no Hugging Face directory" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    same(tensors_of(tmp_path / "back"), tensors_of(hf))


# ---- interrupted ----


@pytest.mark.parametrize("direction", ["megatron", "hf"])
def test_killed_at_ten_random_points(direction: str, hf: Path, megatron: Path, tmp_path: Path) -> None:
    source, target = (hf, tmp_path / "target") if direction == "megatron" else (megatron, tmp_path / "target")
    convert(source, tmp_path / "whole", file_bytes=6000)
    command = [
        sys.executable,
        "tests/unit/convert/conversion_kill_cases.py",
        str(source),
        str(target),
        "10",
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    assert words[1] == "10", done.stdout
    # some kills came when there was something to go on from
    assert max(map(int, words[4:])) > 0, done.stdout
    whole, resumed = contents(tmp_path / "whole"), contents(target)
    # it says its own name
    if direction == "hf":
        assert resumed.pop("README.md").replace(b"target", b"whole") == whole.pop("README.md")
    assert resumed == whole
    assert not target.with_name("target.partial").exists()


def stopped(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that stops after two files."""
    original, count = work.ResumableDir.file, iter(range(2))

    def file(self, name):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work.ResumableDir, "file", file)
        convert(source, target)


def test_whole_files_are_kept(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(hf, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "__0_1.distcp").write_bytes(b"damaged meanwhile")
    assert convert(hf, tmp_path / "out").resumed_files == 1
    convert(tmp_path / "out", tmp_path / "back")
    same(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_source_changed_in_between(hf_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(hf_copy, tmp_path / "out", monkeypatch)
    first = min(hf_copy.glob("*.safetensors"))
    save_file({name: tensor * 2 for name, tensor in load_file(first).items()}, first)
    refused(hf_copy, tmp_path / "out", "out.partial", "source has changed")
    convert(hf_copy, tmp_path / "out", overwrite=True)
    convert(tmp_path / "out", tmp_path / "back")
    same(tensors_of(tmp_path / "back"), tensors_of(hf_copy))


# ---- what is refused ----


def refused(source: Path, target: Path, *parts: str, **options) -> None:
    before = contents(target) if target.is_dir() else None
    with pytest.raises(UserError) as error:
        convert(source, target, **options)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value
    # nothing new, nothing lost
    assert (contents(target) if target.is_dir() else None) == before


K_NORM = "model.layers.2.self_attn.k_norm.weight"


def edit_file(directory: Path, name: str, edit) -> None:
    """Rewrite the safetensors file that holds `name`; `edit` changes its dict of tensors."""
    path = (
        directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(directory: Path, edit) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path, nbytes: int = 100) -> None:
    os.truncate(path, path.stat().st_size - nbytes)


def drop(directory: Path) -> None:
    edit_file(directory, K_NORM, lambda t: t.pop(K_NORM))
    edit_index(directory, lambda m: m.pop(K_NORM))


def add(directory: Path) -> None:
    edit_file(directory, K_NORM, lambda t: t.update({"model.visual.weight": torch.ones(2)}))
    edit_index(directory, lambda m: m.update({"model.visual.weight": m[K_NORM]}))


def misplace(directory: Path) -> None:
    edit_index(directory, lambda m: m.update({K_NORM: m["lm_head.weight"]}))


def duplicate(directory: Path) -> None:
    norm = {}
    edit_file(directory, K_NORM, lambda t: norm.update({K_NORM: t[K_NORM]}))
    edit_file(directory, "lm_head.weight", lambda t: t.update(norm))


def only_pickle(directory: Path) -> None:
    torch.save(tensors_of(directory), directory / "pytorch_model.bin")
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()


def last_shard(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))


HF_FAULTS = {
    "missing tensor": (drop, (K_NORM, "missing"), {}),
    "unknown tensor": (add, ("model.visual.weight", "no part of this model"), {}),
    "wrong shape": (
        lambda d: edit_file(d, K_NORM, lambda t: t.update({K_NORM: torch.ones(17)})),
        (K_NORM, "(17,)", "(16,)"),
        {},
    ),
    "integers": (
        lambda d: edit_file(d, K_NORM, lambda t: t.update({K_NORM: torch.ones(16).to(torch.int8)})),
        (K_NORM, "I8"),
        {},
    ),
    "NaN": (
        lambda d: edit_file(d, K_NORM, lambda t: t[K_NORM].__setitem__(3, torch.nan)),
        (K_NORM, "NaN", "--allow-nonfinite"),
        {},
    ),
    "too large for float16": (
        lambda d: edit_file(d, K_NORM, lambda t: t[K_NORM].__setitem__(3, 1e5)),
        (K_NORM, "float16", "bfloat16"),
        {"dtype": torch.float16},
    ),
    "two dtypes in one stack": (
        lambda d: edit_file(d, K_NORM, lambda t: t.update({K_NORM: t[K_NORM].half()})),
        (K_NORM, "float16", "--dtype"),
        {},
    ),
    "truncated file": (lambda d: truncate(last_shard(d)), ("model-0", "not a whole safetensors file"), {}),
    "empty file": (lambda d: os.truncate(last_shard(d), 0), ("model-0", "not a whole safetensors file"), {}),
    "index names the wrong file": (misplace, (K_NORM, "index"), {}),
    "index does not name it": (lambda d: edit_index(d, lambda m: m.pop(K_NORM)), (K_NORM, "missing"), {}),
    "index names a missing file": (lambda d: last_shard(d).unlink(), ("model-0", "missing", "index"), {}),
    "index is no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        ("index.json", "not a safetensors index"),
        {},
    ),
    "tensor in two files": (duplicate, (K_NORM,), {}),
    "another model's config.json": (
        lambda d: edit_config(d, num_hidden_layers=5),
        ("model.layers.4.", "missing"),
        {},
    ),
    "unknown family": (
        lambda d: edit_config(d, model_type="gpt_oss"),
        ("config.json", "model_type='gpt_oss'"),
        {},
    ),
    "no config.json": (lambda d: (d / "config.json").unlink(), ("config.json", "No such file"), {}),
    "pickle": (only_pickle, ("pytorch_model.bin", "--allow-pickle"), {}),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_broken_hugging_face_directory(fault: str, hf_copy: Path, tmp_path: Path) -> None:
    plant, parts, options = HF_FAULTS[fault]
    plant(hf_copy)
    refused(hf_copy, tmp_path / "out", *parts, **options)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil-was-here",)


QKV = "decoder.layers.self_attention.linear_qkv.weight"


def edit_metadata(directory: Path, edit) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def place_of(directory: Path, key: str) -> tuple[Path, int, int]:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    place = next(p for index, p in metadata.storage_data.items() if index.fqn == key)
    return directory / place.relative_path, place.offset, place.length


def evil_chunk(directory: Path) -> None:
    path, offset, length = place_of(directory, QKV)
    torch.save(Evil(), directory / "evil")
    data = (directory / "evil").read_bytes()
    assert len(data) <= length

    def point(metadata) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == QKV:
                place.relative_path, place.offset, place.length = path.name, path.stat().st_size, len(data)

    edit_metadata(directory, point)
    with path.open("ab") as file:
        file.write(data)


def set_nan(directory: Path) -> None:
    key = "decoder.layers.self_attention.k_layernorm.weight"
    path, offset, length = place_of(directory, key)
    data = bytearray(path.read_bytes())
    stored = torch.load(io.BytesIO(data[offset : offset + length]), weights_only=True)
    start = data.index(stored.numpy().tobytes(), offset)
    data[start : start + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)


def forget_rows(metadata) -> None:
    metadata.state_dict_metadata[QKV].chunks.pop()


def rename_key(metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc9.weight"] = metadata.state_dict_metadata[QKV]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == QKV:
            metadata.storage_data[type(index)("decoder.layers.mlp.linear_fc9.weight", index.offset)] = place


MEGATRON_FAULTS = {
    "missing tensor": (
        lambda d: edit_metadata(d, lambda m: m.state_dict_metadata.pop(QKV)),
        (QKV, "missing", "q_proj"),
        {},
    ),
    "unknown tensor": (lambda d: edit_metadata(d, rename_key), ("linear_fc9", "no part of this model"), {}),
    "another model's config.json": (
        lambda d: edit_config(d / "hf", num_key_value_heads=4),
        (QKV, "(4, 128, 32)", "(4, 192, 32)"),
        {},
    ),
    "no config.json": (lambda d: shutil.rmtree(d / "hf"), ("no config.json", "--hf"), {}),
    "a chunk is gone": (lambda d: edit_metadata(d, forget_rows), (QKV, "hold 0 of"), {}),
    "truncated file": (
        lambda d: truncate(place_of(d, "output_layer.weight")[0]),
        (".distcp", "output_layer.weight"),
        {},
    ),
    "missing file": (
        lambda d: place_of(d, "output_layer.weight")[0].unlink(),
        (".distcp", "missing", "output_layer.weight"),
        {},
    ),
    "no metadata": (lambda d: (d / "metadata.json").unlink(), ("metadata.json", "No such file"), {}),
    "zarr": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        ("metadata.json", "zarr"),
        {},
    ),
    "damaged metadata": (lambda d: truncate(d / ".metadata"), (".metadata", "not the metadata"), {}),
    "metadata that runs code": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(Evil())),
        (".metadata", "posix.mkdir", "refused"),
        {},
    ),
    "chunk that runs code": (evil_chunk, (QKV, "posix.mkdir"), {}),
    "NaN": (set_nan, ("k_layernorm", "k_norm", "NaN"), {}),
    "no teacher": (lambda d: None, ("holds no teacher",), {"teacher": True}),
}


@pytest.mark.parametrize("fault", MEGATRON_FAULTS)
def test_broken_megatron_directory(
    fault: str, megatron_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant, parts, options = MEGATRON_FAULTS[fault]
    plant(megatron_copy)
    refused(megatron_copy, tmp_path / "out", *parts, **options)
    assert not (tmp_path / "evil-was-here").exists()


def test_nonfinite_when_asked(hf_copy: Path, tmp_path: Path) -> None:
    edit_file(hf_copy, K_NORM, lambda t: t[K_NORM].__setitem__(3, torch.nan))
    convert(hf_copy, tmp_path / "megatron", allow_nonfinite=True, check=True)
    convert(tmp_path / "megatron", tmp_path / "back", allow_nonfinite=True, check=True)
    same(tensors_of(tmp_path / "back"), tensors_of(hf_copy))


def test_disk_full_is_seen_first(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, work.SPARE_BYTES + 1000)
    )
    refused(hf, tmp_path / "out", "out", "GiB of disk", "make room")


@contextmanager
def no_file_beyond(nbytes: int) -> Iterator[None]:
    """Real errors of the system in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_write_error_leaves_what_is_whole(hf: Path, tmp_path: Path) -> None:
    with no_file_beyond(20_000):
        refused(hf, tmp_path / "out", "__0_0.distcp", "File too large", "goes on")
    convert(hf, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back")
    same(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_read_only_target(hf: Path) -> None:
    # read-only even for root
    refused(hf, Path("/sys/megasd-out"), "/sys/megasd-out.partial", "cannot be written")


def test_target_is_there(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("my own")
    refused(hf, target, "out", "is there already", "--overwrite")
    refused(hf, target, "out", "no directory of weights", overwrite=True)
    (target / "thesis.tex").unlink()
    convert(hf, target, overwrite=True)
    convert(hf, target, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_two_at_once(hf: Path, tmp_path: Path) -> None:
    with work.ResumableDir(tmp_path / "out", {}, {"file": 1}):
        refused(hf, tmp_path / "out", "out.partial", "another conversion is writing")


def test_check_finds_a_changed_value(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megasd.convert import hf_to_megatron as module

    original = module.write_chunk
    monkeypatch.setattr(
        module, "write_chunk", lambda tensor, stream: original(tensor + (tensor.shape == (1, 16)), stream)
    )
    refused(hf, tmp_path / "out", "norm.weight", "does not come back", check=True)


def test_check_of_logits(hf: Path, megatron: Path, hf_copy: Path) -> None:
    """In a process of its own: it joins a process group. One row of one matrix is enough to be seen."""
    name = "model.layers.2.mlp.up_proj.weight"
    edit_file(hf_copy, name, lambda t: t[name][3].mul_(1.5))
    code = (
        "import sys; from pathlib import Path; from megasd.convert.check_logits import logits_difference as"
        " d; m, *hf = map(Path, sys.argv[1:]); print(*(d(m, h)[0] for h in hf))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(megatron), str(hf), str(hf_copy)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    right, wrong = map(float, done.stdout.split()[-2:])
    assert right < 1e-4 and wrong > 1e-2


# ---- the writer of exports ----


def test_writer_takes_any_order_and_keeps_the_old_on_error(hf: Path, tmp_path: Path) -> None:
    tensors, target = tensors_of(hf), tmp_path / "out"
    with HFWriter(target, hf) as writer:
        for name in sorted(tensors, reverse=True):
            writer.add(name, tensors[name])
    same(tensors_of(target), tensors)
    before = contents(target)
    cases = [
        ("no tensor of it", {"model.visual.weight": torch.ones(2)}, "model.visual.weight is not a tensor"),
        ("another shape", {K_NORM: torch.ones(17)}, K_NORM),
        ("another dtype", {K_NORM: tensors[K_NORM].half()}, "torch.float16"),
        ("not all", {}, "was never written"),
    ]
    for why, given, part in cases:
        with pytest.raises(UserError, match=part), HFWriter(target, hf) as writer:
            writer.add("model.norm.weight", tensors["model.norm.weight"])
            for name, tensor in given.items():
                writer.add(name, tensor)
        assert contents(target) == before, why
    with (
        no_file_beyond(20_000),
        pytest.raises(UserError, match="out.tmp: File too large"),
        HFWriter(target, hf) as writer,
    ):
        writer.add("model.norm.weight", tensors["model.norm.weight"])
    assert contents(target) == before
    with pytest.raises(UserError, match="was written before"), HFWriter(target, hf) as writer:
        writer.add("model.norm.weight", tensors["model.norm.weight"])
        writer.add("model.norm.weight", tensors["model.norm.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
