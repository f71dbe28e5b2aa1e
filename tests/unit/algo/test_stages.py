"""algo/stages.py: the algorithm of each step, and the stages that are refused.

Proves where stages begin, that they add up, the scheduled numbers, and one-line refusals. Does not
prove that an actor trains on across a stage (the nightly recipes do).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megasd.algo.recipes import RECIPES
from megasd.algo.stages import at, check_stages, reads_solutions, variants
from megasd.config.load import override
from megasd.config.schema import (
    AlgorithmConfig,
    Config,
    ConfigError,
    CreditConfig,
    DistillTerm,
    PolicyGradientTerm,
    RolloutConfig,
    RunConfig,
)

SDPO = RECIPES["sdpo"]


def staged(*stages: str, start: AlgorithmConfig = SDPO) -> AlgorithmConfig:
    return replace(start, stages=list(stages))


def check(
    algorithm: AlgorithmConfig, steps: int = 100, world_size: int | None = None, **rollout: object
) -> None:
    check_stages(
        Config(algorithm=algorithm, rollout=RolloutConfig(**rollout), run=RunConfig(steps=steps)), world_size
    )


def test_without_stages_or_schedules_the_algorithm_is_itself():
    assert at(SDPO, 7, 100) is SDPO
    assert variants(SDPO) == [SDPO]


@pytest.mark.parametrize(
    "stage, steps, first",
    [
        ("50%", 100, 50),
        ("50%", 3, 2),
        ("0%", 10, 0),
        ("33%", 100, 33),
        ("12.5%", 80, 10),
        ("7", 100, 7),
        ("0", 5, 0),
        ("100%", 5, 5),
    ],
)
def test_a_stage_begins_at_its_step(stage, steps, first):
    algorithm = staged(f"{stage}: distill.beta=1")
    betas = [at(algorithm, step, steps).distill.beta for step in range(steps)]
    assert betas == [0.5] * first + [1.0] * (steps - first)
    check(algorithm, steps)


def test_paced_goes_from_references_to_samples():
    before, after = at(RECIPES["paced"], 49, 100), at(RECIPES["paced"], 50, 100)
    assert (before.source, before.distill.beta) == ("dataset", 0.0)
    assert (after.source, after.distill.beta) == ("rollout", 1.0)
    assert replace(after, source="dataset", distill=before.distill) == before


def test_later_stages_add_to_earlier_ones():
    algorithm = staged(
        "10: distill.beta=1", "20: distill.top_k=7 aggregation=token_mean", "30: distill.beta=0"
    )
    found = [at(algorithm, step, 40) for step in (0, 10, 20, 30)]
    assert [(a.distill.beta, a.distill.top_k) for a in found] == [(0.5, 100), (1.0, 100), (1.0, 7), (0.0, 7)]
    assert [a.aggregation for a in found] == ["sequence_mean"] * 2 + ["token_mean"] * 2
    assert variants(algorithm) == found
    # nothing changed in place
    assert SDPO.distill.beta == 0.5


def test_a_stage_may_add_a_term_and_quote_a_value():
    algorithm = staged(
        "5: policy_gradient.samples=right teacher.template='{prompt} and {solution}'"
        " distill.pointwise_clip=null"
    )
    after = at(algorithm, 5, 10)
    assert after.policy_gradient == PolicyGradientTerm(samples="right")
    assert after.teacher.template == "{prompt} and {solution}" and after.distill.pointwise_clip is None
    assert at(algorithm, 4, 10).policy_gradient is None
    assert at(staged("5: nll.drop_shortest=0.2"), 5, 10).nll.drop_shortest == 0.2


def test_lam_falls_to_zero():
    """RLSD 2604.03128: 0.5 to 0 over the first 50 steps."""
    lams = [at(RECIPES["rlsd"], step, 100).policy_gradient.credit.lam for step in (0, 10, 25, 49)]
    assert lams == pytest.approx([0.5, 0.4, 0.25, 0.01])
    # what is left is GRPO, and no teacher runs for it
    assert at(RECIPES["rlsd"], 50, 100).policy_gradient.credit is None
    constant = replace(RECIPES["rlsd"], policy_gradient=PolicyGradientTerm(credit=CreditConfig(lam=0.3)))
    assert at(constant, 99, 100) is constant


def test_the_coefficient_rises_and_falls():
    algorithm = replace(
        SDPO, distill=DistillTerm(coefficient=2.0, warmup_steps=4, decay_from=10, decay_steps=4)
    )
    found = [at(algorithm, step, 20).distill.coefficient for step in range(16)]
    assert found == [0.5, 1.0, 1.5, *[2.0] * 8, 1.5, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_every_recipe_passes(recipe, steps):
    row = RECIPES[recipe]
    if row.teacher is not None and row.teacher.weights == "separate":
        row = replace(row, teacher=replace(row.teacher, model_path="teacher"))
    check(row, steps)
    for step in range(min(steps, 3)):
        assert at(RECIPES[recipe], step, steps).recipe == recipe


BAD = [
    (["distill.beta=1"], "algorithm.stages[0]: 'distill.beta=1' is not a stage; write"),
    (["50%:"], "is not a stage"),
    (["50%: distill.beta='1"], "No closing quotation; close the quotes"),
    (["1.5: distill.beta=1"], "starts at a whole step or at 0% to 100%"),
    (["120%: distill.beta=1"], "starts at a whole step or at 0% to 100%"),
    (
        ["50%: distill.bta=1"],
        "algorithm.stages[0]: algorithm.distill.bta: unknown key; did you mean algorithm.distill.beta?",
    ),
    (["50%: distill.beta"], "is not an override"),
    (["50%: distill.beta=high"], "algorithm.distill.beta='high': must be a number"),
    (["50%: distill.beta=2"], "algorithm.stages[0]: algorithm.distill.beta=2.0: must lie in [0, 1]"),
    (["50%: source=engine"], "must be one of rollout, dataset, mixed"),
    (
        ["50%: distill.top_k=${nothing}"],
        "algorithm.stages[0]: algorithm.distill.top_k: Interpolation key 'nothing' not found",
    ),
    (
        ["10: distill.beta=1", "5: distill.beta=0"],
        "algorithm.stages[1]: begins before the stage in front of it",
    ),
    (["100: distill.beta=1"], "algorithm.stages[0]: never begins in run.steps=100"),
    (["50%: distill=null"], "algorithm.stages[0]: algorithm: no term to train on"),
    (["50%: recipe=grpo"], "algorithm.recipe is built before the first step and cannot change"),
    (["50%: teacher.weights=live"], "algorithm.teacher.weights is built before the first step"),
    (["50%: teacher.ema_rate=0.1"], "algorithm.teacher.ema_rate is built"),
    (
        ["50%: question_weight.kind=pq question_weight.pass_rate=frozen"],
        "algorithm.question_weight.pass_rate is built",
    ),
    (
        ["50%: teacher.context=prefix teacher.adaptive_prefix=true"],
        "algorithm.teacher.adaptive_prefix is built before the first step",
    ),
    (
        ["50%: minibatches=33"],
        "algorithm.stages[0]: algorithm.minibatches=33: exceeds the rollout.num_prompts=32",
    ),
    (
        ["50%: overlong_buffer=2000"],
        "algorithm.stages[0]: algorithm.overlong_buffer=2000: must be smaller than",
    ),
    (
        ["50%: source=dataset tis_clip=null"],
        "algorithm.stages[0]: algorithm.teacher.context=first_success: reads other samples",
    ),
    (
        ["50%: policy_gradient.credit.kind=rlsd", "60%: distill.samples=positive policy_gradient=null"],
        "algorithm.stages[1]: algorithm.distill",
    ),
    (
        ["10%: question_weight.kind=pq question_weight.pass_rate=ema", "50%: question_weight.ema_rate=0.1"],
        "algorithm.question_weight.ema_rate: pass rates are averaged once for all stages; take 0.1 or 0.5",
    ),
    (
        ["50%: policy_gradient.credit.kind=antisd"],
        "algorithm.policy_gradient.credit's gate is built",
    ),
]


@pytest.mark.parametrize("stages, expected", BAD, ids=[" | ".join(s) for s, _ in BAD])
def test_bad_stages_are_one_line(stages, expected):
    with pytest.raises(ConfigError) as caught:
        check(staged(*stages))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_built_from_the_start_stays():
    grpo = RECIPES["grpo"]
    with pytest.raises(ConfigError, match="give algorithm.teacher from the start"):
        check(staged("50%: distill.beta=1 teacher.weights=ema", start=grpo))
    with pytest.raises(ConfigError, match="algorithm.question_weight is built"):
        check(staged("50%: question_weight.a=2", start=RECIPES["sdpo_paced"]))
    # a teacher may go
    check(staged("50%: policy_gradient.advantage=group_std distill=null teacher=null"))


def test_a_stage_is_held_against_the_whole_run():
    later = staged("50%: tis_clip=2.0", start=replace(RECIPES["opsd"], stages=[]))
    check(later)
    with pytest.raises(
        ConfigError,
        match=r"algorithm.stages\[0\]: algorithm.tis_clip: the engine's log-probs are those before top-p",
    ):
        check(later, top_p=0.9)
    mixed = staged("50%: source=mixed tis_clip=null")
    check(mixed)
    with pytest.raises(
        ConfigError, match=r"algorithm.stages\[0\]: algorithm.source=mixed: cannot be replayed"
    ):
        check(mixed, replay_dir="old")


def test_every_rank_gets_a_sample_of_every_minibatch_in_every_stage():
    """8 questions of 4 samples for 4 ranks: four minibatches of samples go, but not of one row a question."""
    paced = replace(RECIPES["paced"], stages=["50%: source=rollout minibatches=4"])
    check(paced, world_size=4, num_prompts=8, num_samples=4)
    for algorithm, where in (
        (replace(paced, minibatches=4), ""),
        (staged("50%: minibatches=8", start=RECIPES["grpo"]), r"stages\[0\]: "),
    ):
        samples = 2 if where == "" else 4
        with pytest.raises(
            ConfigError,
            match=(
                f"{where}algorithm.minibatches=[48]: leaves {samples} samples in the smallest, fewer than the"
            ),
        ):
            check(algorithm, world_size=4 if where == "" else 8, num_prompts=8, num_samples=4)


def test_a_teacher_may_wait_for_its_stage_but_some_stage_reads_it():
    waits = replace(RECIPES["grpo"], teacher=SDPO.teacher)
    check(staged("50%: distill.beta=0.5 policy_gradient=null", start=waits))
    # and one that was read may stay
    check(staged("50%: distill=null policy_gradient.advantage=group_std"))
    with pytest.raises(ConfigError, match="algorithm.teacher: no term reads the teacher"):
        check(staged("50%: aggregation=token_mean", start=waits))
    with pytest.raises(ConfigError, match="algorithm.teacher: no term reads the teacher"):
        check(waits)


def test_dynamic_sampling_is_of_some_stage():
    check(RECIPES["paced"], dynamic_sampling=True)
    with pytest.raises(
        ConfigError,
        match="rollout.dynamic_sampling: asks for samples of every question, and algorithm.source=dataset",
    ):
        check(replace(RECIPES["paced"], stages=[]), dynamic_sampling=True)


def test_who_needs_solutions():
    """AntiSD's fallback (2605.11609) goes without: DAPO-Math-17k has no solutions."""
    needs = {name for name, row in RECIPES.items() if reads_solutions(row)}
    assert needs == {"sft", "paced", "opsd", "egrsd", "cl_egrsd", "sdft", "gkd", "akl", "atesd"}


def test_override_reads_as_the_loader_does():
    changed = override(
        SDPO, ["distill.beta=1", "teacher.template={prompt} {solution}", "policy_gradient={}"], "here"
    )
    assert changed.distill.beta == 1.0 and isinstance(changed.distill.beta, float)
    assert (
        changed.teacher.template == "{prompt} {solution}" and changed.policy_gradient == PolicyGradientTerm()
    )
    with pytest.raises(ConfigError, match="^here: algorithm.distill.beta=-1.0: must lie in"):
        override(SDPO, ["distill.beta=-1"], "here")
