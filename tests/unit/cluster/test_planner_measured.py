"""The planner's bytes against a real actor's tensors on the CPU, by category, within 5 percent
(tests/distributed/planner_cases.py).

Proves: weights, gradients, optimizer, teacher, kept signal, microbatches, buckets, activations with
and without recomputing, loss workspace at one size each; nightly both at the other size, other
recompute settings, bfloat16, packing, other supports, transports and teachers, and ranks of TP 2,
PP 2, DP 2, CP 2. Does not prove several minibatches, TransformerEngine's activations, NCCL, the
allocator (tests/gpu/test_planner_gpu.py), experts, nor anything about engines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import ROOT, torchrun

SCRIPT = "tests/distributed/planner_cases.py"
BASE = (
    "rollout.num_prompts=1",
    "rollout.num_samples=4",
    "rollout.max_prompt_tokens=128",
    "rollout.max_response_tokens=384",
    "actor.micro_batch_size=4",
    "actor.dtype=float32",
)
LONGER = ("rollout.num_samples=2", "actor.micro_batch_size=2", "rollout.max_response_tokens=896")
TWO = {"num_hidden_layers": 2}
DAILY = {
    "512 tokens, full": {"items": (*BASE, "actor.recompute_granularity=full"), "model": TWO},
    "1024 tokens": {
        "items": (*BASE, *LONGER),
        "model": TWO | {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6},
    },
}
NIGHTLY = {
    "512 tokens": {"items": BASE},
    "1024 tokens, full": {"items": (*BASE, *LONGER, "actor.recompute_granularity=full"), "model": TWO},
    "selective": {"items": (*BASE, "actor.recompute_granularity=selective")},
    "selective mlp": {
        "items": (*BASE, "actor.recompute_granularity=selective", "actor.recompute_modules=[mlp]")
    },
    "groups of 2": {"items": (*BASE, "actor.recompute_granularity=full", "actor.recompute_num_layers=2")},
    "block of 1": {"items": (*BASE, "actor.recompute_granularity=full", "actor.recompute_method=block")},
    "block of 3": {
        "items": (
            *BASE,
            "actor.recompute_granularity=full",
            "actor.recompute_method=block",
            "actor.recompute_num_layers=3",
        )
    },
    "bfloat16": {"items": (*BASE, "actor.dtype=bfloat16")},
    "bfloat16, full": {"items": (*BASE, "actor.dtype=bfloat16", "actor.recompute_granularity=full")},
    "packed": {"items": (*BASE, "actor.packing=true"), "model": TWO},
    "packed by tokens": {
        "items": (*BASE, "actor.packing=true", "actor.max_tokens_per_microbatch=1024"),
        "model": TWO,
    },
    "top 20": {"items": (*BASE, "algorithm.distill.top_k=20"), "model": TWO},
    "union": {"items": (*BASE, "algorithm.distill.support=union"), "model": TWO},
    "whole vocabulary": {"items": (*BASE, "algorithm.distill.support=full"), "model": TWO},
    "record": {
        "items": (*BASE, "algorithm.distill.support=teacher", "algorithm.teacher.transport=record"),
        "model": TWO,
    },
    "trust region": {"items": (*BASE, "algorithm.teacher.weights=trust_region"), "model": TWO},
    "live": {"items": (*BASE, "algorithm.teacher.weights=live"), "model": TWO},
    "grpo": {"items": (*BASE, "algorithm.recipe=grpo"), "model": TWO},
    "rlsd": {"items": (*BASE, "algorithm.recipe=rlsd"), "model": TWO},
    "small chunks": {"items": (*BASE, "actor.loss_memory_mib=8"), "model": TWO},
    "no distributed optimizer": {
        "items": (*BASE, "actor.use_distributed_optimizer=false", "actor.dtype=bfloat16"),
        "model": TWO,
    },
    "llama": {"items": BASE, "model": TWO | {"model_type": "llama", "rope_theta": 1e4}},
    "tied": {"items": BASE, "model": TWO | {"tie_word_embeddings": True}},
}
TWO_RANKS = {
    "TP 2": {"items": (*BASE, "actor.tensor_model_parallel_size=2")},
    "TP 2, sequence parallel": {
        "items": (*BASE, "actor.tensor_model_parallel_size=2", "actor.sequence_parallel=true")
    },
    "PP 2": {"items": (*BASE, "actor.pipeline_model_parallel_size=2", "actor.micro_batch_size=1")},
    "PP 2, tied": {
        "items": (*BASE, "actor.pipeline_model_parallel_size=2"),
        "model": {"tie_word_embeddings": True},
    },
    "DP 2": {"items": (*BASE, "rollout.num_samples=8", "actor.dtype=bfloat16")},
    "CP 2": {"items": (*BASE, "actor.context_parallel_size=2")},
}


def check(output: str, names: list[str], tolerance: float = 0.05) -> None:
    results = [
        json.loads(line.removeprefix("CASE ")) for line in output.splitlines() if line.startswith("CASE ")
    ]
    assert {result["case"] for result in results} == set(range(len(names))), output[-4000:]
    wrong = []
    for result in results:
        name = f"{names[result['case']]}, stage {result['stage']}"
        for category, measured in result["measured"].items():
            planned = result["planned"][category]
            print(f"{name:32} {category:12} {planned:>12,} {measured:>12,}")
            if abs(planned - measured) > tolerance * max(measured, 1):
                wrong.append(f"{name}: {category}: planned {planned:,}, measured {measured:,}")
    assert not wrong, "\n".join(wrong)


def alone(cases: dict[str, dict]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(list(cases.values()))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_bytes_by_category_at_two_sizes() -> None:
    check(alone(DAILY), list(DAILY))


@pytest.mark.nightly
def test_bytes_of_other_settings() -> None:
    check(alone(NIGHTLY), list(NIGHTLY))


@pytest.mark.nightly
def test_bytes_of_two_ranks() -> None:
    check(torchrun(SCRIPT, 2, json.dumps(list(TWO_RANKS.values()))), list(TWO_RANKS))
