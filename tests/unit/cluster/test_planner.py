"""megasd plan: known counts, which of three models fit where, the first key to change, and what
must be monotone.

Proves that the formulas are those of the docstrings and that the command says what they give. Does
not prove them: the bytes are compared with a real actor in test_planner_measured.py (CPU) and
tests/gpu/test_planner_gpu.py; the seconds were never compared with a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megasd.algo.recipes import RECIPES
from megasd.cli import main
from megasd.cluster.planner import engine_memory, memory, push
from megasd.cluster.planner.fixes import first_fix, refusal
from megasd.cluster.planner.hardware import GPU_KINDS, gpu_kind
from megasd.cluster.planner.job import PlannedRun
from megasd.cluster.planner.layouts import RefusedLayout, plan_layout, search
from megasd.cluster.planner.shapes import Model
from megasd.cluster.planner.time import step_time
from megasd.commands.plan import MODELS, read_model, read_planned_run
from megasd.config.load import load_config
from megasd.config.schema import Config
from megasd.types import UserError

GIB = 2**30


@cache
def model(name: str) -> Model:
    return Model.of(json.loads((MODELS / f"{name}.json").read_text()))


@cache
def base() -> Config:
    return load_config([], ["model.path=none", "data.train=none"], RECIPES)


def job(name: str, *items: str, gpus: int = 8, engine_gpus: int = 0, gpu: str = "h100-80g") -> PlannedRun:
    # reading a config by OmegaConf takes a tenth of a second
    values = dict(item.split("=", 1) for item in (f"model.path={name}", *items))
    one = PlannedRun(base(), model(name), GPU_KINDS[gpu], gpus, engine_gpus)
    one = one.change(**{key.replace(".", "__"): yaml.safe_load(value) for key, value in values.items()})
    return one.change(rollout__engine__served=one.engines) if engine_gpus else one


# ---- what the literature knows ----


def test_weights_are_the_published_ones() -> None:
    """Model cards: Qwen3-8B 8.2B, Qwen3-32B 32.8B, Llama 3 70B 70.6B (141 GB in bfloat16),
    Qwen3-30B-A3B 30.5B.
    """
    found = {
        name: model(name).weights for name in ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B", "Qwen3-30B-A3B")
    }
    assert found == {
        "Qwen3-8B": 8190735360,
        "Qwen3-32B": 32762123264,
        "Llama-3.1-70B": 70553706496,
        "Qwen3-30B-A3B": 30532122624,
    }
    assert 2 * found["Llama-3.1-70B"] / 1e9 == pytest.approx(141.1, abs=0.05)


@pytest.mark.parametrize(("distributed", "ranks"), [(False, 1), (True, 1), (True, 2), (True, 8)])
def test_bytes_a_weight_are_megatrons(distributed: bool, ranks: int) -> None:
    """18 bytes a weight, or 6 + 12 / d (Megatron's table of the distributed optimizer, bf16
    parameters and fp32 gradients).
    """
    one = job("Qwen3-8B", f"actor.use_distributed_optimizer={distributed}", gpus=ranks)
    found = memory.static(one, 0)
    bytes_ = sum(found[name] for name in ("weights", "gradients", "optimizer"))
    assert bytes_ / one.model.rank(one.config.actor, 0).total == pytest.approx(
        6 + 12 / ranks if distributed else 18
    )


def test_a_token_of_the_cache() -> None:
    """2 x layers x key heads x head size x 2 bytes: Qwen3-8B 144 KiB, Llama 3 70B 320 KiB, an
    eighth of it under TP 8, as under TP 16.
    """
    assert engine_memory.kv_token_bytes(job("Qwen3-8B")) == 144 * 1024
    for tp, kib in ((1, 320), (8, 40), (16, 40)):
        assert (
            engine_memory.kv_token_bytes(job("Llama-3.1-70B", f"rollout.engine.tensor_parallel_size={tp}"))
            == kib * 1024
        )


def test_activations_by_hand() -> None:
    """Qwen3-8B, 4,096 tokens, bf16, TransformerEngine: h 4096, q 4096, k 1024, f 12288, 32 and 8
    heads, as the docstring has it.
    """
    one = job(
        "Qwen3-8B",
        "rollout.max_prompt_tokens=2048",
        "rollout.max_response_tokens=2048",
        "actor.micro_batch_size=1",
    )
    attention = 2 * (4096 + 2048) + 2 * (4096 + 1024) + 2 * 4096 + 4 * 32 + 2 * 4096 + 4 * (32 + 8)
    token = 2 * (2 * 2 * 4096 + 4) + attention + 10 * 12288
    rope = 4 * 2 * 128
    assert memory.training_memory(one, 0)["activations"] == 36 * 4096 * (token + rope) + 4096 * (2 * 4096 + 4)
    full = one.change(actor__recompute_granularity="full")
    inputs, layer = 36 * 2 * 4096 * 4096, 4096 * (token + rope)
    assert memory.training_memory(full, 0)["activations"] == inputs + layer - 2 * 4096 * 4096 + 4 * 128 * 4096


def test_a_stage_holds_as_many_microbatches_as_1f1b_has_in_flight() -> None:
    one = job("Qwen3-8B", "actor.pipeline_model_parallel_size=4", "actor.micro_batch_size=1", gpus=4)
    first, last = (memory.training_memory(one, stage)["activations"] for stage in (0, 3))
    tokens = one.tokens(one.longest)
    assert first / (last - tokens * (2 * 4096 + 4)) == pytest.approx(4)


def test_shares_of_a_push_agree_with_the_plan() -> None:
    """TP 4 x PP 2 on two nodes: an eighth is rank 0's, three on its node, four on the other
    (tests/unit/tools/test_bench_sync.py).
    """
    one = job(
        "Qwen3-8B", "actor.tensor_model_parallel_size=4", "actor.pipeline_model_parallel_size=2", gpus=16
    )
    found = push.received(one)
    eighth = 2 * one.model.weights // 8
    assert (found.own, found.same_node, found.other_nodes) == (eighth, 3 * eighth, 4 * eighth)


# ---- three models on 8, 32 and 64 H100: which split of the model fits, with full recomputing and
# engines of their own ----

SHORT = (
    "rollout.max_prompt_tokens=2048",
    "rollout.max_response_tokens=4096",
    "actor.micro_batch_size=1",
    "rollout.num_prompts=64",
)
FULL = (
    *SHORT,
    "actor.recompute_granularity=full",
    "rollout.engine.tensor_parallel_size=8",
    "rollout.engine.max_total_tokens=65536",
)


@pytest.mark.parametrize(
    ("name", "tp", "pp", "fits"),
    [
        ("Qwen3-8B", 1, 1, (False, False, False)),
        ("Qwen3-8B", 2, 1, (True, True, True)),
        ("Qwen3-32B", 8, 1, (False, True, True)),
        ("Qwen3-32B", 8, 4, (None, True, True)),
        ("Llama-3.1-70B", 8, 1, (False, False, False)),
        ("Llama-3.1-70B", 8, 2, (None, False, True)),
        ("Llama-3.1-70B", 8, 4, (None, False, True)),
    ],
)
def test_which_split_fits_on_how_many(name: str, tp: int, pp: int, fits: tuple[bool | None, ...]) -> None:
    found = []
    for gpus in (8, 32, 64):
        items = (
            f"actor.tensor_model_parallel_size={tp}",
            f"actor.pipeline_model_parallel_size={pp}",
            f"actor.sequence_parallel={tp > 1}",
        )
        one = plan_layout(job(name, *FULL, *items, gpus=gpus, engine_gpus=8))
        found.append(None if isinstance(one, RefusedLayout) else one.fits)
    assert tuple(found) == fits


@pytest.mark.parametrize(
    ("name", "gpus", "fits"),
    [
        ("Llama-3.1-70B", 8, False),
        pytest.param("Qwen3-32B", 16, True, marks=pytest.mark.nightly),
        pytest.param("Qwen3-8B", 8, True, marks=pytest.mark.nightly),
    ],
)
def test_whether_any_layout_fits(name: str, gpus: int, fits: bool) -> None:
    assert bool(search(job(name, *FULL, gpus=gpus, engine_gpus=8))) == fits


# ---- refusal ----


@pytest.mark.parametrize(
    ("name", "items", "gpus", "wanted"),
    [
        # weights, gradients, EMA teacher and optimizer of 8B on one rank each
        (
            "Qwen3-8B",
            (*FULL, "rollout.engine.tensor_parallel_size=1"),
            8,
            "actor.tensor_model_parallel_size: 1 -> 2",
        ),
        # all activations of 16,384 tokens a sample
        (
            "Qwen3-8B",
            (
                "actor.tensor_model_parallel_size=4",
                "actor.sequence_parallel=true",
                "actor.micro_batch_size=1",
                "rollout.max_response_tokens=15360",
            ),
            8,
            "actor.recompute_granularity: null -> full",
        ),
        # 70B and its teacher do not go on a node however they are cut
        (
            "Llama-3.1-70B",
            (*FULL, "actor.tensor_model_parallel_size=8", "actor.sequence_parallel=true"),
            8,
            "cluster.actor_nodes: 1 -> ",
        ),
    ],
    ids=["tensor-parallel", "recompute", "nodes"],
)
def test_the_first_key_to_change(name: str, items: tuple[str, ...], gpus: int, wanted: str) -> None:
    own = plan_layout(job(name, *items, gpus=gpus, engine_gpus=8))
    line = refusal(own)
    assert not own.fits and f"change {wanted}" in line and "\n" not in line


def test_engines_on_the_same_gpus_are_asked_to_release_their_memory_first() -> None:
    items = (
        "actor.tensor_model_parallel_size=4",
        "actor.sequence_parallel=true",
        "actor.recompute_granularity=full",
        "rollout.engine.num_engines=8",
    )
    own = plan_layout(job("Qwen3-8B", *SHORT, *items, "rollout.engine.max_total_tokens=131072"))
    assert not own.fits and refusal(own).endswith("change rollout.engine.release_memory: false -> true")
    assert plan_layout(first_fix(own).apply(own.job)).fits


@pytest.mark.parametrize(
    ("items", "gpus", "words"),
    [
        (("actor.tensor_model_parallel_size=3",), 6, "does not divide num_attention_heads=32"),
        (("actor.pipeline_model_parallel_size=5",), 10, "does not divide num_hidden_layers=36"),
        (("actor.tensor_model_parallel_size=2",), 7, "start a multiple of 2"),
        (("rollout.num_prompts=3", "rollout.num_samples=4"), 8, "cannot be shared by 8"),
    ],
)
def test_what_cannot_be_split_is_refused_without_numbers(
    items: tuple[str, ...], gpus: int, words: str
) -> None:
    own = plan_layout(job("Qwen3-8B", *items, gpus=gpus))
    assert isinstance(own, RefusedLayout) and words in refusal(own)


# ---- what must be monotone ----

sizes = st.sampled_from((1, 2, 4, 8))


@settings(deadline=None, max_examples=15)
@given(
    tp=sizes,
    pp=sizes,
    cp=sizes,
    mbs=sizes,
    response=st.integers(64, 8192),
    recompute=st.sampled_from((None, "full")),
    record=st.booleans(),
)
def test_monotone(
    tp: int, pp: int, cp: int, mbs: int, response: int, recompute: str | None, record: bool
) -> None:
    base = job(
        "Llama-3.1-8B", "rollout.max_prompt_tokens=1024", "algorithm.distill.support=teacher", gpus=512
    )
    one = base.change(
        actor__tensor_model_parallel_size=tp,
        actor__pipeline_model_parallel_size=pp,
        actor__context_parallel_size=cp,
        actor__sequence_parallel=tp > 1,
        actor__micro_batch_size=mbs,
        rollout__max_response_tokens=response,
        actor__recompute_granularity=recompute,
        algorithm__teacher__transport="record" if record else "hidden",
        rollout__num_prompts=512,
    )
    peak = memory.estimate_memory(one).peak
    assert memory.estimate_memory(one.change(rollout__max_response_tokens=response + 64)).peak >= peak
    assert memory.estimate_memory(one.change(actor__micro_batch_size=2 * mbs)).peak >= peak
    assert (
        memory.estimate_memory(one.change(actor__recompute_granularity="full")).phases["training"][
            "activations"
        ]
        <= (
            memory.estimate_memory(one.change(actor__recompute_granularity=None)).phases["training"][
                "activations"
            ]
        )
    )
    assert (
        memory.estimate_memory(replace(one, gpus=1024)).phases["training"]["optimizer"]
        <= memory.estimate_memory(one).phases["training"]["optimizer"]
    )
    if tp < 8:
        more = one.change(actor__tensor_model_parallel_size=2 * tp, actor__sequence_parallel=True)
        for cause in ("weights", "gradients"):
            assert all(
                memory.static(more, stage)[cause] <= memory.static(one, stage)[cause] for stage in {0, pp - 1}
            )
    time = step_time(one)
    assert time.seconds == pytest.approx(sum(phase.seconds for phase in time.phases)) and 0 < time.mfu < 1
    assert step_time(one.change(rollout__max_response_tokens=response + 64)).seconds >= time.seconds


def test_overlap_hides_the_shorter_half() -> None:
    one = job("Qwen3-8B", *FULL, "actor.tensor_model_parallel_size=2", gpus=8, engine_gpus=8)
    apart, beside = step_time(one), step_time(one.change(rollout__overlap=1))
    sampling = apart.phases[0].seconds
    assert (
        beside.seconds == pytest.approx(max(sampling, apart.seconds - sampling))
        and beside.seconds < apart.seconds
    )


# ---- the command ----


def write_config(folder: Path, *lines: str) -> str:
    path = folder / "run.yaml"
    path.write_text(
        "\n".join(
            [
                "model: {path: models/Qwen3-8B}",
                "data: {train: none.jsonl}",
                "cluster: {gpus_per_node: 4}",
                *lines,
            ]
        )
    )
    return str(path)


FITTING = (
    "actor: {tensor_model_parallel_size: 4, sequence_parallel: true, recompute_granularity: full,"
    " micro_batch_size: 1}"
)
ENGINE = (
    "rollout: {max_prompt_tokens: 1024, max_response_tokens: 2048, engine: {num_engines: 4, release_memory:"
    " true, max_total_tokens: 32768}}"
)


def test_json_is_whole_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, FITTING, ENGINE)
    assert main(["plan", config, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(json.dumps(found)) == found and len(found["layouts"]) == 2
    own, _ = read_planned_run(load_config([config], [], RECIPES), [config])
    memory_ = plan_layout(own).memory
    assert (
        found["own"]["memory"]["phases"] == memory_.phases and found["own"]["memory"]["peak"] == memory_.peak
    )
    assert sum(found["own"]["memory"]["phases"][memory_.worst].values()) == memory_.peak
    assert found["model"]["config"].endswith("configs/model/Qwen3-8B.json") and found["refusal"] is None


def test_tables_name_the_bottleneck_and_mark_the_own_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, FITTING, ENGINE)
    assert main(["plan", config, "--gpu", "h200-141g"]) == 0
    text = capsys.readouterr().out
    assert (
        "bottleneck: sampling, by GPU memory bandwidth" in text
        and "teacher outputs kept for the loss" in text
        and "config.json read:" in text
        and "| * |" in text
        and "h200-141g" in text
    )
    assert main(["plan", config, "actor.tensor_model_parallel_size=1", "actor.sequence_parallel=false"]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("megasd: does not fit:") and refused.count("\n") == 1


def test_where_config_json_is_looked_for(tmp_path: Path) -> None:
    beside = tmp_path / "model"
    beside.mkdir()
    (beside / "Qwen3-8B.json").write_text("{}")
    assert read_model("models/Qwen3-8B", [str(tmp_path / "run.yaml")], None)[1] == str(
        beside / "Qwen3-8B.json"
    )
    assert read_model("models/Qwen3-8B", [str(tmp_path / "cluster" / "run.yaml")], None)[1] == str(
        beside / "Qwen3-8B.json"
    )
    assert read_model("models/Qwen3-8B", [], None)[1] == str(MODELS / "Qwen3-8B.json")
    assert read_model("models/Qwen3-8B", [], str(beside / "Qwen3-8B.json"))[1] == str(
        beside / "Qwen3-8B.json"
    )
    # a file is read as it is, and NAME.json is looked for under that name
    assert read_model(str(beside / "Qwen3-8B.json"), [], None)[1] == str(beside / "Qwen3-8B.json")
    assert read_model("models/Qwen3-8B.json", [], None)[1] == str(MODELS / "Qwen3-8B.json")
    with pytest.raises(UserError, match="model.path=models/none: no config.json there.*--model-config"):
        read_model("models/none", [], None)


def test_unknown_gpu() -> None:
    with pytest.raises(UserError, match="--gpu=h100: no such GPU.*did you mean h100-80g"):
        gpu_kind("h100", "--gpu")


def test_the_options_have_what_the_command_reads() -> None:
    from megasd.cli import build_parser

    args = build_parser().parse_args(["plan", "x.yaml"])
    assert isinstance(args, argparse.Namespace) and {
        "items",
        "gpus",
        "gpu",
        "model_config",
        "top",
        "json",
    } <= set(vars(args))


@pytest.mark.parametrize(
    "path", sorted((MODELS.parent / "cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_configs_of_this_repository_fit(path: Path) -> None:
    config = load_config([str(path)], [], RECIPES)
    own = plan_layout(read_planned_run(config, [str(path)])[0])
    assert own.fits, refusal(own)
