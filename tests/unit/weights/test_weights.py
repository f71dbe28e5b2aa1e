"""Hugging Face <-> Megatron shards, without a process group.

Proves, for tiny random Qwen3 (untied, tied), Qwen3 with fewer query groups than ranks, and
Qwen3-MoE as transformers writes them: every shard at TP 1, 2, 4 and EP 1, 2 together holds every
value of the file once, bit for bit; the fused QKV and fc1 have Megatron's row order; padded
vocabulary rows are zeros; a directory that is broken or another model's is refused by a line naming
the tensor or file. Does not prove that Megatron computes the same logits
(tests/distributed/test_weights.py does) nor the messages of a gather.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasd.models import registry, tp_layouts
from megasd.models.param_table import global_params
from megasd.models.registry import config_from_hf
from megasd.types import UserError
from megasd.weights import hf_files as files
from megasd.weights.export import export_hf, plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import read_hf_config, save_hf, write_weights
from megasd.weights.load import load_hf
from tests.tiny_weights import FAMILIES, local_params, tiny_checkpoint


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / request.param, request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "qwen3", "qwen3")


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def load_all(hf_dir: Path, tp: int, ep: int = 1, **kwargs) -> list[dict[str, torch.Tensor]]:
    hf = read_hf_config(hf_dir)
    shards = []
    for rank in range(max(tp, ep)):
        first_expert = registry.param_table(hf).num_experts // ep * (rank % ep)
        params = global_params(local_params(hf, tp_size=tp, ep_size=ep, **kwargs), expert_offset=first_expert)
        load_hf(params, hf_dir, tp_rank=rank % tp, tp_size=tp, ep_rank=rank % ep, ep_size=ep)
        shards.append(params)
    return shards


def merge_all(hf: dict, shards: list[dict[str, torch.Tensor]], tp: int, ep: int) -> dict[str, torch.Tensor]:
    """What export_hf does over process groups, with tp_layouts.merge alone."""
    table = registry.param_table(hf)
    out = {n: torch.full(s, torch.nan) for n, s in table.expected_tensors().items()}
    for rank, params in enumerate(shards):
        for name, param in params.items():
            rule, shape = table.rule(name), tuple(param.shape)
            layout = rule.shard(shape, *((rank % tp, tp) if rule.is_cut(shape, ep) else (0, 1)))
            tp_layouts.merge([param], [layout], [out[part] for part in rule.parts])
    return out


def test_expected_tensors_are_those_of_the_file(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    expected = registry.param_table(read_hf_config(checkpoint)).expected_tensors()
    assert {name: tuple(t.shape) for name, t in stored.items()} == expected


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip_is_bit_exact(checkpoint: Path, tp: int) -> None:
    hf = read_hf_config(checkpoint)
    for ep in (1, 2) if hf["model_type"] == "qwen3_moe" and tp < 4 else (1,):
        equal(
            merge_all(hf, load_all(checkpoint, tp, ep), tp, ep), load_file(checkpoint / "model.safetensors")
        )


def exported(params: dict[str, torch.Tensor], hf: dict, **kwargs) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(Gather(plan_of(params, hf, **kwargs), params))}


def test_one_process_export_is_bit_exact(checkpoint: Path) -> None:
    hf = read_hf_config(checkpoint)
    params = load_all(checkpoint, 1)[0]
    tensors = exported(params, hf)
    assert list(tensors) == list(registry.param_table(hf).expected_tensors())
    equal(tensors, load_file(checkpoint / "model.safetensors"))
    assert {t.dtype for t in exported(params, hf, dtype=torch.bfloat16).values()} == {torch.bfloat16}


def test_fused_row_orders() -> None:
    """QKV: per query group its query heads, its key, its value; fc1: gate then up on every rank."""
    head, groups, heads = 2, 2, 4
    q, k, v = (
        torch.arange(n * head).reshape(-1, 1) + base for n, base in ((heads, 0), (groups, 100), (groups, 200))
    )
    fused = torch.cat(
        [torch.cat([q[4 * g : 4 * g + 4], k[2 * g : 2 * g + 2], v[2 * g : 2 * g + 2]]) for g in range(groups)]
    )
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    # 4 ranks: half a group each
    for size in (1, 2, 4):
        for rank in range(size):
            shard = tp_layouts.split((q, k, v), tp_layouts.qkv(shapes, rank, size, num_query_groups=groups))
            assert torch.equal(shard, fused.chunk(size)[rank])
    gate, up = torch.arange(8).reshape(8, 1), torch.arange(8).reshape(8, 1) + 100
    for rank in range(2):
        shard = tp_layouts.split((gate, up), tp_layouts.gated(((8, 1), (8, 1)), rank, 2))
        assert torch.equal(shard, torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]))


@pytest.mark.parametrize(
    ("vocab", "divisor", "tp", "padded"),
    [(96, 1, 4, 96), (97, 1, 4, 100), (96, 128, 2, 256), (151936, 128, 8, 152576)],
)
def test_padded_vocab_size(vocab: int, divisor: int, tp: int, padded: int) -> None:
    assert tp_layouts.padded_vocab_size(vocab, divisor, tp) == padded


def test_padded_vocabulary_rows_are_zeros_and_never_exported(dense: Path) -> None:
    hf = read_hf_config(dense)
    # 96 tokens: rank 2 holds 16 of them, rank 3 none
    shards = load_all(dense, 4, padded_vocab=4 * 40)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.all(shards[2][name][16:] == 0) and torch.all(shards[3][name] == 0)
    equal(merge_all(hf, shards, 4, 1), load_file(dense / "model.safetensors"))


def test_pipeline_stage_and_transformer_engine_names(dense: Path) -> None:
    hf, stored = read_hf_config(dense), load_file(dense / "model.safetensors")
    stage = local_params(hf, tp_size=1, layers=range(2), first=False)
    te = {
        name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
            "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        ): param
        for name, param in stage.items()
    }
    load_hf(global_params(te, layer_offset=2), dense, tp_rank=0, tp_size=1)
    assert torch.equal(
        te["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"],
        stored["model.layers.3.post_attention_layernorm.weight"],
    )
    assert torch.equal(
        te["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"],
        stored["model.layers.2.input_layernorm.weight"],
    )


def test_cast_to_the_parameter(dense: Path) -> None:
    params = {name: p.bfloat16() for name, p in local_params(read_hf_config(dense), tp_size=1).items()}
    load_hf(params, dense, tp_rank=0, tp_size=1)
    stored = load_file(dense / "model.safetensors")["lm_head.weight"]
    assert torch.equal(params["output_layer.weight"], stored.bfloat16())


def test_saved_directory_loads_in_transformers(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3ForCausalLM

    stored = load_file(dense / "model.safetensors")
    # several files and an index
    monkeypatch.setattr(files, "SHARD_BYTES", 40_000)
    (dense / "tokenizer.json").write_text("{}")
    # the second one replaces the first
    for _ in range(2):
        save_hf({name: t.bfloat16() for name, t in stored.items()}, dense, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    } <= names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    # config.json tells the truth about the file
    assert model.dtype == torch.bfloat16
    assert torch.equal(
        model.state_dict()["model.layers.3.mlp.up_proj.weight"],
        stored["model.layers.3.mlp.up_proj.weight"].bfloat16(),
    )
    params = local_params(read_hf_config(dense), tp_size=1)
    # through the index
    load_hf(params, tmp_path / "out", tp_rank=0, tp_size=1)
    assert torch.equal(params["output_layer.weight"], stored["lm_head.weight"].bfloat16().float())


def test_write_weights_is_weights_and_config(dense: Path, tmp_path: Path) -> None:
    stored = load_file(dense / "model.safetensors")
    nbytes = write_weights(stored, dense, tmp_path / "a")
    assert nbytes == sum(t.nbytes for t in stored.values())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    equal(load_file(tmp_path / "a" / "model.safetensors"), stored)


# ---- what is refused ----


def refused(hf_dir: Path, *parts: str, **kwargs) -> None:
    params = local_params(read_hf_config(hf_dir), tp_size=1)
    with pytest.raises(UserError) as error:
        load_hf(params, hf_dir, tp_rank=0, tp_size=1, **kwargs)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value
    # nothing was copied
    assert all(p.isnan().all() for p in params.values())


def rewrite(hf_dir: Path, edit) -> None:
    tensors = load_file(hf_dir / "model.safetensors")
    edit(tensors)
    save_file(tensors, hf_dir / "model.safetensors")


def test_missing_tensor(copy: Path) -> None:
    rewrite(copy, lambda t: t.pop("model.layers.2.self_attn.k_norm.weight"))
    refused(copy, "model.layers.2.self_attn.k_norm.weight", "missing")


def test_extra_tensor(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(copy, "model.layers.0.self_attn.q_proj.bias", "no part of this model")


def test_wrong_shape(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 31)}))
    refused(copy, "model.layers.0.mlp.up_proj.weight", "(48, 31)", "(48, 32)")


def test_integer_tensor(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    refused(copy, "model.norm.weight", "I8")


def test_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, str(path), "not a whole safetensors file")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, str(copy), "neither")


def test_index_with_missing_outside_and_lying_files(copy: Path) -> None:
    stored = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(stored, copy / "model-1.safetensors")
    index = copy / "model.safetensors.index.json"

    def write(weight_map: dict[str, str]) -> None:
        index.write_text(
            json.dumps({"weight_map": dict.fromkeys(stored, "model-1.safetensors") | weight_map})
        )

    write({"lm_head.weight": "model-2.safetensors"})
    refused(copy, "model-2.safetensors", "missing")
    write({"lm_head.weight": "../model-1.safetensors"})
    refused(copy, "../model-1.safetensors", "outside")
    save_file({"other": torch.zeros(1)}, copy / "model-2.safetensors")
    write({"lm_head.weight": "model-2.safetensors"})
    refused(copy, "model-2.safetensors", "lm_head.weight")
    index.write_text("[]")
    refused(copy, str(index))


def test_model_without_a_parameter_or_of_another_shape(dense: Path) -> None:
    hf = read_hf_config(dense)
    params = local_params(hf, tp_size=1)
    del params["decoder.layers.1.self_attention.q_layernorm.weight"]
    with pytest.raises(UserError, match="model.layers.1.self_attn.q_norm.weight"):
        load_hf(params, dense, tp_rank=0, tp_size=1)
    params = local_params(hf, tp_size=2)
    with pytest.raises(UserError, match="cannot hold a vocabulary"):
        load_hf(params, dense, tp_rank=0, tp_size=1)
    with pytest.raises(UserError, match="no Hugging Face counterpart"):
        load_hf({"module.decoder.final_layernorm.weight": torch.zeros(32)}, dense, tp_rank=0, tp_size=1)
    params = local_params(hf, tp_size=1, layers=range(2))
    with pytest.raises(UserError, match=r"no rank holds decoder\.layers\.2.*model\.layers\.2"):
        exported(params, hf)
    with pytest.raises(UserError, match=r"layers\.4"):
        load_hf(global_params(local_params(hf, tp_size=1), layer_offset=1), dense, tp_rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"head_dim": None}, "head_dim"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]}, "mlp_only_layers"),
        (
            {"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2},
            "decoder_sparse_step",
        ),
    ],
)
def test_unsupported_config_names_the_key(dense: Path, change: dict, key: str) -> None:
    with pytest.raises(UserError, match=key) as error:
        config_from_hf(read_hf_config(dense) | change)
    assert "\n" not in str(error.value)


def test_hub_spelling_of_experts(dense: Path) -> None:
    hf = read_hf_config(dense)
    hub = {key: value for key, value in hf.items() if key != "rope_parameters"} | {
        "rope_theta": 5e5,
        "rope_scaling": None,
    }
    moe = hub | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "norm_topk_prob": True,
    }
    assert config_from_hf(moe).transformer["num_moe_experts"] == 8
