"""One row per paper: which terms, teacher, question weight and source make the method.

    megasd train run.yaml algorithm.recipe=grpo

A row is a value of AlgorithmConfig; a paper made of existing pieces is one more row here, one line
in ABOUT and one file in configs/algo, which holds what is not the algorithm's (sampling, learning
rate, batch). Every key of a row can be overridden. Constants are the papers'; where a paper leaves
one open, the file in configs/algo says UNSURE.
"""

from __future__ import annotations

from dataclasses import replace

from megasd.config.schema import (
    AlgorithmConfig,
    CreditConfig,
    DistillTerm,
    NLLTerm,
    PolicyGradientTerm,
    QuestionWeightConfig,
    TeacherConfig,
)

# Supervised fine-tuning: the negative log-likelihood (nats) of the rows' own solutions, mean over
# all tokens of the global batch.
SFT = AlgorithmConfig(recipe="sft", source="dataset", nll=NLLTerm(), aggregation="token_mean", tis_clip=None)

# SSD (2604.01193): the same on samples of the frozen start model, whatever they are worth.
# rollout.frozen_policy=true makes them its.
SSD = replace(SFT, recipe="ssd", source="rollout", nll=NLLTerm(drop_shortest=0.1))

# ---- policy gradients ----

# GRPO (2402.03300) as the baseline of SC-SDPO (2605.27765, Tables 3-4): (R - mean) / std, clip 0.2
# / 0.28, no KL to a reference; mean over each response, then over samples. The original clips at
# 0.2 on both sides and adds the KL.
GRPO = AlgorithmConfig(recipe="grpo", policy_gradient=PolicyGradientTerm(advantage="group_std"))

# The ratio to the engine's own probabilities (tis_clip) is of SC-SDPO's baseline; the papers of the
# rows below have none.
PLAIN = replace(GRPO, tis_clip=None)

# Dr. GRPO (2503.20783): R - mean, and token sums over a constant.
DR_GRPO = replace(
    PLAIN,
    recipe="dr_grpo",
    policy_gradient=PolicyGradientTerm(advantage="group_mean", clip_high=0.2),
    aggregation="sequence_sum",
)

# DAPO (2503.14476): clip-higher and dual clip, token mean; dynamic sampling and the overlong
# penalty go by its file.
DAPO = replace(
    PLAIN,
    recipe="dapo",
    policy_gradient=PolicyGradientTerm(advantage="group_std", dual_clip=10.0),
    aggregation="token_mean",
)

# GSPO (2507.18071): the ratio of the whole sequence, in the token form.
GSPO = replace(
    PLAIN,
    recipe="gspo",
    policy_gradient=PolicyGradientTerm(
        advantage="group_std", surrogate="gspo", clip_low=3e-4, clip_high=4e-4
    ),
)

# CISPO (2506.13585): the clipped, detached ratio weighs log pi; no token loses its gradient.
CISPO = replace(
    PLAIN,
    recipe="cispo",
    policy_gradient=PolicyGradientTerm(advantage="group_std", surrogate="cispo"),
    aggregation="token_mean",
)

# ROPD (2605.07396): GRPO without std on rewards that a rubric's judge gives. That is
# reward.verifier=rubric, which is no key of a row: with another verifier this row is GRPO on right
# and wrong.
ROPD = replace(
    PLAIN, recipe="ropd", policy_gradient=PolicyGradientTerm(advantage="group_mean", clip_high=0.2)
)

# ---- distillation from a self-teacher on the student's samples ----

# SDPO (2601.20802, section 3 and Table 12, the setting without rich feedback; code lasgroup/SDPO):
# Jensen-Shannon divergence to an EMA self-teacher that reads the first successful sibling, on the
# student's top 100 tokens and a tail bucket; importance ratio and rollout correction truncated at
# 2; mean over each response, then over all samples, taught or not.
SDPO = AlgorithmConfig(recipe="sdpo", distill=DistillTerm(), teacher=TeacherConfig())

# SC-SDPO (2605.27765, equations 14 and 16, Tables 3-4): SDPO with each question weighted by sqrt(p
# (1 - p)) of its pass rate p, divided by the mean weight of the questions that have one.
SC_SDPO = replace(SDPO, recipe="sc_sdpo", question_weight=QuestionWeightConfig(kind="sqrt_pq"))

# The PACED arm of SC-SDPO (2605.27765): p (1 - p) of the start model's pass rates, over their mean
# over the training rows.
PACED_WEIGHT = QuestionWeightConfig(kind="power", a=1.0, b=1.0, pass_rate="frozen", normaliser="dataset")
SDPO_PACED = replace(SDPO, recipe="sdpo_paced", question_weight=PACED_WEIGHT)

# PACED (2603.11178): forward KL on the reference responses ("cover"), then reverse KL on the
# student's own ("consolidate").
PACED = AlgorithmConfig(
    recipe="paced",
    source="dataset",
    distill=DistillTerm(beta=0.0, support="full", is_clip=None),
    teacher=TeacherConfig(context="solution", weights="frozen"),
    question_weight=PACED_WEIGHT,
    aggregation="token_mean",
    tis_clip=None,
    stages=["50%: source=rollout distill.beta=1.0"],
)

# OPSD (2601.18734): forward KL over the whole vocabulary, each summand cut at 0.05, to the start
# model that reads the solution, thinking.
OPSD = AlgorithmConfig(
    recipe="opsd",
    distill=DistillTerm(beta=0.0, support="full", pointwise_clip=0.05, is_clip=None),
    teacher=TeacherConfig(context="solution", weights="frozen", thinking=True),
    aggregation="token_mean",
    tis_clip=None,
)

# ATESD (2605.11458): OPSD's loss without the cut, the solution shown in part; a controller learns
# how much of it.
ATESD = AlgorithmConfig(
    recipe="atesd",
    distill=DistillTerm(beta=0.0, support="full", is_clip=None),
    teacher=TeacherConfig(context="prefix", adaptive_prefix=True, weights="frozen"),
    tis_clip=None,
)

# SDFT (2601.19897): forward KL, as the authors' code has it, to an average that reads the row's
# demonstration; first 3 tokens left out.
SDFT = AlgorithmConfig(
    recipe="sdft",
    distill=DistillTerm(beta=0.0, support="full", skip_tokens=3, is_clip=None),
    teacher=TeacherConfig(context="solution", weights="ema", ema_rate=0.02),
    aggregation="token_mean",
)

# OPCD (2602.12275): reverse KL, cut to the student's top 256 without a tail, to the start model
# that reads a system turn.
OPCD = AlgorithmConfig(
    recipe="opcd",
    distill=DistillTerm(beta=1.0, support="student", top_k=256, tail="raw", is_clip=None),
    teacher=TeacherConfig(
        context="prompt",
        system="Reason step by step, check each step, and keep the answer short.",
        weights="frozen",
    ),
    aggregation="token_mean",
    tis_clip=None,
)

# SSOPD (2605.17497): GRPO, and for the longest wrong sample of a group, over its first 1024 tokens,
# the clipped forward KL to the start model that reads the group's shortest right one; that term
# weighs 0.5 * 4 p (1 - p).
SSOPD = AlgorithmConfig(
    recipe="ssopd",
    policy_gradient=GRPO.policy_gradient,
    distill=DistillTerm(
        beta=0.0, support="full", pointwise_clip=0.05, samples="longest_wrong", max_tokens=1024, is_clip=None
    ),
    teacher=TeacherConfig(context="shortest_success", weights="frozen"),
    question_weight=QuestionWeightConfig(kind="four_pq", scale=0.5, normaliser="none", terms="distill"),
    aggregation="sequence_mean_taking_part",
    tis_clip=None,
)

# SRPO (2604.02288): wrong samples with a teacher are distilled, tokens weighed by exp(-teacher
# entropy); all others get GRPO. Both over one denominator.
SRPO = replace(
    SDPO,
    recipe="srpo",
    distill=DistillTerm(samples="wrong", token_weight="confidence", token_weight_scale=1.0),
    policy_gradient=PolicyGradientTerm(advantage="group_std", samples="undistilled"),
    aggregation="token_mean_of_terms",
)

# DRIFT (2606.30345): SDPO first; then wrong samples are distilled and right ones rewarded, by pass
# rates averaged over visits. A question without a success in this step is taught by its latest
# earlier one.
DRIFT = replace(
    SDPO,
    recipe="drift",
    teacher=TeacherConfig(fallback="buffer"),
    stages=[
        "50%: distill.samples=wrong policy_gradient.samples=right policy_gradient.advantage=group_std"
        " policy_gradient.right_bonus=0.1 question_weight.kind=sqrt_pq question_weight.pass_rate=ema"
        " aggregation=token_mean_of_terms"
    ],
)

# ---- a teacher's log-probs as credit in a policy gradient ----

# RLSD (2604.03128): A ((1 - lam) + lam clip(exp(sign(A) (log T - log S)))); the teacher is a recent
# copy that reads the answer; lam falls to 0.
RLSD = AlgorithmConfig(
    recipe="rlsd",
    policy_gradient=PolicyGradientTerm(
        advantage="group_std", credit=CreditConfig(kind="rlsd", lam=0.5, lam_end=0.0, lam_steps=50)
    ),
    teacher=TeacherConfig(context="answer", weights="snapshot", refresh_every=10),
    tis_clip=None,
)

# RLCSD (2606.11709): tokens on which a right and the wrong siblings disagree get a second path, A +
# lam tanh(e / tau).
RLCSD = AlgorithmConfig(
    recipe="rlcsd",
    policy_gradient=PolicyGradientTerm(
        advantage="group_std", clip_high=0.2, credit=CreditConfig(kind="rlcsd")
    ),
    teacher=TeacherConfig(
        context="first_success", contrast="failures", num_contrasts=4, weights="snapshot", refresh_every=10
    ),
    aggregation="token_mean",
    tis_clip=None,
)

# AntiSD (2605.11609): minus the Jensen-Shannon advantage of a live teacher that is told the
# verdict, behind a gate on its entropy. A sample without a right sibling whose row has no solution
# (DAPO-Math-17k) is untaught: it keeps its plain advantage.
ANTISD = AlgorithmConfig(
    recipe="antisd",
    policy_gradient=PolicyGradientTerm(
        advantage="group_std", clip_high=0.2, credit=CreditConfig(kind="antisd")
    ),
    teacher=TeacherConfig(context="first_success", fallback="solution", say_verdict=True, weights="live"),
    aggregation="token_mean",
    tis_clip=None,
)

# EGRSD (2605.13255): whitened rewards times a clipped exp(sign(A) u), less where the teacher is
# unsure; no ratio.
EGRSD = AlgorithmConfig(
    recipe="egrsd",
    policy_gradient=PolicyGradientTerm(
        surrogate="reinforce", advantage="whitened", credit=CreditConfig(kind="egrsd")
    ),
    teacher=TeacherConfig(context="solution", weights="frozen"),
    length_bonus=0.5,
    aggregation="token_mean",
    tis_clip=None,
)

# CL-EGRSD (2605.13255, the 8B setting): the lowest entropy of the next tokens counts.
CL_EGRSD = replace(
    EGRSD,
    recipe="cl_egrsd",
    policy_gradient=replace(
        EGRSD.policy_gradient, credit=CreditConfig(kind="egrsd", entropy_scale=1.0, window=5)
    ),
)

# ---- another model as the teacher: algorithm.teacher.model_path ----

SEPARATE = TeacherConfig(context="prompt", weights="separate")

# GKD (2306.13649): Jensen-Shannon divergence over the whole vocabulary, half on the rows'
# solutions, half on the student's samples.
GKD = AlgorithmConfig(
    recipe="gkd",
    source="mixed",
    dataset_fraction=0.5,
    distill=DistillTerm(beta=0.5, support="full", is_clip=None),
    teacher=SEPARATE,
    aggregation="token_mean",
    tis_clip=None,
)

# AKL (2404.02657): forward and reverse KL weighed by the gaps at the teacher's head and tail, on
# the rows' solutions.
AKL = replace(
    GKD,
    recipe="akl",
    source="dataset",
    distill=DistillTerm(divergence="adaptive", support="teacher", top_k=1000, is_clip=None),
)

# MiniLLM (2306.08543): log T - log S summed to the end of the response as an advantage, and the
# reverse KL of the single step exactly.
MINILLM = AlgorithmConfig(
    recipe="minillm",
    distill=DistillTerm(beta=1.0, support="full", is_clip=None),
    policy_gradient=PolicyGradientTerm(
        advantage="none", samples="all", clip_high=0.2, credit=CreditConfig(kind="return")
    ),
    teacher=SEPARATE,
    aggregation="token_mean",
    tis_clip=None,
    epochs=4,
)

# On-policy distillation as Thinking Machines publish it (blog, 2025; tinker-cookbook): log T - log
# S of each token as its advantage.
TML_OPD = AlgorithmConfig(
    recipe="tml_opd",
    policy_gradient=PolicyGradientTerm(
        surrogate="importance", advantage="none", samples="all", credit=CreditConfig(kind="log_ratio")
    ),
    teacher=SEPARATE,
    aggregation="token_mean",
    tis_clip=10.0,
)

# Uni-OPD (2605.03677): the same, shifted where right samples do not lead wrong ones by a margin.
UNI_OPD = replace(
    TML_OPD,
    recipe="uni_opd",
    policy_gradient=PolicyGradientTerm(
        advantage="none", clip_high=0.2, credit=CreditConfig(kind="margin", margin=0.4)
    ),
    tis_clip=2.0,
)

# name: (paper, one line), in the order of `megasd recipes`.
ABOUT: dict[str, tuple[str, str]] = {
    "sft": ("-", "supervised: likelihood of the rows' solutions"),
    "ssd": ("2604.01193", "supervised on own samples; with rollout.frozen_policy=true: the start model's"),
    "grpo": ("2402.03300", "group-normalised rewards, clipped ratio"),
    "dr_grpo": ("2503.20783", "rewards less their mean, token sums over a constant"),
    "dapo": (
        "2503.14476",
        "clip-higher, dual clip, token mean; with configs/algo/dapo.yaml: dynamic sampling, overlong penalty",
    ),
    "gspo": ("2507.18071", "ratio of the whole sequence"),
    "cispo": ("2506.13585", "clipped, detached ratio times log-likelihood"),
    "sdpo": ("2601.20802", "Jensen-Shannon to a self-teacher that reads a right sibling"),
    "sc_sdpo": ("2605.27765", "sdpo, questions weighted by sqrt(p (1 - p))"),
    "paced": ("2603.11178", "forward KL on references, then reverse KL on samples; weights p (1 - p)"),
    "sdpo_paced": ("2605.27765", "sdpo, questions weighted by p (1 - p) of the start model"),
    "opsd": ("2601.18734", "clipped forward KL to a frozen teacher that reads the solution"),
    "rlsd": ("2604.03128", "teacher's log-ratio scales the advantage"),
    "rlcsd": ("2606.11709", "contrast of right and wrong siblings as a residual advantage"),
    "antisd": ("2605.11609", "ascends the divergence: minus its advantage, entropy-gated"),
    "egrsd": ("2605.13255", "whitened rewards, teacher's log-ratio and entropy as factors"),
    "cl_egrsd": ("2605.13255", "egrsd with a look-ahead on entropy"),
    "srpo": ("2604.02288", "wrong samples distilled, the others rewarded"),
    "ssopd": ("2605.17497", "grpo, and the longest wrong sample learns from the shortest right one"),
    "sdft": ("2601.19897", "forward KL to an average that reads a demonstration"),
    "opcd": ("2602.12275", "reverse KL to a teacher that reads a system turn"),
    "gkd": ("2306.13649", "generalised Jensen-Shannon to another model, partly on its data"),
    "akl": ("2404.02657", "forward and reverse KL, weighed by their gaps"),
    "minillm": ("2306.08543", "reverse KL to another model by policy gradient"),
    "tml_opd": ("Thinking Machines 2025", "per-token reverse KL to another model as advantage"),
    "atesd": ("2605.11458", "a controller decides how much of the solution the teacher reads"),
    "uni_opd": ("2605.03677", "tml_opd with a margin between right and wrong samples"),
    "ropd": ("2605.07396", "grpo without std; with reward.verifier=rubric: rewards from a rubric"),
    "drift": ("2606.30345", "sdpo, then routed by correctness, with a buffer of successes"),
}

_ROWS = (
    SFT,
    SSD,
    GRPO,
    DR_GRPO,
    DAPO,
    GSPO,
    CISPO,
    SDPO,
    SC_SDPO,
    PACED,
    SDPO_PACED,
    OPSD,
    RLSD,
    RLCSD,
    ANTISD,
    EGRSD,
    CL_EGRSD,
    SRPO,
    SSOPD,
    SDFT,
    OPCD,
    GKD,
    AKL,
    MINILLM,
    TML_OPD,
    ATESD,
    UNI_OPD,
    ROPD,
    DRIFT,
)
RECIPES: dict[str, AlgorithmConfig] = {row.recipe: row for row in _ROWS}
