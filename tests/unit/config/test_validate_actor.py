"""Proves that keys for speed and precision that cannot act together, with this machine or with a
model are refused in one line that names the key and the fix; and what sequences are padded to. Does
not prove that what is accepted runs on a GPU (tests/gpu).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config
from megasd.config.schema import Config, ConfigError
from megasd.config.validate import validate, validate_values
from megasd.config.validate_actor import check_actor, check_sizes, sequence_multiple
from tests.unit.fake_model import CONFIG, MOE, write_inputs

FP8 = "actor.fp8=hybrid"
TP, PP, CP = (
    "actor.tensor_model_parallel_size",
    "actor.pipeline_model_parallel_size",
    "actor.context_parallel_size",
)
SP = "actor.sequence_parallel=true"
ALIGNED = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
}


def config_of(*overrides: str) -> Config:
    return load_config([], ["model.path=m", "data.train=d", *overrides], RECIPES)


def refusal(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


# --- without TransformerEngine ---

NEEDS_TE = [
    (
        FP8,
        (
            "actor.fp8=hybrid: TransformerEngine is not installed on this machine; set actor.fp8=null or"
            " install megasd[te] on a Hopper GPU"
        ),
    ),
    ("actor.apply_rope_fusion=true", "actor.apply_rope_fusion=true: TransformerEngine is not installed"),
    ("actor.cuda_graph=true", "set actor.cuda_graph=false or install megasd[te] on a GPU machine"),
    ("actor.attention_backend=fused", "set actor.attention_backend=auto or install megasd[te]"),
    (f"actor.tp_comm_overlap=true {TP}=2 {SP}", "set actor.tp_comm_overlap=false or install megasd[te]"),
]


@pytest.mark.parametrize("overrides, expected", NEEDS_TE, ids=[o for o, _ in NEEDS_TE])
def test_without_transformer_engine(
    overrides: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megasd.config.validate_actor.find_spec", lambda name: None)
    config = load_config([], [*write_inputs(tmp_path), *overrides.split()], RECIPES)
    assert expected in refusal(validate, config)
    # a laptop may still plan and launch it
    validate_values(config, 2)


def test_with_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megasd.config.validate_actor.find_spec", lambda name: object())
    validate(load_config([], [*write_inputs(tmp_path, **ALIGNED, num_hidden_layers=4), FP8], RECIPES))


# --- values together ---

BAD = [
    ("actor.fp8_param_gather=true", "actor.fp8_param_gather: needs actor.fp8"),
    (f"{FP8} actor.dtype=float32", "actor.dtype=float32: FP8 layers compute next to bfloat16"),
    (
        f"{FP8} actor.fp8_recipe=delayed",
        "set actor.first_last_layers_bf16=false, or actor.fp8_recipe=tensorwise",
    ),
    (
        f"{FP8} actor.fp8_param_gather=true actor.use_distributed_optimizer=false",
        "needs actor.use_distributed_optimizer",
    ),
    (
        "actor.overlap_param_gather=true actor.use_distributed_optimizer=false",
        "needs actor.use_distributed_optimizer",
    ),
    ("actor.overlap_param_gather=true", "needs actor.overlap_grad_reduce"),
    ("actor.tp_comm_overlap=true", f"actor.tp_comm_overlap: needs {TP} > 1"),
    (f"actor.tp_comm_overlap=true {TP}=2", "actor.tp_comm_overlap: needs actor.sequence_parallel"),
    (
        f"actor.tp_comm_overlap=true {TP}=2 {SP} actor.packing=true",
        "actor.tp_comm_overlap: needs microbatches of one shape",
    ),
    (
        "actor.recompute_num_layers=2",
        "actor.recompute_num_layers=2: read with actor.recompute_granularity=full alone",
    ),
    (
        "actor.recompute_method=block actor.recompute_granularity=selective",
        "actor.recompute_method=block: read with",
    ),
    ("actor.recompute_granularity=selective actor.recompute_modules=[]", "names nothing to compute again"),
    (
        "actor.recompute_granularity=selective actor.recompute_modules=[attn]",
        "no 'attn' in these models; choose from core_attn",
    ),
    (
        "actor.recompute_granularity=selective actor.recompute_modules=[layernorm]",
        "no 'layernorm' in these models",
    ),
    ("actor.cuda_graph=true actor.packing=true", "actor.cuda_graph: needs microbatches of one shape"),
    (
        "actor.cuda_graph=true actor.max_tokens_per_microbatch=8192",
        "set actor.max_tokens_per_microbatch=null",
    ),
    (f"actor.cuda_graph=true {PP}=2", f"set {PP}=1, or actor.cuda_graph=false"),
    ("actor.cuda_graph=true actor.recompute_granularity=full", "graphs no layers that are recomputed whole"),
    (f"actor.cuda_graph=true {FP8}", "set actor.fp8=null, or actor.cuda_graph=false"),
]


@pytest.mark.parametrize("overrides, expected", BAD, ids=[o for o, _ in BAD])
def test_bad_together(overrides: str, expected: str) -> None:
    assert expected in refusal(check_actor, config_of(*overrides.split()))


# --- with a model ---

BAD_SIZES = [
    (
        "actor.recompute_granularity=full actor.recompute_num_layers=3",
        {},
        "must be a divisor of the 4 layers",
    ),
    (
        "actor.recompute_granularity=full actor.recompute_num_layers=4 " + f"{PP}=2",
        {},
        "must be a divisor of the 2 layers",
    ),
    (
        "actor.recompute_granularity=full actor.recompute_method=block actor.recompute_num_layers=5",
        {},
        "must be at most the 4 layers of a pipeline stage",
    ),
    (
        "actor.recompute_granularity=selective actor.recompute_modules=[moe]",
        {},
        "has no experts; give mlp instead of moe",
    ),
    ("actor.recompute_granularity=selective actor.recompute_modules=[mlp]", MOE, "give moe instead of mlp"),
    ("actor.cuda_graph=true", MOE, "actor.cuda_graph: the experts of"),
    (f"{FP8} actor.num_layers_at_start_in_bf16=3", {}, "no layer of the 4"),
    (f"{FP8} actor.num_layers_at_end_in_bf16=3 {PP}=2", {}, "a pipeline stage of config.json has 2 layers"),
    (FP8, {"hidden_size": None}, "config.json: hidden_size must be a positive integer, not None"),
    (FP8, {"hidden_size": 250}, "hidden_size of config.json is 250, no multiple of 16; set actor.fp8=null"),
    (
        f"{FP8} {TP}=4",
        {"intermediate_size": 480},
        "intermediate_size of config.json is 120 on each of 4 tensor-parallel ranks",
    ),
    (
        f"{FP8} {TP}=4",
        {"num_attention_heads": 4, "head_dim": 24},
        "attention output (heads x head_dim) of config.json is 24 on each",
    ),
    (
        f"{FP8} {TP}=2",
        {"num_key_value_heads": 2, "head_dim": 36},
        "attention output (heads x head_dim) of config.json is 144",
    ),
    (
        f"{FP8} {TP}=2 {SP} actor.fp8_recipe=blockwise",
        {"hidden_size": 320},
        "hidden_size of config.json is 320, no multiple of 128",
    ),
]


@pytest.mark.parametrize("overrides, model, expected", BAD_SIZES, ids=[f"{o} {m}" for o, m, _ in BAD_SIZES])
def test_bad_sizes(overrides: str, model: dict, expected: str) -> None:
    # 8 heads of 36: 144 rows on a rank are nine sixteens, their keys and values are not
    if expected.endswith("is 144"):
        expected = "query, key and value rows of config.json is 216"
    whole = {**CONFIG, **ALIGNED, "num_hidden_layers": 4, **model}
    assert expected in refusal(check_sizes, config_of(*overrides.split()), whole, "config.json")


def test_good_sizes() -> None:
    whole = {**CONFIG, **ALIGNED, "num_hidden_layers": 4}
    for overrides in (
        FP8,
        f"{FP8} {TP}=4 {SP}",
        f"{FP8} {TP}=2 {SP} actor.fp8_recipe=blockwise",
        f"{FP8} {PP}=2",
    ):
        config = config_of(*overrides.split())
        check_actor(config)
        check_sizes(config, whole, "config.json")


# --- padding ---


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ("", 1),
        (f"{CP}=2", 4),
        (f"{TP}=2", 1),
        (f"{TP}=2 {SP} {CP}=2", 8),
        (FP8, 16),
        (f"{FP8} {TP}=4", 16),
        (f"{FP8} {TP}=4 {SP}", 64),
        (f"{FP8} {TP}=4 {SP} {CP}=2", 128),
        (f"{FP8} actor.fp8_recipe=blockwise", 16),
        (f"{FP8} {TP}=2 {SP} actor.fp8_recipe=blockwise", 256),
        ("actor.cuda_graph=true rollout.max_prompt_tokens=100 rollout.max_response_tokens=101", 201),
        (f"actor.cuda_graph=true {CP}=2 rollout.max_prompt_tokens=100 rollout.max_response_tokens=101", 204),
    ],
)
def test_sequence_multiple(overrides: str, expected: int) -> None:
    assert sequence_multiple(config_of(*overrides.split())) == expected
