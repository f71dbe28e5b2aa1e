"""Model families as pure functions: tables, rotary tables and layouts, without a process group.

Proves: the tables of published models (8B to 72B) have their published numbers of parameters, and
the names and shapes of transformers' own models; rotary tables equal transformers' bit for bit, in
both spellings of config.json and for random parameters; for random shapes (heads, groups, head
size, hidden size, vocabulary) and 1 to 8 ranks the shards hold every value of a file once;
TransformerEngine's names, virtual stages and fp8 parameters; a config.json that asks for another
model is refused by its key. Does not prove what Megatron computes with them
(tests/distributed/test_families.py), nor that a published config.json still says so.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megasd.config.validate_model import MODEL_TYPES
from megasd.models import registry, tp_layouts
from megasd.models.param_table import global_name, global_params
from megasd.models.registry import config_from_hf
from megasd.models.rope import rope
from megasd.types import UserError
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from megasd.weights.te_fp8 import plain
from tests.tiny_weights import COMMON, LLAMA3, MODELS, PLAIN, YARN, local_params, tiny_checkpoint

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"
# Numbers of parameters as the model hub counts them in each repository's safetensors files; every
# figure was found quoted elsewhere too.
PUBLISHED = {
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "OLMo-2-1124-7B": 7_298_617_344,
    "OLMo-2-1124-13B": 13_716_198_400,
    "OLMo-2-0325-32B": 32_234_279_936,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-Base-2407": 12_247_782_400,
    "Mistral-Small-24B-Base-2501": 23_572_403_200,
}


def published(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def transformers_config(hf: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(hf))


# ---- published models ----


def test_a_config_for_every_published_size_and_no_other() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    hf = published(name)
    expected = registry.param_table(hf).expected_tensors()
    assert sum(math.prod(shape) for shape in expected.values()) == PUBLISHED[name]
    family = config_from_hf(hf)
    assert len(family.ropes[0].inverse_frequencies) * 2 == family.transformer["kv_channels"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            transformers_config(hf | {"num_hidden_layers": 4, "layer_types": None})
        )
    own = {n: tuple(p.shape) for n, p in model.named_parameters()}
    # transformers 5 fuses the experts of a layer
    if hf["model_type"] == "qwen3_moe":
        own = {n: shape for n, shape in own.items() if "experts" not in n}
        expected = {n: shape for n, shape in expected.items() if "experts" not in n}
    few = {
        n: shape
        for n, shape in expected.items()
        if not n.startswith("model.layers.") or int(n.split(".")[2]) < 4
    }
    assert few == own


# ---- rotary tables ----


def transformers_rope(hf: dict, layer_type: str | None = None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor of transformers' own rotary module."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    config = transformers_config(hf)
    if layer_type is None:
        module = LlamaRotaryEmbedding(config)
        return module.inv_freq, module.attention_scaling
    module = Olmo3RotaryEmbedding(config)
    return getattr(module, f"{layer_type}_inv_freq"), getattr(module, f"{layer_type}_attention_scaling")


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotary_tables_of_published_models(name: str) -> None:
    hf, ropes = published(name), config_from_hf(published(name)).ropes
    kinds = ("full_attention", "sliding_attention") if hf["model_type"] == "olmo3" else (None,)
    for kind, found in zip(kinds, ropes, strict=True):
        frequencies, factor = transformers_rope(hf, kind)
        assert (
            torch.equal(torch.tensor(found.inverse_frequencies), frequencies)
            and found.attention_factor == factor
        )


THETAS = st.sampled_from([10_000.0, 500_000.0, 1_000_000.0, 123_456.0])
FACTORS = st.floats(1.5, 40.0)
ROPES = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default"), "rope_theta": THETAS}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "rope_theta": THETAS, "factor": FACTORS}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": THETAS,
            "factor": FACTORS,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 9.0),
            "original_max_position_embeddings": st.sampled_from([16, 64, 8192]),
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "rope_theta": THETAS, "factor": FACTORS},
        optional={
            "original_max_position_embeddings": st.sampled_from([16, 64, 8192]),
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
        },
    ),
)


@settings(max_examples=60, deadline=None)
@given(parameters=ROPES, head_dim=st.sampled_from([8, 16, 64, 128]))
def test_rotary_tables_of_any_parameters_in_both_spellings(parameters: dict, head_dim: int) -> None:
    hf = COMMON | {
        "model_type": "llama",
        "head_dim": head_dim,
        "max_position_embeddings": 65536,
        "rope_parameters": parameters,
    }
    found = rope(hf, head_dim)
    frequencies, factor = transformers_rope(hf)
    assert torch.equal(torch.tensor(found.inverse_frequencies), frequencies)
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)
    old = {name: value for name, value in hf.items() if name != "rope_parameters"}
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    kind = scaling.pop("rope_type")
    old |= {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": scaling | {"type": kind} if scaling else None,
    }
    assert rope(old, head_dim) == found


def test_olmo3_in_both_spellings(tmp_path: Path) -> None:
    nested = MODELS["olmo3"] | {
        "rope_parameters": {
            kind: p | {"rope_theta": 5e5} for kind, p in MODELS["olmo3"]["rope_parameters"].items()
        }
    }
    new = COMMON | nested | {"rms_norm_eps": 1e-6}
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    old |= {
        "rope_theta": 5e5,
        "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"},
    }
    assert config_from_hf(old) == config_from_hf(new)
    for kind, found in zip(("full_attention", "sliding_attention"), config_from_hf(old).ropes, strict=True):
        frequencies, factor = transformers_rope(old, kind)
        assert (
            torch.equal(torch.tensor(found.inverse_frequencies), frequencies)
            and found.attention_factor == factor
        )


# ---- layouts for random shapes ----


@st.composite
def shapes(draw) -> tuple[dict, int]:
    """A config.json of random sizes and a number of ranks over which they divide (the vocabulary
    need not).
    """
    size = draw(st.sampled_from([1, 2, 4, 8]))
    model_type = draw(st.sampled_from(["qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "olmo2", "olmo3"]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = groups * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    hf = COMMON | MODELS.get(model_type, MODELS["qwen3"]) | {"model_type": model_type, "rms_norm_eps": 1e-6}
    hf |= {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": draw(st.integers(1, 3)),
    }
    hf |= {
        "head_dim": head_dim,
        "hidden_size": draw(st.integers(1, 12)),
        "vocab_size": draw(st.integers(1, 50)),
    }
    width = size * draw(st.integers(1, 5))
    hf |= {"intermediate_size": width, "moe_intermediate_size": width, "num_experts": draw(st.integers(1, 3))}
    hf["tie_word_embeddings"] = draw(st.booleans())
    return hf, size


def local_shape(rule, hf: dict, size: int) -> tuple[int, ...]:
    """What Megatron would allocate, or None where it would refuse to."""
    whole = tuple(rule.parts.values())
    if rule.layout is tp_layouts.vocab:
        return (tp_layouts.padded_vocab_size(hf["vocab_size"], 1, size) // size, hf["hidden_size"])
    return rule.layout(whole, 0, size).shape


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=shapes())
def test_shards_hold_every_value_once(drawn: tuple[dict, int]) -> None:
    hf, size = drawn
    table = registry.param_table(hf)
    stored = {}
    for name in table.names():
        rule = table.rule(name)
        parts = [stored.setdefault(n, torch.randn(s)) for n, s in rule.parts.items()]
        try:
            shape = local_shape(rule, hf, size)
        except ValueError:
            # these heads do not divide over so many ranks
            with pytest.raises(UserError, match="tensor_model_parallel_size"):
                rule.shard((1,), 0, size)
            continue
        cut = rule.is_cut(shape, 1)
        ranks = size if cut else 1
        layouts = [rule.shard(shape, rank, ranks) for rank in range(ranks)]
        shards = [tp_layouts.split(parts, layout) for layout in layouts]
        merged = [torch.full_like(part, torch.nan) for part in parts]
        tp_layouts.merge(shards, layouts, merged)
        for part, found in zip(parts, merged, strict=True):
            assert torch.equal(part, found), name
        values = sum(
            s.length * (math.prod(layout.shape) // layout.shape[s.dim])
            for layout in layouts
            for s in layout.segments
        )
        assert values == sum(part.numel() for part in parts), name
        filled = sum(shard.numel() for shard in shards)
        assert filled == values or rule.layout is tp_layouts.vocab, name


def test_bias_rows_go_with_their_weight_rows() -> None:
    """The bias of a fused QKV row is that of the same row's weight, also where ranks share a query group."""
    table = registry.param_table(COMMON | MODELS["qwen2"] | {"rms_norm_eps": 1e-6})
    weight, bias = (table.rule(f"decoder.layers.0.self_attention.linear_qkv.{n}") for n in ("weight", "bias"))
    rows = [torch.randn(shape[0]) for shape in bias.parts.values()]
    columns = [row[:, None].expand(-1, 32).contiguous() for row in rows]
    for size in (1, 2, 4, 8):
        for rank in range(size):
            split = tp_layouts.split(columns, weight.shard((64 // size, 32), rank, size))
            assert torch.equal(split[:, 0], tp_layouts.split(rows, bias.shard((64 // size,), rank, size)))


# ---- names, virtual stages, fp8 ----


def test_transformer_engine_names() -> None:
    renamed = {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.4.input_layernorm.weight"
        ),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.4.pre_mlp_layernorm.weight",
        # before experts
        "decoder.layers.0.pre_mlp_layernorm.weight": "decoder.layers.4.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight1": (
            "decoder.layers.5.mlp.experts.local_experts.3.linear_fc1.weight"
        ),
        "decoder.layers.1.mlp.experts.linear_fc2.weight0": (
            "decoder.layers.5.mlp.experts.local_experts.2.linear_fc2.weight"
        ),
        "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight": (
            "decoder.layers.5.mlp.experts.local_experts.2.linear_fc2.weight"
        ),
        "decoder.layers.1.self_attention.linear_proj.post_layernorm.weight": (
            "decoder.layers.5.self_attention.linear_proj.post_layernorm.weight"
        ),
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    }
    for local, name in renamed.items():
        assert global_name(local, layer_offset=4, expert_offset=2) == name


def test_chunks_of_virtual_stages_are_one_dictionary(tmp_path: Path) -> None:
    """A rank that holds layers 1 and 3, each as layer 0 of its own chunk."""
    path = tiny_checkpoint(tmp_path / "qwen3", "qwen3")
    hf, stored = read_hf_config(path), load_file(path / "model.safetensors")
    chunks = [local_params(hf, tp_size=1, layers=range(1), first=False, last=last) for last in (False, True)]
    params = global_params(chunks[0], layer_offset=1) | global_params(chunks[1], layer_offset=3)
    load_hf(params, path, tp_rank=0, tp_size=1)
    for chunk, layer in zip(chunks, (1, 3), strict=True):
        found = chunk["decoder.layers.0.mlp.linear_fc2.weight"]
        assert torch.equal(found, stored[f"model.layers.{layer}.mlp.down_proj.weight"])


class Float8Tensor(torch.Tensor):
    """Like TransformerEngine's: an operation sees a dequantised copy; only copy_ of the whole
    writes, rounded.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_:
                return func(args[0], args[1].to(torch.float8_e4m3fn).to(args[0].dtype))
            if func in (torch.Tensor.narrow, torch.Tensor.zero_):
                return func(args[0].clone(), *args[1:])
            return func(*args, **(kwargs or {}))

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_fp8_parameters_are_loaded_whole_and_exported_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "transformer_engine.pytorch.tensor", SimpleNamespace(QuantizedTensor=Float8Tensor)
    )
    path = tiny_checkpoint(tmp_path / "qwen3", "qwen3")
    params = local_params(read_hf_config(path), tp_size=2)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    params[name] = params[name].as_subclass(Float8Tensor)
    load_hf(params, path, tp_rank=1, tp_size=2)
    stored = load_file(path / "model.safetensors")
    gate, up = (stored[f"model.layers.0.mlp.{n}_proj.weight"].chunk(2)[1] for n in ("gate", "up"))
    found = plain(params[name])
    assert type(found) is torch.Tensor and torch.equal(
        found, torch.cat([gate, up]).to(torch.float8_e4m3fn).float()
    )


# ---- what is refused ----


def test_the_command_line_knows_the_same_families() -> None:
    assert set(MODEL_TYPES) == set(registry.MODULES)


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "longrope", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": PLAIN | {"mscale": 2.0}}, "mscale"),
        ("llama", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"original_max_position_embeddings": 16}, "original_max_position_embeddings"),
        ("llama", {"rope_parameters": PLAIN, "rope_scaling": LLAMA3}, "rope_scaling"),
        ("llama", {"rope_parameters": None}, "rope_theta"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mistral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("olmo3", {"sliding_window": None}, "sliding_window"),
        ("olmo3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("olmo3", {"rope_parameters": YARN}, "rope_parameters"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, "truncate"),
        ("olmo3", {"rope_theta": 1e6}, "rope_theta"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e6}, "rope_theta"),
    ],
)
def test_unsupported_config_names_the_key(family: str, change: dict, key: str) -> None:
    hf = COMMON | MODELS[family] | {"rms_norm_eps": 1e-6}
    config_from_hf(hf)
    with pytest.raises(UserError, match=key) as error:
        config_from_hf(hf | change)
    assert "\n" not in str(error.value)


def test_mistral_must_say_its_window() -> None:
    hf = COMMON | MODELS["mistral"] | {"rms_norm_eps": 1e-6}
    del hf["sliding_window"]
    with pytest.raises(UserError, match="sliding_window"):
        config_from_hf(hf)


def test_tied_checkpoint_with_a_copy_of_the_embedding(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "llama_tied", "llama_tied")
    stored = load_file(path / "model.safetensors")
    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, path / "model.safetensors"
    )
    from megasd.weights.load import check_hf

    check_hf(path)
