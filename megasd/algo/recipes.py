"""The recipes: each constant holds the terms, teacher, weight and source of a paper's method.

    megasd train run.yaml algorithm.recipe=grpo

To add a paper made of existing pieces, add a constant here and a file in configs/algo. The file
holds the settings that do not belong to the algorithm (sampling, learning rate, batch). Every key
of a row can be overridden. Constants come from the papers. If a paper leaves a constant open, the
file in configs/algo says UNSURE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megasd.config.schema import (
    AlgorithmConfig,
    CreditConfig,
    DistillTerm,
    NLLTerm,
    PolicyGradientTerm,
    QuestionWeightConfig,
    TeacherConfig,
)


@dataclass(frozen=True)
class Recipe:
    """A method as values; the name of the method is row.recipe."""

    # The arXiv id of the paper; "-" without a paper.
    paper: str
    # A line that `megasd recipes` prints.
    about: str
    # The section `algorithm` of a config.
    row: AlgorithmConfig


# Supervised fine-tuning: the negative log-likelihood (nats) of the rows' own solutions, mean over
# all tokens of the global batch.
SFT = Recipe(
    paper="-",
    about="supervised: likelihood of the rows' solutions",
    row=AlgorithmConfig(
        recipe="sft", source="dataset", nll=NLLTerm(), aggregation="token_mean", tis_clip=None
    ),
)

# SSD (2604.01193): SFT's loss on samples of the start model, right or wrong. With
# rollout.frozen_policy=true all samples come from the start model.
SSD = Recipe(
    paper="2604.01193",
    about="supervised on own samples; with rollout.frozen_policy=true: the start model's",
    row=replace(SFT.row, recipe="ssd", source="rollout", nll=NLLTerm(drop_shortest=0.1)),
)

# GRPO (2402.03300) as the baseline of SC-SDPO (2605.27765, Tables 3-4): (R - mean) / std, clip 0.2
# / 0.28, no KL to a reference; mean over each response, then over samples. The original clips at
# 0.2 on both sides and adds the KL.
GRPO = Recipe(
    paper="2402.03300",
    about="group-normalised rewards, clipped ratio",
    row=AlgorithmConfig(recipe="grpo", policy_gradient=PolicyGradientTerm(advantage="group_std")),
)

# GRPO without the ratio to the engine's own probabilities (tis_clip): SC-SDPO's baseline has that
# ratio, the papers of the recipes that start from this row do not.
PLAIN = replace(GRPO.row, tis_clip=None)

# Dr. GRPO (2503.20783): R - mean, and token sums over a constant.
DR_GRPO = Recipe(
    paper="2503.20783",
    about="rewards less their mean, token sums over a constant",
    row=replace(
        PLAIN,
        recipe="dr_grpo",
        policy_gradient=PolicyGradientTerm(advantage="group_mean", clip_high=0.2),
        aggregation="sequence_sum",
    ),
)

# DAPO (2503.14476): clip-higher and dual clip, token mean; dynamic sampling and the overlong
# penalty stand in configs/algo/dapo.yaml.
DAPO = Recipe(
    paper="2503.14476",
    about=(
        "clip-higher, dual clip, token mean; with configs/algo/dapo.yaml: dynamic sampling, overlong penalty"
    ),
    row=replace(
        PLAIN,
        recipe="dapo",
        policy_gradient=PolicyGradientTerm(advantage="group_std", dual_clip=10.0),
        aggregation="token_mean",
    ),
)

# GSPO (2507.18071): the ratio of the whole sequence, in the token form.
GSPO = Recipe(
    paper="2507.18071",
    about="ratio of the whole sequence",
    row=replace(
        PLAIN,
        recipe="gspo",
        policy_gradient=PolicyGradientTerm(
            advantage="group_std", surrogate="gspo", clip_low=3e-4, clip_high=4e-4
        ),
    ),
)

# CISPO (2506.13585): the clipped, detached ratio is the weight of log pi; no token loses its
# gradient.
CISPO = Recipe(
    paper="2506.13585",
    about="clipped, detached ratio times log-likelihood",
    row=replace(
        PLAIN,
        recipe="cispo",
        policy_gradient=PolicyGradientTerm(advantage="group_std", surrogate="cispo"),
        aggregation="token_mean",
    ),
)

# SDPO (2601.20802, section 3 and Table 12, the setting without rich feedback; code lasgroup/SDPO):
# Jensen-Shannon divergence to an EMA self-teacher that reads the first successful sibling, on the
# student's top 100 tokens and a tail bucket; importance ratio and rollout correction truncated at
# 2; mean over each response, then over all samples, with a teacher or without.
SDPO = Recipe(
    paper="2601.20802",
    about="Jensen-Shannon to a self-teacher that reads a right sibling",
    row=AlgorithmConfig(recipe="sdpo", distill=DistillTerm(), teacher=TeacherConfig()),
)

# SC-SDPO (2605.27765, equations 14 and 16, Tables 3-4): SDPO with each question weighted by sqrt(p
# (1 - p)) of its pass rate p, divided by the mean weight of the questions that have one.
SC_SDPO = Recipe(
    paper="2605.27765",
    about="sdpo, questions weighted by sqrt(p (1 - p))",
    row=replace(SDPO.row, recipe="sc_sdpo", question_weight=QuestionWeightConfig(kind="sqrt_pq")),
)

# The PACED arm of SC-SDPO (2605.27765): p (1 - p) of the start model's pass rates, over their mean
# over the training rows.
PACED_WEIGHT = QuestionWeightConfig(kind="power", a=1.0, b=1.0, pass_rate="frozen", normaliser="dataset")

# PACED (2603.11178): forward KL on the reference responses ("cover"), then reverse KL on the
# student's own ("consolidate").
PACED = Recipe(
    paper="2603.11178",
    about="forward KL on references, then reverse KL on samples; weights p (1 - p)",
    row=AlgorithmConfig(
        recipe="paced",
        source="dataset",
        distill=DistillTerm(beta=0.0, support="full", is_clip=None),
        teacher=TeacherConfig(context="solution", weights="frozen"),
        question_weight=PACED_WEIGHT,
        aggregation="token_mean",
        tis_clip=None,
        stages=["50%: source=rollout distill.beta=1.0"],
    ),
)

# SDPO with PACED_WEIGHT: the PACED arm of SC-SDPO.
SDPO_PACED = Recipe(
    paper="2605.27765",
    about="sdpo, questions weighted by p (1 - p) of the start model",
    row=replace(SDPO.row, recipe="sdpo_paced", question_weight=PACED_WEIGHT),
)

# OPSD (2601.18734): forward KL over the whole vocabulary, each summand cut at 0.05, to the start
# model that reads the solution, thinking.
OPSD = Recipe(
    paper="2601.18734",
    about="clipped forward KL to a frozen teacher that reads the solution",
    row=AlgorithmConfig(
        recipe="opsd",
        distill=DistillTerm(beta=0.0, support="full", pointwise_clip=0.05, is_clip=None),
        teacher=TeacherConfig(context="solution", weights="frozen", thinking=True),
        aggregation="token_mean",
        tis_clip=None,
    ),
)

# RLSD (2604.03128): A ((1 - lam) + lam clip(exp(sign(A) (log T - log S)))); the teacher is a recent
# copy that reads the answer; lam falls to 0.
RLSD = Recipe(
    paper="2604.03128",
    about="teacher's log-ratio scales the advantage",
    row=AlgorithmConfig(
        recipe="rlsd",
        policy_gradient=PolicyGradientTerm(
            advantage="group_std", credit=CreditConfig(kind="rlsd", lam=0.5, lam_end=0.0, lam_steps=50)
        ),
        teacher=TeacherConfig(context="answer", weights="snapshot", refresh_every=10),
        tis_clip=None,
    ),
)

# RLCSD (2606.11709): tokens on which a right and the wrong siblings disagree get a second path, A +
# lam tanh(e / tau).
RLCSD = Recipe(
    paper="2606.11709",
    about="contrast of right and wrong siblings as a residual advantage",
    row=AlgorithmConfig(
        recipe="rlcsd",
        policy_gradient=PolicyGradientTerm(
            advantage="group_std", clip_high=0.2, credit=CreditConfig(kind="rlcsd")
        ),
        teacher=TeacherConfig(
            context="first_success",
            contrast="failures",
            num_contrasts=4,
            weights="snapshot",
            refresh_every=10,
        ),
        aggregation="token_mean",
        tis_clip=None,
    ),
)

# AntiSD (2605.11609): minus the Jensen-Shannon advantage of a live teacher that is told the
# verdict, behind a gate on its entropy. A sample without a right sibling, whose row has no solution
# (DAPO-Math-17k), has no teacher and keeps its plain advantage.
ANTISD = Recipe(
    paper="2605.11609",
    about="ascends the divergence: minus its advantage, entropy-gated",
    row=AlgorithmConfig(
        recipe="antisd",
        policy_gradient=PolicyGradientTerm(
            advantage="group_std", clip_high=0.2, credit=CreditConfig(kind="antisd")
        ),
        teacher=TeacherConfig(context="first_success", fallback="solution", say_verdict=True, weights="live"),
        aggregation="token_mean",
        tis_clip=None,
    ),
)

# EGRSD (2605.13255): whitened rewards times a clipped exp(sign(A) u), less where the teacher is
# unsure; no ratio.
EGRSD = Recipe(
    paper="2605.13255",
    about="whitened rewards, teacher's log-ratio and entropy as factors",
    row=AlgorithmConfig(
        recipe="egrsd",
        policy_gradient=PolicyGradientTerm(
            surrogate="reinforce", advantage="whitened", credit=CreditConfig(kind="egrsd")
        ),
        teacher=TeacherConfig(context="solution", weights="frozen"),
        length_bonus=0.5,
        aggregation="token_mean",
        tis_clip=None,
    ),
)

# CL-EGRSD (2605.13255, the 8B setting): the lowest entropy of the next tokens counts.
CL_EGRSD = Recipe(
    paper="2605.13255",
    about="egrsd with a look-ahead on entropy",
    row=replace(
        EGRSD.row,
        recipe="cl_egrsd",
        policy_gradient=PolicyGradientTerm(
            surrogate="reinforce",
            advantage="whitened",
            credit=CreditConfig(kind="egrsd", entropy_scale=1.0, window=5),
        ),
    ),
)

# SRPO (2604.02288): wrong samples with a teacher are distilled, the weight of a token is
# exp(-teacher entropy). All other samples get GRPO. Both terms have the same denominator.
SRPO = Recipe(
    paper="2604.02288",
    about="wrong samples distilled, the others rewarded",
    row=replace(
        SDPO.row,
        recipe="srpo",
        distill=DistillTerm(samples="wrong", token_weight="confidence", token_weight_scale=1.0),
        policy_gradient=PolicyGradientTerm(advantage="group_std", samples="undistilled"),
        aggregation="token_mean_of_terms",
    ),
)

# SSOPD (2605.17497): GRPO, and for the longest wrong sample of a group, over its first 1024 tokens,
# the clipped forward KL to the start model that reads the group's shortest right one; that term
# has the weight 0.5 * 4 p (1 - p).
SSOPD = Recipe(
    paper="2605.17497",
    about="grpo, and the longest wrong sample learns from the shortest right one",
    row=AlgorithmConfig(
        recipe="ssopd",
        policy_gradient=GRPO.row.policy_gradient,
        distill=DistillTerm(
            beta=0.0,
            support="full",
            pointwise_clip=0.05,
            samples="longest_wrong",
            max_tokens=1024,
            is_clip=None,
        ),
        teacher=TeacherConfig(context="shortest_success", weights="frozen"),
        question_weight=QuestionWeightConfig(kind="four_pq", scale=0.5, normaliser="none", terms="distill"),
        aggregation="sequence_mean_taking_part",
        tis_clip=None,
    ),
)

# SDFT (2601.19897): forward KL, as the authors' code has it, to an average that reads the row's
# demonstration; first 3 tokens left out.
SDFT = Recipe(
    paper="2601.19897",
    about="forward KL to an average that reads a demonstration",
    row=AlgorithmConfig(
        recipe="sdft",
        distill=DistillTerm(beta=0.0, support="full", skip_tokens=3, is_clip=None),
        teacher=TeacherConfig(context="solution", weights="ema", ema_rate=0.02),
        aggregation="token_mean",
    ),
)

# OPCD (2602.12275): reverse KL, cut to the student's top 256 without a tail, to the start model
# that reads a system turn.
OPCD = Recipe(
    paper="2602.12275",
    about="reverse KL to a teacher that reads a system turn",
    row=AlgorithmConfig(
        recipe="opcd",
        distill=DistillTerm(beta=1.0, support="student", top_k=256, tail="raw", is_clip=None),
        teacher=TeacherConfig(
            context="prompt",
            system="Reason step by step, check each step, and keep the answer short.",
            weights="frozen",
        ),
        aggregation="token_mean",
        tis_clip=None,
    ),
)

SEPARATE = TeacherConfig(context="prompt", weights="separate")

# GKD (2306.13649): Jensen-Shannon divergence over the whole vocabulary, half on the rows'
# solutions, half on the student's samples.
GKD = Recipe(
    paper="2306.13649",
    about="generalised Jensen-Shannon to another model, partly on its data",
    row=AlgorithmConfig(
        recipe="gkd",
        source="mixed",
        dataset_fraction=0.5,
        distill=DistillTerm(beta=0.5, support="full", is_clip=None),
        teacher=SEPARATE,
        aggregation="token_mean",
        tis_clip=None,
    ),
)

# AKL (2404.02657): forward and reverse KL, each weighted by the gaps at the teacher's head and
# tail, on the rows' solutions.
AKL = Recipe(
    paper="2404.02657",
    about="forward and reverse KL, weighed by their gaps",
    row=replace(
        GKD.row,
        recipe="akl",
        source="dataset",
        distill=DistillTerm(divergence="adaptive", support="teacher", top_k=1000, is_clip=None),
    ),
)

# MiniLLM (2306.08543): log T - log S summed to the end of the response as an advantage, and the
# reverse KL of the single step exactly.
MINILLM = Recipe(
    paper="2306.08543",
    about="reverse KL to another model by policy gradient",
    row=AlgorithmConfig(
        recipe="minillm",
        distill=DistillTerm(beta=1.0, support="full", is_clip=None),
        policy_gradient=PolicyGradientTerm(
            advantage="none", samples="all", clip_high=0.2, credit=CreditConfig(kind="return")
        ),
        teacher=SEPARATE,
        aggregation="token_mean",
        tis_clip=None,
        epochs=4,
    ),
)

# On-policy distillation as Thinking Machines publish it (blog, 2025; tinker-cookbook): log T - log
# S of each token as its advantage.
TML_OPD = Recipe(
    paper="Thinking Machines 2025",
    about="per-token reverse KL to another model as advantage",
    row=AlgorithmConfig(
        recipe="tml_opd",
        policy_gradient=PolicyGradientTerm(
            surrogate="importance", advantage="none", samples="all", credit=CreditConfig(kind="log_ratio")
        ),
        teacher=SEPARATE,
        aggregation="token_mean",
        tis_clip=10.0,
    ),
)

# ATESD (2605.11458): OPSD's loss without the cut, the solution shown in part; a controller learns
# how much of it.
ATESD = Recipe(
    paper="2605.11458",
    about="a controller decides how much of the solution the teacher reads",
    row=AlgorithmConfig(
        recipe="atesd",
        distill=DistillTerm(beta=0.0, support="full", is_clip=None),
        teacher=TeacherConfig(context="prefix", adaptive_prefix=True, weights="frozen"),
        tis_clip=None,
    ),
)

# Uni-OPD (2605.03677): TML_OPD, shifted where right samples do not lead wrong ones by a margin.
UNI_OPD = Recipe(
    paper="2605.03677",
    about="tml_opd with a margin between right and wrong samples",
    row=replace(
        TML_OPD.row,
        recipe="uni_opd",
        policy_gradient=PolicyGradientTerm(
            advantage="none", clip_high=0.2, credit=CreditConfig(kind="margin", margin=0.4)
        ),
        tis_clip=2.0,
    ),
)

# ROPD (2605.07396): GRPO without std on rewards that a rubric's judge gives. That is
# reward.verifier=rubric, which is no key of a row: with another verifier this row is GRPO on right
# and wrong.
ROPD = Recipe(
    paper="2605.07396",
    about="grpo without std; with reward.verifier=rubric: rewards from a rubric",
    row=replace(
        PLAIN, recipe="ropd", policy_gradient=PolicyGradientTerm(advantage="group_mean", clip_high=0.2)
    ),
)

# DRIFT (2606.30345): SDPO first; then wrong samples are distilled and right ones rewarded, by pass
# rates averaged over visits. The teacher of a question without a success in this step reads the
# latest earlier success.
DRIFT = Recipe(
    paper="2606.30345",
    about="sdpo, then routed by correctness, with a buffer of successes",
    row=replace(
        SDPO.row,
        recipe="drift",
        teacher=TeacherConfig(fallback="buffer"),
        stages=[
            "50%: distill.samples=wrong policy_gradient.samples=right policy_gradient.advantage=group_std"
            " policy_gradient.right_bonus=0.1 question_weight.kind=sqrt_pq question_weight.pass_rate=ema"
            " aggregation=token_mean_of_terms"
        ],
    ),
)

# All recipes of this file by name, in the order of this file. `megasd recipes` keeps that order.
CATALOGUE: dict[str, Recipe] = {
    one.row.recipe: one for one in list(globals().values()) if isinstance(one, Recipe)
}
RECIPES: dict[str, AlgorithmConfig] = {name: one.row for name, one in CATALOGUE.items()}
