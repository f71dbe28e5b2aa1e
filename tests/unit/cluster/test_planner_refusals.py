"""megasd plan against what `megasd train` refuses, and what its reckoning must not leave out.

Proves that a config that `validate` refuses is refused by the plan, that every proposed layout
passes `validate`'s values, and single terms of memory and time. Does not prove anything about a
GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasd.batch import balance
from megasd.cli import main
from megasd.cluster.planner import engine_memory, memory, push
from megasd.cluster.planner.fixes import differences, first_fix, fixes, refusal
from megasd.cluster.planner.layouts import RefusedLayout, illegal, plan_layout, search
from megasd.cluster.planner.time import student
from megasd.config.validate import validate_values
from megasd.config.validate_model import check_model_values
from tests.unit.cluster.test_planner import FITTING, FULL, SHORT, job, write_config

TP4 = ("actor.tensor_model_parallel_size=4", "actor.sequence_parallel=true")
RELEASED = (*SHORT, *TP4, "rollout.engine.num_engines=8", "rollout.engine.release_memory=true")


# ---- what train refuses ----


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (
            ("actor.recompute_granularity=full", "actor.recompute_num_layers=5"),
            "actor.recompute_num_layers=5: must be a divisor of the 36",
        ),
        (
            ("rollout.overlap=1", "algorithm.tis_clip=2.0"),
            "rollout.overlap=1: the engine samples while the actor trains",
        ),
        (
            ("rollout.engine.max_total_tokens=2048",),
            "rollout.engine.max_total_tokens=2048: holds not even one sample",
        ),
        (("actor.micro_batch_size=3",), "actor.micro_batch_size=3: does not divide"),
        (("rollout.max_response_tokens=40960",), "above max_position_embeddings=40960"),
        (("sync.delta=true",), "sync.delta: a file holds the whole model"),
        (
            ("rollout.engine.tensor_parallel_size=4",),
            "rollout.engine.num_engines=8: x TP 4, more than the 8 GPUs of a node",
        ),
        (("actor.packing=true", "actor.dtype=float32"), "actor.packing: TransformerEngine's attention"),
    ],
)
def test_what_train_refuses_is_refused(items: tuple[str, ...], words: str) -> None:
    long = ("rollout.engine.max_total_tokens=65536",)
    own = plan_layout(job("Qwen3-8B", *RELEASED, *long, *items))
    assert isinstance(own, RefusedLayout) and words in refusal(own)


def test_a_gpu_without_fp8() -> None:
    items = (*RELEASED, "actor.fp8=hybrid")
    assert illegal(job("Qwen3-8B", *items)) is None
    assert (
        refusal(plan_layout(job("Qwen3-8B", *items, gpu="a100-80g")))
        == "actor.fp8=hybrid: a100-80g has none; set it to null"
    )


def test_a_split_that_is_none_is_refused_before_fixes_are_looked_for() -> None:
    own = plan_layout(
        job("Qwen3-8B", "actor.tensor_model_parallel_size=3", "actor.use_distributed_optimizer=false")
    )
    assert refusal(own).startswith("cluster.actor_nodes: 8 ranks cannot be split into TP 3")


def test_engines_are_split_by_heads() -> None:
    """Qwen2.5-7B: 28 heads."""
    items = (*SHORT, *TP4, "rollout.engine.tensor_parallel_size=8", "rollout.engine.release_memory=true")
    own = plan_layout(job("Qwen2.5-7B", *items))
    assert "SGLang cannot cut 28 heads" in refusal(own)
    proposed = [
        fix.new
        for fix in fixes(own.job.change(rollout__engine__tensor_parallel_size=1))
        if fix.key.endswith("engine.tensor_parallel_size")
    ]
    assert proposed == [2, 4]


LAYOUTS = {
    "groups of 2": (*SHORT, "actor.recompute_granularity=full", "actor.recompute_num_layers=2"),
    "block of 9": (
        *SHORT,
        "actor.recompute_granularity=full",
        "actor.recompute_method=block",
        "actor.recompute_num_layers=9",
    ),
    "TP overlap": (*SHORT, *TP4, "actor.tp_comm_overlap=true"),
    "prefetched rollouts": (
        *SHORT,
        "rollout.overlap=1",
        "algorithm.tis_clip=2.0",
        "rollout.engine.max_total_tokens=16384",
    ),
    "graphs": (*SHORT, "actor.cuda_graph=true"),
    "fp8": (*SHORT, *TP4, "actor.fp8=hybrid", "actor.max_tokens_per_microbatch=8192", "actor.packing=true"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "TP overlap" else pytest.mark.nightly) for name in LAYOUTS],
)
def test_every_proposed_layout_can_be_trained(name: str) -> None:
    one = job("Qwen3-8B", *LAYOUTS[name])
    found = search(one)
    assert found
    for proposed in found:
        config = proposed.job.config
        validate_values(config, 8)
        check_model_values(config, dict(one.model.hf), Path("."))
        changed = one
        # what the refusal and --json say is all that has to be changed
        for fix in differences(one, proposed.job):
            changed = fix.apply(changed)
        assert changed.config == config


@pytest.mark.parametrize(
    "items", [(), ("actor.cuda_graph=true",), ("rollout.overlap=1", "algorithm.tis_clip=2.0")]
)
def test_a_fix_can_be_trained(items: tuple[str, ...]) -> None:
    one = job("Qwen3-8B", "rollout.max_response_tokens=15360", *TP4, *items)
    assert not plan_layout(one).fits
    fix = first_fix(plan_layout(one))
    assert fix is None or illegal(fix.apply(one)) is None


# ---- memory ----


def test_in_flight_is_what_is_planned_for_a_rank() -> None:
    """8B on 4 stages, 32 samples of at most 2,048 tokens: balance.by_tokens opens 4 microbatches
    where 2 would hold them.
    """
    one = job(
        "Qwen3-8B",
        "actor.pipeline_model_parallel_size=4",
        "rollout.num_prompts=4",
        "actor.packing=true",
        "actor.max_tokens_per_microbatch=32768",
        gpus=4,
    )
    work = balance.Workload([one.longest] * 32, [1.0] * 32, [0.0] * 32, 32768, True)
    dealt = balance.by_tokens(work, [True] * 32, 1, least=4)[0].microbatches
    for stage in range(4):
        largest = max(sum(map(len, dealt[k : k + 4 - stage])) for k in range(len(dealt))) * one.longest
        planned = one.in_flight(stage) * one.tokens(one.longest)
        assert largest <= planned <= 32 * one.longest
    assert len(dealt) == one.microbatches == 4 and one.in_flight(0) * one.tokens(one.longest) == 65536


def test_an_engine_on_the_same_gpus_holds_a_sample() -> None:
    own = plan_layout(
        job(
            "Qwen3-8B",
            *RELEASED,
            "actor.recompute_granularity=full",
            "rollout.engine.mem_fraction_static=0.05",
        )
    )
    assert not own.fits and own.memory.fits
    assert (
        "an engine's cache holds 0 tokens, and a sample takes up to 6144; change"
        " rollout.engine.mem_fraction_static: 0.05 -> 0.3" in refusal(own)
    )
    assert plan_layout(first_fix(own).apply(own.job)).fits


def test_engines_share_the_later_stages_gpus_too() -> None:
    one = job(
        "Qwen3-8B",
        *SHORT,
        "actor.pipeline_model_parallel_size=4",
        "rollout.engine.tensor_parallel_size=4",
        "rollout.engine.num_engines=1",
    )
    assert [memory.shares_gpu(one, stage) for stage in range(4)] == [True, True, False, False]
    whole = one.change(rollout__engine__num_engines=2)
    assert (
        all(memory.shares_gpu(whole, stage) for stage in range(4))
        and "sampling" in memory.estimate_memory(whole).phases
    )


def test_what_is_kept_of_all_minibatches() -> None:
    """Every minibatch is taught before the first update; the output weight is kept once, of a live
    teacher as a copy.
    """
    one = job("Qwen3-8B", *SHORT)
    signal, several = (memory.signal_bytes(one.change(algorithm__minibatches=n), 0) for n in (1, 4))
    # a spare row each
    assert several == signal + 3 * 2 * 4096
    live = one.change(algorithm__teacher__weights="live")
    weight = 2 * one.model.vocabulary(one.config.actor) * 4096
    assert memory.signal_bytes(live.change(algorithm__epochs=2), 0) - memory.signal_bytes(live, 0) == weight
    assert memory.signal_bytes(one, 0) - memory.signal_bytes(live, 0) == weight


def test_an_fp8_engine_keeps_its_vocabulary_in_bf16() -> None:
    one = job("Qwen3-8B", "rollout.engine.model_path=models/Qwen3-8B-FP8")
    assert engine_memory.engine_weights(one) == one.model.weights + 2 * 151936 * 4096


# ---- time ----


def test_fp8_hastens_linear_layers_alone() -> None:
    one = job("Qwen3-8B", *RELEASED)
    plain, narrow, most = (
        student(one.change(**changes)).parts["compute"]
        for changes in (
            {},
            {"actor__fp8": "hybrid"},
            {"actor__fp8": "hybrid", "actor__first_last_layers_bf16": False},
        )
    )
    assert plain > narrow > most > plain / (2 * 0.45 / 0.6)


def test_stages_send_to_each_other() -> None:
    items = (*SHORT, "actor.pipeline_model_parallel_size=2")
    within, across = (student(job("Qwen3-8B", *items, gpus=gpus, engine_gpus=8)).parts for gpus in (8, 16))
    # padded
    samples, tokens = 64 * 8 // 4, 3072 * 1.2
    assert within["NVLink"] == pytest.approx(2 * samples * tokens * 4096 * 2 / (450e9 * 0.75))
    assert across["IB"] == pytest.approx(within["NVLink"] / 2 * 9) and "NVLink" not in across


def test_a_push_gathers_experts_from_expert_ranks() -> None:
    one = job(
        "Qwen3-30B-A3B", *SHORT, "actor.expert_model_parallel_size=8", "rollout.engine.release_memory=true"
    )
    found, experts = push.received(one), 2 * one.model.expert_weights
    assert (
        found.same_node == experts // 8 * 7
        and found.other_nodes == 0
        and found.total == 2 * one.model.weights
    )
    assert experts == 2 * 48 * 128 * 3 * 2048 * 768


def test_a_push_on_one_node_waits_for_nvlink() -> None:
    one = job("Qwen3-8B", *FULL, *TP4, "sync.transport=group", engine_gpus=8)
    send, link = push.seconds(one)
    assert link == "IB" and send > 0
    colocated = job("Qwen3-8B", *RELEASED, "sync.transport=colocated").change(
        rollout__engine__num_engines=1, rollout__engine__tensor_parallel_size=8
    )
    assert push.seconds(colocated)[1] == "NVLink"


def test_json_says_what_a_layout_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path,
        FITTING,
        "rollout: {engine: {num_engines: 4, release_memory: true, max_total_tokens: 32768}}",
    )
    assert main(["plan", config, "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["layouts"][0]
    assert found["changes"]["actor.recompute_granularity"] is None
