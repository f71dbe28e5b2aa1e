"""algo/state.py: what a step leaves to the next ones, with real groups and the recipes' own rows.

Proves pass rates of all three kinds, the dataset's mean weight, the buffer and that a resumed
memory goes on as if nothing had happened. Does not prove that a run saves it (tests/integration).
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megasd.algo.question_weight import question_weight
from megasd.algo.recipes import RECIPES
from megasd.algo.stages import at
from megasd.algo.state import AlgorithmState
from megasd.config.schema import AlgorithmConfig, QuestionWeightConfig
from megasd.types import Group, Prompt, Sample, UserError, Verdict

R, W, E = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR
STEP = {"loss": 0.3, "divergence": 0.2, "logp": -0.5}


def prompt(name: str, pass_rate: float | None = None) -> Prompt:
    return Prompt(name, [{"role": "user", "content": "?"}], "1", pass_rate=pass_rate)


def group(name: str, *verdicts: Verdict, texts: str = "") -> Group:
    samples = [
        Sample(name, i, [1], [2], [-0.5], f"{texts}{i}", "stop", 0, verdict=v) for i, v in enumerate(verdicts)
    ]
    return Group(prompt(name), samples)


def weighing(**options) -> AlgorithmConfig:
    return replace(RECIPES["sdpo"], question_weight=QuestionWeightConfig(kind="pq", **options))


def restored(memory: AlgorithmState, algorithm: AlgorithmConfig) -> AlgorithmState:
    again = AlgorithmState(algorithm, seed=memory.seed, steps=100)
    again.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    return again


def test_most_recipes_need_no_memory():
    memory = AlgorithmState(RECIPES["sc_sdpo"], seed=1)
    assert memory.pass_rate(group("a", R, W, W, E)) == 1 / 3 and memory.pass_rate(group("a", E)) is None
    assert (memory.buffer, memory.whitener, memory.prefix_fraction, memory.dataset_mean([])) == (
        None,
        None,
        None,
        None,
    )
    assert memory.observe([group("a", R)]) == {} and memory.after_step(STEP) is None and not memory.has_frozen
    assert set(memory.state_dict().values()) == {None}


# ---- pass rates ----


def test_frozen_rates_come_from_the_row_or_the_estimate():
    memory = AlgorithmState(weighing(pass_rate="frozen"), seed=1)
    assert memory.pass_rate(Group(prompt("a", 0.25), group("a", R, R).samples)) == 0.25
    with pytest.raises(ValueError, match="row 'b' has no pass rate of the start model"):
        memory.pass_rate(group("b", R))
    memory.set_frozen({"b": 0.75, "c": None})
    assert memory.has_frozen
    assert memory.pass_rate(group("b", W)) == 0.75 and memory.pass_rate(group("c", R)) is None
    memory.observe([group("b", R, R)])
    assert restored(memory, weighing(pass_rate="frozen")).pass_rate(group("b", R)) == 0.75


def test_the_datasets_mean_is_over_all_rows():
    """PACED arm of SC-SDPO (2605.27765): zero weights and unscored rows count."""
    memory = AlgorithmState(RECIPES["sdpo_paced"], seed=1)
    memory.set_frozen({"a": 0.5, "b": 1.0, "c": None})
    rows = [prompt("a"), prompt("b"), prompt("c"), prompt("d", 0.25)]
    assert memory.dataset_mean(rows) == (0.25 + 0 + 0 + 0.1875) / 4
    # another normaliser
    assert AlgorithmState(weighing(pass_rate="frozen"), seed=1).dataset_mean(rows) is None
    with pytest.raises(UserError, match="give all 1 training rows the weight 0"):
        memory.dataset_mean([prompt("b")])


def test_averaged_rates_hold_this_visit_and_earlier_ones():
    memory = AlgorithmState(weighing(pass_rate="ema", ema_rate=0.25), seed=1)
    first, second = group("a", R, W), group("a", R, R, R, R)
    # asking changes nothing
    assert memory.pass_rate(first) == memory.pass_rate(first) == 0.5
    assert memory.observe([first, group("b", E)]) == {"weight/averaged_pass_rate": 0.5}
    assert memory.pass_rate(second) == 0.5 + 0.25 * 0.5
    # unscored: as it was
    assert memory.pass_rate(group("a", E)) == 0.5 and memory.pass_rate(group("b", E)) is None
    memory.observe([second])
    again = restored(memory, weighing(pass_rate="ema", ema_rate=0.25))
    assert again.pass_rate(group("a", W)) == memory.pass_rate(group("a", W)) == 0.625 * 0.75


def test_a_stage_asks_for_its_own_rates():
    """DRIFT 2606.30345 averages in its second stage; the visits of the first count."""
    drift = RECIPES["drift"]
    memory = AlgorithmState(drift, seed=1)
    memory.observe([group("a", R, R)])
    before, after = (at(drift, step, 10).question_weight for step in (0, 5))
    now = group("a", W, W)
    assert memory.pass_rate(now, before) == memory.pass_rate(now) == 0.0
    assert memory.pass_rate(now, after) == 0.5
    assert question_weight(after)(memory.pass_rate(now, after)) == 0.5


# ---- successes, moments, exposure ----


def test_the_buffer_keeps_the_first_success_of_the_latest_step_that_had_one():
    memory = AlgorithmState(RECIPES["drift"], seed=1)
    memory.observe([group("a", W, R, R, texts="x"), group("b", W, E)])
    assert memory.buffer == {"a": "x1"}
    figures = memory.observe([group("a", W, W), group("b", R, texts="y")])
    assert memory.buffer == {"a": "x1", "b": "y0"} and figures["teacher/buffered_questions"] == 2.0
    memory.observe([group("a", R, texts="z")])
    assert restored(memory, RECIPES["drift"]).buffer == {"a": "z0", "b": "y0"}


def test_the_whitener_moves_once_a_step():
    memory = AlgorithmState(RECIPES["egrsd"], seed=1)
    for _ in range(11):
        memory.whitener([1.0, 0.0])
        assert memory.observe([]) == {"reward/running_mean": pytest.approx(0.5)}
    assert memory.whitener.steps == 11 and memory.whitener([1.0]) != [0.5]
    assert restored(memory, RECIPES["egrsd"]).whitener.count == 22


def test_the_exposure_goes_on_after_a_resume():
    straight = AlgorithmState(RECIPES["atesd"], seed=3, steps=100)
    assert straight.prefix_fraction == 0.5
    seen, resumed = [], None
    for step in range(60):
        if step == 31:
            resumed = restored(straight, RECIPES["atesd"])
        figures = straight.observe([])
        assert (
            figures["teacher/prefix_fraction"] == straight.prefix_fraction
            and 0 <= straight.prefix_fraction <= 1
        )
        metrics = STEP | {"loss": 1 / (step + 1)}
        straight.after_step(metrics)
        if resumed is not None:
            resumed.after_step(metrics)
            assert resumed.prefix_fraction == straight.prefix_fraction
        seen.append(straight.prefix_fraction)
    assert len(set(seen)) > 20 and resumed.state_dict() == straight.state_dict()


def test_a_memory_of_another_algorithm_starts_empty():
    old = AlgorithmState(RECIPES["sdpo"], seed=1)
    new = AlgorithmState(RECIPES["drift"], seed=1)
    new.load_state_dict(old.state_dict())
    assert new.buffer == {} and new.averaged == {}
    AlgorithmState(RECIPES["sdpo"], seed=1).load_state_dict(new.state_dict())
