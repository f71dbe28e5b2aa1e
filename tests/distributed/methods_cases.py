"""Cases of test_methods.py, run under torchrun: golden vectors, identities of the recipes,
invariances, on what methods_world.py makes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from megasd.algo.recipes import RECIPES
from megasd.algo.stages import at
from megasd.config.schema import AlgorithmConfig, QuestionWeightConfig
from megasd.loss.token_weights import token_weights
from megasd.ops.vocab_parallel import TAILS
from megasd.types import Group, Prompt, Sample
from tests import reference
from tests.distributed.methods_world import (
    CLOSE,
    MIXED,
    RIGHT,
    ROOM,
    TEMPERATURE,
    TOP_K,
    VOCAB,
    WRONG,
    Layout,
    World,
    alone,
    batch_of,
    layouts,
    of_tokens,
    read_alone,
    rows,
    same,
    signals,
    small,
    step,
    world,
)  # fmt: skip

# ---- golden vectors ----

STUDENT, TEACHER = [2.0, 1.0, 0.5, -1.0, -2.0], [0.5, 2.5, 0.0, -0.5, -3.0]
DIVERGENCES = {
    ("full", "bucket", 0.0, None): 0.770548,
    ("full", "bucket", 0.1, None): 0.068074,
    ("full", "bucket", 0.5, None): 0.187417,
    ("full", "bucket", 0.9, None): 0.074210,
    ("full", "bucket", 1.0, None): 0.868531,
    ("student", "bucket", 0.0, None): 0.758470,
    ("student", "bucket", 0.5, None): 0.183910,
    ("student", "bucket", 1.0, None): 0.851202,
    ("student", "renormalise", 0.0, None): 0.828725,
    ("student", "renormalise", 0.5, None): 0.208126,
    ("student", "renormalise", 1.0, None): 1.006842,
    ("student", "raw", 1.0, None): 0.764220,
    ("full", "bucket", 0.0, 0.05): -0.175482,
}


def tokens(student: list[list[float]], teacher: list[list[float]]) -> World:
    """A group of wrong samples of one token (id 0) each, with these logits at temperature 1."""
    samples = [Sample("q", i, [1], [0], [0.0], "", "stop", 0, verdict=WRONG) for i in range(len(student))]
    pad = [-1e3] * (VOCAB - len(student[0]))
    s, t = (
        torch.tensor([[*row, *pad] for row in x], dtype=torch.float64) * TEMPERATURE
        for x in (student, teacher)
    )
    return World(
        [Group(Prompt("q", [{"role": "user", "content": "?"}], "42", "42"), samples)], s, t, t[None].clone()
    )


def likely(*logps: float) -> list[list[float]]:
    """Logits whose first token has these log-probabilities."""
    return [[logp, *[math.log1p(-math.exp(logp)) - math.log(VOCAB - 1)] * (VOCAB - 1)] for logp in logps]


def golden_divergences(all_layouts: list[Layout]) -> None:
    """By the objective of SDPO's row: one taught token of a batch of one, so that the loss is the
    divergence. Fused too.
    """
    sdpo = replace(
        RECIPES["sdpo"], teacher=replace(RECIPES["sdpo"].teacher, context="solution"), tis_clip=None
    )
    for layout, fused in itertools.product(all_layouts, (False, True)):
        for (support, tail, beta, clip), value in DIVERGENCES.items():
            changes = dict(support=support, tail=tail, beta=beta, pointwise_clip=clip, top_k=2)
            found = step(tokens([STUDENT], [TEACHER]), small(sdpo, **changes), alone(layout), fused=fused)
            assert abs(found.loss.item() - value) < 6e-7, (support, tail, beta, clip, found.loss)
    clipped = step(
        tokens([STUDENT], [TEACHER]),
        small(sdpo, support="full", beta=0.0, pointwise_clip=0.05),
        alone(all_layouts[0]),
    )
    # summands; the gap token's, 0.996030, is cut and loses its gradient
    kept = [-0.184566, None, -0.047377, 0.010427, -0.003966]
    p, q = (torch.tensor(x, dtype=torch.float64).softmax(0) for x in (STUDENT, TEACHER))
    weight = torch.tensor([0.0 if x is None else 1.0 for x in kept], dtype=torch.float64) * q
    expected = (p * weight.sum() - weight) / TEMPERATURE
    torch.testing.assert_close(clipped.gradient[0, :5], expected, rtol=1e-10, atol=1e-12)
    assert abs(sum(x or 0.05 for x in kept) + 0.175482) < 3e-6


def advantages_of(
    row: AlgorithmConfig, w: World, advantages: list[float], layout: Layout, **signal: torch.Tensor
) -> list[float]:
    """Minus the loss of each token on policy: the advantage that the credit makes of these. w: its
    logits decide the log-ratios.
    """
    row = replace(
        row,
        policy_gradient=replace(row.policy_gradient, surrogate="ppo", advantage="none", samples="all"),
        tis_clip=None,
    )
    row = replace(row, teacher=replace(row.teacher, context="solution", contrast="none"), length_bonus=0.0)
    batch, _ = batch_of(w.groups, row)
    batch.streams["advantage"] = torch.tensor(advantages, dtype=torch.float64)
    streams = signals(batch, w, row, layout, None) | signal
    weighed = token_weights(
        batch,
        streams,
        row,
        observe=lambda median: (True, median),
        normaliser="informative",
        mean_weight=None,
        room=ROOM,
        dp_group=None,
    )
    weighed = replace(
        weighed, weights={name: (weights > 0).double() for name, weights in weighed.weights.items()}
    )
    found = []
    for index in range(len(advantages)):
        loss, _, _ = of_tokens(
            w, batch.response_ids, weighed, torch.tensor([index]), row, layout, fused=False
        )
        found.append(-loss.item())
    return found


def golden_credit(all_layouts: list[Layout]) -> None:
    """RLSD, AntiSD, EGRSD, RLCSD: log-ratios come out of logits on vocabulary shards, advantages go
    through weigh and the objective.
    """
    for layout in all_layouts:
        base = -3.0
        table = [
            ((1, 0.1, 0.5), 1.052585),
            ((1, 0.5, 0.5), 1.1),
            ((-1, 0.5, 0.5), -0.9),
            ((-1, -0.1, 0.25), -1.026293),
        ]
        for (a, d, lam), value in table:
            row = RECIPES["rlsd"]
            row = replace(
                row,
                policy_gradient=replace(
                    row.policy_gradient, credit=replace(row.policy_gradient.credit, lam=lam)
                ),
            )
            (found,) = advantages_of(row, tokens(likely(base), likely(base + d)), [a], layout)
            assert abs(found - value) < 6e-7
        u, values = (
            [-20, -2, -0.5, 0, 0.5, 2, 20],
            [-0.346574, -0.283110, -0.109535, 0, 0.140465, 0.716890, 9.653426],
        )
        w = tokens(likely(*(-0.5 - max(x, 0) for x in u)), likely(*(-0.5 + min(x, 0) for x in u)))
        found = advantages_of(RECIPES["antisd"], w, [0.0] * 7, layout)
        # lam 0.5
        assert all(abs(-2 * x - y) < 2e-6 for x, y in zip(found, values, strict=True)), found
        entropy = torch.tensor([0.5, 2.0], dtype=torch.float64)
        w = tokens(likely(base, base), likely(base + 0.1, base + 0.5))
        found = advantages_of(RECIPES["egrsd"], w, [1.0, -1.0], layout, teacher_entropy=entropy)
        assert all(abs(x - y) < 6e-7 for x, y in zip(found, (1.022283, -0.56), strict=True)), found
        w = tokens(likely(base, base, base), likely(base - 0.05, base - 0.05, base + 0.05))
        contrast = {
            "contrast_logp": torch.full((1, 3), base, dtype=torch.float64),
            "contrast_present": torch.ones(1, 3, dtype=torch.bool),
        }
        found = advantages_of(RECIPES["rlcsd"], w, [0.9, 0.3, -0.9], layout, **contrast)
        assert all(abs(x - y) < 6e-7 for x, y in zip(found, (0.406693, 0.0, -0.406693), strict=True)), found


def golden_weights(all_layouts: list[Layout]) -> None:
    """SC-SDPO's weights and GRPO's advantages by their rows, from verdicts; the importance ratio;
    DASH's scan.
    """
    successes = [0, 1, 4, 7, 8]
    w = world([[RIGHT] * k + [WRONG] * (8 - k) for k in successes])
    for kind, expected in {
        "sqrt_pq": [0, 0.854249, 1.291503, 0.854249, 0],
        "pq": [0, 0.7, 1.6, 0.7, 0],
    }.items():
        row = small(replace(RECIPES["sc_sdpo"], question_weight=QuestionWeightConfig(kind=kind)))
        found = step(w, row, alone(all_layouts[0])).token_weights.weights["distill"]
        lens = [len(s.response_ids) for group in w.groups for s in group.samples]
        of_sample = [part.sum().item() * 40 for part in found.split(lens)]
        for j, k in enumerate(successes):
            # a lone success is untaught
            taught = [of_sample[8 * j + i] for i in range(8) if not (k == 0 or (k == 1 and i == 0))]
            assert (
                all(abs(x - expected[j]) < 6e-7 for x in taught)
                and sum(of_sample[8 * j : 8 * j + 8]) - sum(taught) == 0
            )
    advantages = batch_of(
        world([[RIGHT, WRONG, WRONG, RIGHT, WRONG, WRONG, WRONG, WRONG]]).groups, RECIPES["grpo"]
    )[0].streams["advantage"]
    assert all(
        abs(x - y) < 6e-7 for x, y in zip(advantages.unique().tolist(), (-0.540061, 1.620182), strict=True)
    ), advantages
    sdpo = replace(
        RECIPES["sdpo"], teacher=replace(RECIPES["sdpo"].teacher, context="solution"), tis_clip=None
    )
    for layout in all_layouts:
        w = tokens(likely(-2.0, -2.0, -2.0), likely(-1.0, -1.0, -1.0))
        old = -2.0 - torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
        plain, scaled = step(w, small(sdpo), alone(layout)), step(w, small(sdpo), alone(layout), old=old)
        ratios = (scaled.gradient / plain.gradient)[:, 0].tolist()
        assert all(abs(x - y) < 6e-7 for x, y in zip(ratios, (0.367879, 1.349859, 2.0), strict=True)), ratios
    dash = small(
        replace(
            RECIPES["opsd"],
            distill=replace(RECIPES["opsd"].distill, token_weight="scan", token_weight_scale=5.0),
        )
    )
    r = torch.tensor([0.01, 0.02, 0.3, 0.02], dtype=torch.float64)
    w = tokens(likely(-1.0), likely(-1.0))
    sample = replace(w.groups[0].samples[0], response_ids=[0] * 4, response_logps=[0.0] * 4)
    group = Group(w.groups[0].prompt, [sample])
    batch, _ = batch_of([group], dash)
    streams = dict(batch.streams) | {"divergence": r, "distilled": torch.ones(4, dtype=torch.bool)}
    weights = token_weights(
        batch,
        streams,
        dash,
        observe=lambda median: (True, median),
        normaliser="informative",
        mean_weight=None,
        room=ROOM,
        dp_group=None,
    ).weights
    assert abs((weights["distill"] * r).sum().item() - 0.162799) < 6e-7
    # lam_t c_t
    tail = (weights["distill"] * 4)[1:] - 1
    found = tail / (weights["distill"] * 4)[:-1]
    assert all(
        abs(x - y) < 6e-7 for x, y in zip(found.tolist(), (0.595681, 0.583583, 0.256832), strict=True)
    ), found


# ---- identities ----


def uniform_weights(layout: Layout) -> None:
    """SC-SDPO on questions of one pass rate is SDPO, bit for bit. (With all-right questions it is
    not: SDPO learns from them.)
    """
    sc, plain = small(RECIPES["sc_sdpo"]), small(RECIPES["sdpo"])
    for row in (
        [RIGHT, WRONG, WRONG, WRONG],
        [RIGHT, WRONG, RIGHT],
        [WRONG, RIGHT, WRONG, WRONG, RIGHT, WRONG, RIGHT],
    ):
        for questions in (1, 3, 4, 5):
            w = world([row] * questions, seed=questions)
            same(step(w, sc, layout), step(w, plain, layout))
    w = world([*MIXED[:1], *MIXED[:2]])
    apart = step(w, sc, layout), step(w, plain, layout)
    right = torch.tensor([s.verdict is RIGHT for s in w.groups[2].samples])
    lens = [len(s.response_ids) for group in w.groups for s in group.samples]
    last = sum(lens[8:])
    assert right.all() and (apart[0].gradient[-last:] == 0).all() and (apart[1].gradient[-last:] != 0).any()


def ends_are_kl(layout: Layout) -> None:
    """SDPO with alpha 0 and 1 against torch's own KL on the unsharded buckets, and on the whole
    vocabulary.
    """
    w = world(MIXED)
    for beta, support in itertools.product((0.0, 1.0), ("student", "full")):
        found = step(w, small(RECIPES["sdpo"], beta=beta, support=support), layout)
        student = w.student.clone().requires_grad_()
        ids = reference.topk(student.detach() / TEMPERATURE, TOP_K)[0]
        if support == "full":
            s, t = ((x / TEMPERATURE).log_softmax(-1) for x in (student, w.teacher))
        else:
            s, t = (reference.bucket_logprobs(x, ids, temperature=TEMPERATURE) for x in (student, w.teacher))
        # kl_div(input, target) is KL(target || input)
        one, other = (s, t) if beta == 0.0 else (t, s)
        kl = torch.nn.functional.kl_div(one, other, log_target=True, reduction="none").sum(-1)
        targets = torch.tensor(
            [x for group in w.groups for sample in group.samples for x in sample.response_ids]
        )
        mu = torch.tensor(
            [x for group in w.groups for sample in group.samples for x in sample.response_logps]
        )
        engine = (
            (reference.sampled_logp(student.detach(), targets, temperature=TEMPERATURE) - mu)
            .exp()
            .clamp(max=2.0)
        )
        samples = [(group, sample) for group in w.groups for sample in group.samples]
        means = [
            part.mean() for part in (engine * kl).split([len(sample.response_ids) for _, sample in samples])
        ]
        taught = [
            any(s.verdict is RIGHT and s is not sample for s in group.samples) for group, sample in samples
        ]
        expected = sum(mean for mean, told in zip(means, taught, strict=True) if told) / len(samples)
        torch.testing.assert_close(found.loss, expected.detach(), **CLOSE)
        torch.testing.assert_close(found.gradient, torch.autograd.grad(expected, student)[0], **CLOSE)


def whole_support(layout: Layout) -> None:
    """K = V with any tail rule, on any support, is the whole vocabulary: value and gradient, with
    the pointwise clip too.
    """
    w = world(MIXED)
    for beta, clip in itertools.product((0.0, 0.3, 0.5, 1.0), (None, 0.05)):
        full = step(w, small(RECIPES["sdpo"], beta=beta, support="full", pointwise_clip=clip), layout)
        for support, tail in itertools.product(("student", "teacher", "union"), TAILS):
            changes = dict(beta=beta, support=support, tail=tail, top_k=VOCAB, pointwise_clip=clip)
            same(step(w, small(RECIPES["sdpo"], **changes), layout), full, bits=False)


def rlsd_is_grpo(layout: Layout) -> None:
    """A teacher equal to the student, and lambda 0: bit for bit, off policy too. (RLSD's row has no
    engine correction.)
    """
    w = world(MIXED)
    rlsd, grpo = RECIPES["rlsd"], replace(RECIPES["grpo"], tis_clip=RECIPES["rlsd"].tis_clip)
    nothing = replace(
        rlsd,
        policy_gradient=replace(rlsd.policy_gradient, credit=replace(rlsd.policy_gradient.credit, lam=0.0)),
    )
    old = -torch.rand(len(w.student), generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 4
    for before in (None, old):
        plain = step(w, grpo, layout, old=before)
        same(step(replace(w, teacher=w.student.clone()), rlsd, layout, old=before), plain)
        same(step(w, nothing, layout, old=before), plain)
        assert not torch.equal(step(w, rlsd, layout, old=before).gradient, plain.gradient)
    end = at(rlsd, 50, 100)
    # lambda has fallen to 0
    assert end.policy_gradient.credit is None
    same(step(w, end, layout), step(w, grpo, layout))


def other_credits_without_a_word(layout: Layout) -> None:
    """Teacher = student in the other credits: CEPO, RLCSD and AntiSD are GRPO too (token mean), bit
    for bit; log_ratio teaches nothing.
    """
    w = world(MIXED)
    silent = replace(w, teacher=w.student.clone(), contrasts=w.student.expand(2, *w.student.shape).clone())
    for name in ("rlcsd", "antisd"):
        row = RECIPES[name]
        grpo = replace(row, policy_gradient=replace(row.policy_gradient, credit=None), teacher=None)
        same(step(silent, row, layout), step(w, grpo, layout))
    rlsd = RECIPES["rlsd"]
    cepo = replace(
        rlsd,
        policy_gradient=replace(
            rlsd.policy_gradient, credit=replace(rlsd.policy_gradient.credit, kind="cepo")
        ),
    )
    cepo = replace(cepo, teacher=replace(cepo.teacher, contrast="wrong_answer"))
    same(step(silent, cepo, layout), step(w, replace(RECIPES["grpo"], tis_clip=None), layout))
    assert (step(silent, RECIPES["tml_opd"], layout).gradient == 0).all()
    # the margin is still missing
    assert (step(silent, RECIPES["uni_opd"], layout).gradient != 0).any()
    assert (step(silent, RECIPES["minillm"], layout).gradient == 0).all()


def srpo_of_wrong_samples(layout: Layout) -> None:
    """All wrong, all taught: SRPO is entropy-weighted SDPO with the mean over tokens, bit for bit.
    SRPO's one denominator is of tokens, so the identity needs SDPO's aggregation to be token_mean;
    and siblings cannot teach where all are wrong, so both read the solution.
    """
    w = world([[WRONG] * 4] * 3)
    taught = {"teacher": replace(RECIPES["srpo"].teacher, context="solution")}
    srpo = small(replace(RECIPES["srpo"], **taught))
    sdpo = small(
        replace(RECIPES["sdpo"], aggregation="token_mean", **taught),
        token_weight="confidence",
        token_weight_scale=1.0,
    )
    same(step(w, srpo, layout), step(w, sdpo, layout))
    # The weights are exp(-entropy) over their mean.
    targets = torch.zeros(len(w.teacher), dtype=torch.int64)
    confidence = (-read_alone(w.teacher, targets, layout).entropy_T).exp()
    torch.testing.assert_close(
        step(w, srpo, layout).token_weights.weights["distill"], confidence / confidence.sum(), **CLOSE
    )
    # Routed: right samples get GRPO, wrong taught ones SDPO, one denominator for both.
    w, row = world(MIXED), small(RECIPES["srpo"])
    found = step(w, row, layout)
    taken = {name: int((weights > 0).sum()) for name, weights in found.token_weights.weights.items()}
    assert (
        not (
            (found.token_weights.weights["distill"] > 0)
            & (found.token_weights.weights["policy_gradient"] > 0)
        ).any()
        and min(taken.values()) > 0
    )
    in_either = sum(taken.values())
    assert torch.equal(
        found.token_weights.weights["policy_gradient"].unique(),
        torch.tensor([0.0, 1 / in_either], dtype=torch.float64),
    )


def dapo_is_grpo(layout: Layout) -> None:
    """Without dual clip (and dynamic sampling and overlong shaping, which are no part of the row)
    DAPO is GRPO with the token mean.
    """
    w = world(MIXED)
    dapo, grpo = (
        RECIPES["dapo"],
        replace(RECIPES["grpo"], aggregation="token_mean", tis_clip=RECIPES["dapo"].tis_clip),
    )
    plain = replace(dapo, policy_gradient=replace(dapo.policy_gradient, dual_clip=None))
    old = -torch.rand(len(w.student), generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 9
    for before in (None, old):
        same(step(w, plain, layout, old=before), step(w, grpo, layout, old=before))
    # the dual clip acts
    assert not torch.equal(step(w, dapo, layout, old=old).loss, step(w, plain, layout, old=old).loss)


def paced_without_exponents(layout: Layout) -> None:
    """PACED with a = b = 0, whole rows of both: bit for bit what has no question weights, in either
    of its stages.
    """
    w, flat = world(MIXED), replace(RECIPES["paced"].question_weight, a=0.0, b=0.0)
    for name, number in itertools.product(("sdpo_paced", "paced"), (0, 99)):
        row = small(at(RECIPES[name], number, 100))
        unweighted = replace(row, question_weight=QuestionWeightConfig())
        same(step(w, replace(row, question_weight=flat), layout), step(w, unweighted, layout))
        assert not torch.equal(step(w, row, layout).loss, step(w, unweighted, layout).loss)


def equal_teacher(layout: Layout) -> None:
    """Teacher = student: every distillation loss is 0 and so is its gradient. Exactly so on one
    rank, with these exceptions:

    a pointwise clip, or raw sums over the whole vocabulary, leave the rounding of sums that cancel
    in the gradient (1e-15); raw sums over a part of it leave -+ the gradient of the mass on the
    support for KL(T||S) and KL(S||T), whose "+1" does not cancel (OPCD's row): there the statement
    is false for every implementation of the published formula; on two ranks the normalisers of
    student and teacher are added up in different orders: 1e-30 in the value (1e-16 for raw sums,
    which are not quadratic in the difference), 1e-16 in the gradient.
    """
    exact = dist.get_world_size(layout.tp_group) == 1
    gradient_zero = 0.0 if exact else 1e-16
    w = world(MIXED)
    equal = replace(w, teacher=w.student.clone())
    for row in (row for row in rows().values() if row.distill is not None):
        found = step(equal, replace(row, policy_gradient=None, nll=None), layout)
        value_zero = 0.0 if exact else 1e-16 if row.distill.tail == "raw" else 1e-30
        assert abs(found.loss) <= value_zero and found.metrics["taught_tokens"] > 0, (row.recipe, found.loss)
        assert abs(found.metrics["loss"]) <= value_zero and abs(found.metrics["divergence"]) <= value_zero
        if row.distill.tail != "raw":
            assert found.gradient.abs().max() <= (1e-15 if row.distill.pointwise_clip else gradient_zero), (
                row.recipe
            )
    base = replace(small(RECIPES["sdpo"]), tis_clip=None)
    for support, tail, kind in itertools.product(
        ("student", "teacher", "union"), TAILS, (0.0, 0.3, 0.5, 1.0, "adaptive")
    ):
        # refused by validation: where the two agree, its weights are the ratio of two roundings
        if (tail, kind) == ("raw", "adaptive"):
            continue
        changes = dict(support=support, tail=tail) | (
            {"divergence": kind} if kind == "adaptive" else {"beta": kind}
        )
        found = step(equal, small(base, **changes), layout)
        assert abs(found.loss) <= (0.0 if exact else 1e-16 if tail == "raw" else 1e-30), changes
        if tail != "raw" or kind in (0.3, 0.5):
            assert found.gradient.abs().max() <= gradient_zero, changes
            continue
        student = w.student.clone().requires_grad_()
        ids = reference.topk(student.detach(), TOP_K)[0]
        mass = reference.bucket_logprobs(student, ids, temperature=TEMPERATURE, tail="raw").exp().sum(-1)
        (expected,) = torch.autograd.grad((mass * found.token_weights.weights["distill"]).sum(), student)
        sign = {0.0: -1.0, 1.0: 1.0}[kind]
        torch.testing.assert_close(found.gradient, sign * expected, rtol=1e-11, atol=1e-16)


IDENTITIES: tuple[Callable[[Layout], None], ...] = (
    uniform_weights,
    ends_are_kl,
    whole_support,
    rlsd_is_grpo,
    other_credits_without_a_word,
    srpo_of_wrong_samples,
    dapo_is_grpo,
    paced_without_exponents,
    equal_teacher,
)


def every_row(all_layouts: list[Layout]) -> int:
    """Every recipe: fused is unfused; tensor and data parallelism, microbatches and the dealing of
    samples leave loss, gradient, metrics and weights as they are in one process. Bits of single
    tokens go with the machine's vector units, so: to 1e-12.
    """
    w, count = world(MIXED), 0
    old = -torch.rand(len(w.student), generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 4
    for name, row in rows().items():
        before = old if name in ("grpo", "gspo", "sdpo", "minillm") else None
        for layout in all_layouts:
            whole = step(w, row, alone(layout), old=before)
            assert (
                math.isfinite(whole.loss) and whole.gradient.isfinite().all() and (whole.gradient != 0).any()
            ), name
            torch.testing.assert_close(whole.metrics["loss"], whole.loss.item(), rtol=1e-9, atol=1e-12)
            for microbatches, fused in ((1, True), (2, False), (4, True)):
                part = step(w, row, layout, microbatches=microbatches, fused=fused, old=before)
                torch.testing.assert_close(
                    part.loss, whole.loss, **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
                )
                torch.testing.assert_close(
                    part.gradient, whole.gradient, **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
                )
                assert (
                    part.metrics.keys() == whole.metrics.keys()
                    and part.token_weights.metrics == whole.token_weights.metrics
                ), name
                for metric, value in part.metrics.items():
                    torch.testing.assert_close(
                        value,
                        whole.metrics[metric],
                        **CLOSE,
                        msg=lambda m, where=(name, metric): f"{where}: {m}",
                    )
                for term, weights in part.token_weights.weights.items():
                    torch.testing.assert_close(
                        weights, whole.token_weights.weights[term][part.places], **CLOSE
                    )
                    if row.distill is None or row.distill.token_weight == "none":
                        assert torch.equal(weights, whole.token_weights.weights[term][part.places]), name
                count += 1
    return count


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    all_layouts = layouts()
    cases: list[tuple[str, Callable[[], object]]] = []
    if dist.get_world_size() <= 2:
        cases += [
            (case.__name__, lambda case=case: case(all_layouts))
            for case in (golden_divergences, golden_credit, golden_weights)
        ]
        cases += [(case.__name__, lambda case=case: case(alone(all_layouts[0]))) for case in IDENTITIES]
    cases.append(("every_row", lambda: every_row(all_layouts)))
    for name, case in cases:
        found = case()
        if dist.get_rank() == 0:
            print(f"passed {name}" + (f" {found}" if found is not None else ""), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
