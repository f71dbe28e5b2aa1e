"""megasd/trainer/orchestrator.py and the state of actor/checkpoint.py: what a run goes on from,
replays and counts. The engine is a stand-in.

Proves that a resume refuses a checkpoint that does not hold what the method reads (its teacher, its
state, the start model's pass rates), that a replay is compared with every stage, and that counters
are those of a whole step. Does not prove that tensors come back (tests/integration/test_train.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megasd.actor.checkpoint import MEGATRON_FILES, STATE_FILE, read_state
from megasd.algo.recipes import RECIPES
from megasd.algo.stages import at
from megasd.algo.state import AlgorithmState
from megasd.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig, RolloutConfig, RunConfig
from megasd.data.rollout_log import rollout_path, save_groups
from megasd.trainer.orchestrator import Orchestrator, check_transport
from megasd.trainer.questions import model_length
from megasd.types import Group, Sample, UserError, Verdict
from tools import make_quickstart

STEPS, PROMPTS = 6, 2


def checkpoint(directory: Path, **state: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in MEGATRON_FILES:
        (directory / name).touch()
    (directory / STATE_FILE).write_text(
        json.dumps({"step": 3, "teacher": True, "prompts": {}, "memory": {}, "gate": {}} | state)
    )
    return directory


# ---- the state of a checkpoint ----


@pytest.mark.parametrize(
    "weights", ["live", "separate", "ema", "frozen", "snapshot", "gated", "trust_region"]
)
def test_a_checkpoint_goes_on_with_its_own_kind_of_teacher(tmp_path: Path, weights: str) -> None:
    state = read_state(checkpoint(tmp_path / "own", teacher_weights=weights), teacher_weights=weights)
    assert state["step"] == 3
    # a version that did not say
    read_state(checkpoint(tmp_path / "earlier"), teacher_weights=weights)
    # which needs none
    read_state(checkpoint(tmp_path / "own", teacher_weights=weights), teacher_weights="live")


@pytest.mark.parametrize(
    "saved, asked", [("ema", "frozen"), ("frozen", "ema"), ("ema", "trust_region"), ("snapshot", "gated")]
)
def test_a_teacher_of_another_kind_is_refused(tmp_path: Path, saved: str, asked: str) -> None:
    with pytest.raises(
        UserError,
        match=f"holds a teacher of algorithm.teacher.weights={saved}, which cannot go on as {asked}",
    ):
        read_state(checkpoint(tmp_path, teacher_weights=saved), teacher_weights=asked)


def test_a_checkpoint_without_the_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no teacher, and algorithm.teacher.weights=ema needs one"):
        read_state(checkpoint(tmp_path, teacher=False, teacher_weights="live"), teacher_weights="ema")


@pytest.mark.parametrize("name", ["memory", "gate", "prompts"])
def test_a_checkpoint_of_an_earlier_version_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path)
    state = json.loads((path / STATE_FILE).read_text())
    del state[name]
    (path / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(
        UserError,
        match=f"has no '{name}': an earlier version of megasd wrote it; resume with that version, or start",
    ):
        read_state(path, teacher_weights="live")


# ---- the orchestrator ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_quickstart.write_tokenizer(directory)
    make_quickstart.write_model(directory, seed=1)
    return directory


def config_of(model: Path, out: Path, algorithm: AlgorithmConfig, **rollout: object) -> Config:
    rows = [
        {"id": f"q{i}", "prompt": f"{i}+1=", "answer": str(i + 1), "solution": str(i + 1)} for i in range(4)
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"num_prompts": PROMPTS, "num_samples": 2, "max_prompt_tokens": 16, "max_response_tokens": 8}
    return Config(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(out / "rows.jsonl")),
        algorithm=algorithm,
        rollout=RolloutConfig(**sizes | rollout),
        run=RunConfig(dir=str(out / "run"), steps=STEPS),
    )


def sampled(prompt, *verdicts: Verdict) -> Group:
    return Group(
        prompt,
        [Sample(prompt.id, i, [1], [2], [-0.5], "1", "stop", 0, verdict=v) for i, v in enumerate(verdicts)],
    )


def sft(model: Path, out: Path) -> Orchestrator:
    """One that needs no engine."""
    return Orchestrator(config_of(model, out, RECIPES["sft"]), None)


def recorded(model: Path, out: Path, algorithm: AlgorithmConfig, steps: list[int]) -> Path:
    """The run.dir of a run of this data and algorithm, of which the rollouts of `steps` are orchestrator."""
    with sft(model, out) as orchestrator:
        for step in range(STEPS):
            prompts = orchestrator.questions.prompts.next()
            if step in steps:
                assert at(algorithm, step, STEPS).source == "rollout"
                save_groups(
                    rollout_path(out / "old" / "rollouts", step),
                    [sampled(p, Verdict.RIGHT, Verdict.WRONG) for p in prompts],
                )
    return out / "old"


STAGED = replace(RECIPES["opsd"], source="dataset", stages=["50%: source=rollout"])


def test_a_replay_of_stages_reads_the_steps_that_sample(model: Path, tmp_path: Path) -> None:
    old = recorded(model, tmp_path, STAGED, steps=[3, 4, 5])
    with Orchestrator(config_of(model, tmp_path, STAGED, replay_dir=str(old)), None) as orchestrator:
        sources = []
        for step in range(STEPS):
            groups, _ = orchestrator.groups(step, at(STAGED, step, STEPS))
            sources.append([len(group.samples) for group in groups])
        assert sources == [[1, 1]] * 3 + [[2, 2]] * 3


@pytest.mark.parametrize("steps, missing", [([], 3), ([3, 5], 4)])
def test_a_replay_that_lacks_a_stages_step_is_refused_at_the_start(
    model: Path, tmp_path: Path, steps: list[int], missing: int
) -> None:
    old = recorded(model, tmp_path, STAGED, steps=steps)
    with pytest.raises(
        UserError,
        match=(
            rf"step-00000{missing}.jsonl is missing; lower run.steps=6 \(step {missing} samples: replay a run"
        ),
    ):
        Orchestrator(config_of(model, tmp_path, STAGED, replay_dir=str(old)), None)


def test_a_replay_of_other_prompts_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    old = recorded(model, tmp_path, STAGED, steps=[3, 4, 5])
    config = config_of(model, tmp_path, STAGED, replay_dir=str(old))
    config.run.seed = 7
    with pytest.raises(UserError, match="step-000003.jsonl holds other prompts than step 3 of this run"):
        Orchestrator(config, None)


def test_rates_of_the_start_model_are_not_estimated_from_trained_weights(model: Path, tmp_path: Path) -> None:
    with sft(model, tmp_path) as orchestrator:
        orchestrator.config = replace(orchestrator.config, algorithm=RECIPES["sdpo_paced"])
        orchestrator.state, orchestrator.first_step = AlgorithmState(RECIPES["sdpo_paced"], seed=1), 3
        with pytest.raises(
            UserError,
            match="checkpoint has no pass rates of the start model, and its weights are those of step 3",
        ):
            orchestrator.estimate_pass_rates()
        # those that the checkpoint held
        orchestrator.state.set_frozen({f"q{i}": 0.5 for i in range(4)})
        assert float(orchestrator.estimate_pass_rates()["dataset_mean"]) == 0.25


class Engine:
    """A stand-in for rollout and verifiers: the first batch of a step is all right, then one
    question of each batch is informative.
    """

    stats = {"samples": 4, "retries": 1, "seconds": 0.5}

    def __init__(self) -> None:
        self.calls = 0

    def generate(self, prompts: list, *_: object, **__: object) -> list[Group]:
        self.calls += 1
        wrong = Verdict.WRONG if self.calls > 1 else Verdict.RIGHT
        return [sampled(p, Verdict.RIGHT, wrong if i == 0 else Verdict.RIGHT) for i, p in enumerate(prompts)]

    def score(self, groups: list[Group]) -> None:
        pass


def test_counters_are_those_of_a_step(model: Path, tmp_path: Path) -> None:
    with sft(model, tmp_path) as orchestrator:
        orchestrator._sampler = orchestrator._rewards = Engine()
        orchestrator.config.rollout.dynamic_sampling = True
        surplus = orchestrator.run_dir / "rollouts" / "surplus-step-000000.jsonl"
        surplus.parent.mkdir(parents=True)
        surplus.write_text("of this step, drawn before a resume")
        _, metrics = orchestrator.groups(0, RECIPES["dapo"])
        assert metrics["rollout/batches"] == 3 and surplus.exists() == (
            metrics["rollout/surplus_questions"] > 0
        )
        assert metrics["seconds/rollout"] > 0 and metrics["seconds/reward"] >= 0
        assert (metrics["rollout/samples"], metrics["rollout/retries"], metrics["rollout/seconds"]) == (
            12,
            3,
            1.5,
        )
        orchestrator.config.rollout.dynamic_sampling = False
        _, metrics = orchestrator.groups(1, RECIPES["grpo"])
        assert metrics["rollout/samples"] == 4
        _, metrics = orchestrator.groups(2, replace(RECIPES["gkd"], dataset_fraction=1.0))
        assert "rollout/samples" not in metrics and metrics["rollout/dataset_questions"] == 2


def test_a_sequence_fits_the_teacher_too(model: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    student = json.loads((model / "config.json").read_text())
    longest = student["max_position_embeddings"]
    (teacher / "config.json").write_text(json.dumps(student | {"max_position_embeddings": longest - 1}))
    row = RECIPES["tml_opd"]
    config = config_of(model, tmp_path, replace(row, teacher=replace(row.teacher, model_path=str(teacher))))
    assert (
        model_length(config) == longest - 1
        and model_length(config_of(model, tmp_path, RECIPES["sft"])) == longest
    )


def test_a_process_group_over_the_runs_own_gpus_is_refused(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path, RECIPES["sdpo"])
    config = replace(config, sync=replace(config.sync, transport="group"))
    check_transport(config, "cpu")
    with pytest.raises(UserError, match="set sync.transport=colocated"):
        check_transport(config, "cuda")
    check_transport(
        replace(config, rollout=replace(config.rollout, engine=replace(config.rollout.engine, served=1))),
        "cuda",
    )
