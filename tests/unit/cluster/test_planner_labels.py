"""Every key that the planner can produce has a label, and every label has a key.

Proves it on runs that together take every branch that makes a key. Does not prove that a sentence
about a key is true.
"""

from __future__ import annotations

import pytest

from megasd.cluster.planner import labels
from megasd.cluster.planner.memory import estimate_memory
from megasd.cluster.planner.report import memory_table, time_table
from megasd.cluster.planner.time import step_time
from tests.unit.cluster.test_planner import job

RUNS = [
    job("Qwen3-8B", "algorithm.teacher.weights=live"),
    job("Qwen3-8B", "actor.fp8=hybrid", "actor.context_parallel_size=2", gpus=16),
    job("Qwen3-8B", "rollout.engine.release_memory=true", "rollout.engine.tensor_parallel_size=2"),
    job("Qwen3-8B", "actor.pipeline_model_parallel_size=4", "sync.transport=disk", gpus=16, engine_gpus=8),
    job("Qwen3-8B", "algorithm.distill=null", gpus=1, gpu="cpu"),
]


def test_every_key_has_a_label_and_every_label_a_key() -> None:
    memories, times = [estimate_memory(run) for run in RUNS], [step_time(run) for run in RUNS]
    assert {phase for memory in memories for phase in memory.phases} == set(labels.MEMORY_PHASES)
    causes = {key for memory in memories for causes in memory.phases.values() for key in causes}
    assert causes == set(labels.MEMORY_CAUSES)
    assert {phase.name for time in times for phase in time.phases} == set(labels.TIME_PHASES)
    parts = {key for time in times for phase in time.phases for key in phase.parts}
    assert parts == set(labels.TIME_CAUSES)


@pytest.mark.parametrize(
    "table", [labels.MEMORY_PHASES, labels.MEMORY_CAUSES, labels.TIME_PHASES, labels.TIME_CAUSES]
)
def test_labels_are_distinct_and_explained(table: dict[str, labels.Label]) -> None:
    assert len({label.text for label in table.values()}) == len(table)
    assert all(label.about.endswith(".") and label.text for label in table.values())


def test_the_tables_print_labels() -> None:
    run = RUNS[0]
    text = "\n".join(memory_table(estimate_memory(run), run) + time_table(step_time(run), run))
    assert "student weights" in text and "CUDA context" in text and "weight push" in text
    assert "| signal" not in text and "| context" not in text and "| sync" not in text
