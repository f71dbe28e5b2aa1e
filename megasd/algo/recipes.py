"""One row per paper: which terms, teacher, question weight and source make the method.

    megasd train run.yaml algorithm.recipe=grpo

A row is a value of AlgorithmConfig; a paper made of existing pieces is one more row. Every key of a row can be overridden.
"""

from __future__ import annotations

from dataclasses import replace

from megasd.config import AlgorithmConfig, DistillTerm, NLLTerm, PolicyGradientTerm, TeacherConfig

# SDPO (arXiv 2601.20802, section 3 and Table 12, the setting without rich feedback; code lasgroup/SDPO): Jensen-Shannon divergence to an
# EMA self-teacher that reads the first successful sibling, on the student's top 100 tokens and a tail bucket; importance ratio and
# rollout correction truncated at 2; mean over each response, then over all samples, taught or not.
SDPO = AlgorithmConfig(
    recipe="sdpo",
    source="rollout",
    distill=DistillTerm(coefficient=1.0, beta=0.5, support="student", top_k=100, tail="bucket", is_clip=2.0),
    teacher=TeacherConfig(context="first_success", weights="ema", ema_rate=0.05),
    question_weight="none",
    aggregation="sequence_mean",
    tis_clip=2.0,
)

# SC-SDPO (arXiv 2605.27765, equations 14 and 16, Tables 3-4): SDPO with each question weighted by sqrt(p (1 - p)) of its pass rate p,
# divided by the mean weight of the questions that have one.
SC_SDPO = replace(SDPO, recipe="sc_sdpo", question_weight="sqrt_pq")

# GRPO (arXiv 2402.03300) as the baseline of SC-SDPO (arXiv 2605.27765, Tables 3-4): (R - mean) / std, clip 0.2 / 0.28, no KL to a
# reference; mean over each response, then over samples. The original clips at 0.2 on both sides and adds the KL.
GRPO = AlgorithmConfig(
    recipe="grpo",
    source="rollout",
    policy_gradient=PolicyGradientTerm(coefficient=1.0, clip_low=0.2, clip_high=0.28, advantage="group_std"),
    question_weight="none",
    aggregation="sequence_mean",
    tis_clip=2.0,
)

# Dr. GRPO's advantage (arXiv 2503.20783): R - mean, no std. This is SDPO's GRPO baseline (arXiv 2601.20802, equation 12) and the row
# "GRPO w/o std norm" of SC-SDPO. Dr. GRPO itself also divides token sums by a constant; here the mean over a response stays.
DR_GRPO = replace(GRPO, recipe="dr_grpo", policy_gradient=replace(GRPO.policy_gradient, advantage="group_mean"))

# Supervised fine-tuning: the negative log-likelihood (nats) of the rows' own solutions, mean over all tokens of the global batch.
SFT = AlgorithmConfig(
    recipe="sft",
    source="dataset",
    nll=NLLTerm(coefficient=1.0, context_fraction=0.0),
    question_weight="none",
    aggregation="token_mean",
    tis_clip=None,
)

RECIPES: dict[str, AlgorithmConfig] = {row.recipe: row for row in (SC_SDPO, SDPO, GRPO, DR_GRPO, SFT)}
