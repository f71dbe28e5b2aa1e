"""Divergences and buckets in one process: golden vectors, the float64 twin, gradients, tiny and
extreme inputs.

Proves: values and closed-form gradients of the readout (buckets -> divergence, exact divergence,
target, entropy) equal autograd through the direct formulas of tests/reference.py. Does not prove:
anything about ranks (tests/distributed/test_ops.py) or speed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megasd.config.schema import DistillTerm
from megasd.config.variants import DIVERGENCE_TRAITS
from megasd.loss.divergence import DIVERGENCES, adaptive, divergence, head_gaps
from megasd.ops.divergence_terms import divergence_terms
from megasd.ops.vocab_parallel import TAILS, LogProbsSpec, TeacherRecord, vocab_parallel_logprobs
from tests import reference

# Golden vectors: computed from the published definitions by an independent script, six decimals.
STUDENT = torch.tensor([[2.0, 1.0, 0.5, -1.0, -2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 2.5, 0.0, -0.5, -3.0]], dtype=torch.float64)
GOLDEN_FULL = {0.0: 0.770548, 0.1: 0.068074, 0.5: 0.187417, 0.9: 0.074210, 1.0: 0.868531}
GOLDEN_TOP2 = {
    ("bucket", 0.0): 0.758470,
    ("bucket", 0.5): 0.183910,
    ("bucket", 1.0): 0.851202,
    ("renormalise", 0.0): 0.828725,
    ("renormalise", 0.5): 0.208126,
    ("renormalise", 1.0): 1.006842,
    ("raw", 1.0): 0.764220,
}
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def read(student, teacher=None, targets=None, *, vocab_size=None, **options):
    spec = LogProbsSpec(vocab_size=vocab_size or student.shape[1], **options)
    return vocab_parallel_logprobs(student, teacher, targets, spec, tp_group=None)


def on_support(student, teacher, k, *, beta, tail, vocab_size=None, temperature=1.0, support="student"):
    options = dict(
        vocab_size=vocab_size,
        support=support,
        top_k=k,
        tail=tail,
        temperature=temperature,
        teacher_temperature=temperature,
    )
    readout = read(student, teacher, **options)
    return divergence(readout.student_logq_TB, readout.teacher_logq_TB, beta=beta, normalised=tail != "raw")


def full(student, teacher, *, beta, vocab_size=None, temperature=1.0):
    options = dict(support="full", beta=beta, temperature=temperature, teacher_temperature=temperature)
    return read(student, teacher, vocab_size=vocab_size, **options).divergence_T


def entropy(x, *, vocab_size):
    return read(x, vocab_size=vocab_size, support="none").entropy_T


@pytest.mark.parametrize("beta", GOLDEN_FULL)
def test_golden_full(beta):
    assert full(STUDENT, TEACHER, beta=beta).item() == pytest.approx(GOLDEN_FULL[beta], abs=6e-7)


@pytest.mark.parametrize("tail,beta", GOLDEN_TOP2)
def test_golden_top2(tail, beta):
    assert on_support(STUDENT, TEACHER, 2, beta=beta, tail=tail).item() == pytest.approx(
        GOLDEN_TOP2[tail, beta], abs=6e-7
    )


def test_golden_summands():
    """Of KL(T||S); with the pointwise clip at 0.05 the gap token is cut and gets no gradient
    (OPSD), and the sum turns negative.
    """
    s, t = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    summands, _ = divergence_terms(s, t, beta=0.0, normalised=False)
    assert summands[0].tolist() == pytest.approx(
        [-0.184566, 0.996030, -0.047377, 0.010427, -0.003966], abs=6e-7
    )
    clipped, slope = divergence_terms(s, t, beta=0.0, normalised=False, clip=0.05)
    assert clipped.sum().item() == pytest.approx(-0.175482, abs=6e-7) and (slope[0] == 0).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert read(STUDENT, TEACHER, support="full", beta=0.0, clip=0.05).divergence_T.item() == pytest.approx(
        -0.175482, abs=6e-7
    )


def logits(num_tokens, vocab, seed, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_tokens, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def with_padding(x, columns=3, value=1e4):
    return torch.cat([x.detach(), torch.full((x.shape[0], columns), value, dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_equal_the_twin(beta, tail, temperature):
    """Padded columns hold garbage and get gradient zero."""
    vocab = 23
    student, teacher = logits(9, vocab, 0).requires_grad_(), logits(9, vocab, 1)
    upstream = logits(9, 1, 2)[:, 0]
    for k in (1, 3, vocab - 1, vocab):
        padded = with_padding(student).requires_grad_()
        loss = on_support(
            padded,
            with_padding(teacher, value=-7.0),
            k,
            beta=beta,
            tail=tail,
            vocab_size=vocab,
            temperature=temperature,
        )
        (grad,) = torch.autograd.grad(loss, padded, upstream)
        ids, _ = reference.topk(student, k)
        # an empty tail adds nothing
        expected_tail = "raw" if k == vocab and tail == "bucket" else tail
        s, t = (
            reference.bucket_logprobs(x, ids, temperature=temperature, tail=expected_tail)
            for x in (student, teacher)
        )
        expected = reference.divergence(s, t, beta=beta)
        (expected_grad,) = torch.autograd.grad(expected, student, upstream)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[:, :vocab], expected_grad, rtol=0, atol=1e-12)
        assert (grad[:, vocab:] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_full_equals_the_twin_and_the_whole_support(beta):
    student, teacher = logits(7, 19, 3).requires_grad_(), logits(7, 19, 4).requires_grad_()
    padded = with_padding(student).requires_grad_()
    loss = full(padded, with_padding(teacher), beta=beta, vocab_size=19, temperature=1.3)
    expected = reference.full_divergence(student, teacher, beta=beta, temperature=1.3)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), padded)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(grad[:, :19], expected_grad, rtol=0, atol=1e-12)
    assert (grad[:, 19:] == 0).all()
    whole = on_support(student, teacher, 19, beta=beta, tail="bucket", temperature=1.3)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


def test_sampled_logp_and_entropy_equal_the_twin():
    x = logits(11, 17, 5).requires_grad_()
    targets = torch.randint(17, (11,), generator=torch.Generator().manual_seed(0))
    padded = with_padding(x).requires_grad_()
    logp = read(padded, None, targets, vocab_size=17, support="none", temperature=0.8).logp_T
    expected = reference.sampled_logp(x, targets, temperature=0.8)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    upstream = logits(11, 1, 6)[:, 0]
    torch.testing.assert_close(
        torch.autograd.grad(logp, padded, upstream)[0][:, :17],
        torch.autograd.grad(expected, x, upstream)[0],
        rtol=0,
        atol=1e-12,
    )
    torch.testing.assert_close(entropy(padded, vocab_size=17), reference.entropy(x), rtol=0, atol=1e-12)
    one_hot = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -1e4]])
    torch.testing.assert_close(entropy(one_hot, vocab_size=3), torch.tensor([0.0, math.log(2)]))


def tails_of(name):
    """The values of distill.tail that a divergence takes."""
    return [tail for tail in TAILS if tail != "raw" or not DIVERGENCE_TRAITS[name].needs_normalised_buckets]


def test_every_divergence_has_a_twin():
    assert set(reference.DIVERGENCES) == set(DIVERGENCES)
    for name, twin in reference.DIVERGENCES.items():
        assert all(term.divergence == name for term, _ in twin.cases), f"a case of {name} names another one"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_its_golden_value(name):
    for term, golden in reference.DIVERGENCES[name].cases:
        found = DIVERGENCES[name](
            STUDENT.log_softmax(-1), TEACHER.log_softmax(-1), replace(term, tail="renormalise")
        )
        assert golden is None or found.item() == pytest.approx(golden, abs=6e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_every_divergence_equals_its_twin(name, support):
    """Value and gradient in the student's logits, for every tail that it takes; where the teacher is
    the student, a divergence of normalised buckets is 0 and so is its gradient.
    """
    student, teacher = logits(7, 11, 40).requires_grad_(), logits(7, 11, 41)
    upstream, twin_of = logits(7, 1, 42)[:, 0], reference.DIVERGENCES[name].of_buckets
    for (case, _), tail in itertools.product(reference.DIVERGENCES[name].cases, tails_of(name)):
        term = replace(case, tail=tail)
        options = dict(support=support, top_k=4, tail=tail, temperature=0.9, teacher_temperature=0.9)
        found = of_term(read(student, teacher, **options), term)
        rows = []
        for s, t, ids in zip(student, teacher, twin_ids(student, teacher, support, 4), strict=True):
            s, t = (reference.bucket_logprobs(x[None], ids[None], temperature=0.9, tail=tail) for x in (s, t))
            rows.append(twin_of(s, t, term))
        expected = torch.cat(rows)
        named = lambda text, term=term: f"{term}: {text}"  # noqa: E731
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=named)
        grads = [torch.autograd.grad(x, student, upstream)[0] for x in (found, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12, msg=named)
        if tail != "raw" and term.pointwise_clip is None:
            equal = of_term(read(student, student.detach().clone(), **options), term)
            (grad,) = torch.autograd.grad(equal.sum(), student)
            message = f"{term} is not 0 where the teacher is the student"
            limit = reference.DIVERGENCES[name].rounding
            assert equal.abs().max() <= limit and grad.abs().max() <= limit, message


def of_term(readout, term: DistillTerm):
    return DIVERGENCES[term.divergence](readout.student_logq_TB, readout.teacher_logq_TB, term)


KINDS = [0.0, 0.3, 0.5, 1.0, "adaptive"]


def twin_ids(student, teacher, support, k):
    """Ids of every row's support, as a list of rows: a union's rows differ in length."""
    own, other = (reference.topk(x.detach(), k)[0] for x in (student, teacher))
    if support == "union":
        return [reference.union(a, b) for a, b in zip(own, other, strict=True)]
    return list(own if support == "student" else other)


def twin(student, teacher, ids, kind, tail, clip=None):
    rows = []
    for s, t, chosen in zip(student, teacher, ids, strict=True):
        s, t = (reference.bucket_logprobs(x[None], chosen[None], temperature=0.9, tail=tail) for x in (s, t))
        if kind == "adaptive":
            rows.append(reference.adaptive(s, t, last_is_tail=tail == "bucket"))
        else:
            rows.append(reference.divergence(s, t, beta=kind, clip=clip))
    return torch.cat(rows)


def of_readout(readout, kind, tail, clip=None):
    buckets = readout.student_logq_TB, readout.teacher_logq_TB
    if kind == "adaptive":
        return adaptive(*buckets, tail=tail)
    return divergence(*buckets, beta=kind, normalised=tail != "raw", clip=clip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", ["student", "teacher", "union", "record"])
def test_gradcheck(support, tail, kind):
    """Against the unsharded twin and against finite differences, which know no twin; with the
    pointwise clip and the target too.

    Adaptive: the gap's shares are constants, which finite differences of the whole would not see,
    so those of its two parts are taken.
    """
    student, teacher = logits(2, 6, 7, scale=1.5).requires_grad_(), logits(2, 6, 8, scale=1.5)
    ids = twin_ids(student, teacher, support, 3)
    targets, given, upstream = torch.tensor([0, 4]), teacher, logits(2, 1, 9)[:, 0]
    if support == "record":
        logq = reference.bucket_logprobs(teacher, torch.stack(ids), temperature=0.9)
        given = TeacherRecord(torch.stack(ids).int(), logq[:, :-1].contiguous(), logq[:, -1].contiguous())
    options = dict(support=support, top_k=3, tail=tail, temperature=0.9, teacher_temperature=0.9)
    for clip in (None, 0.05) if kind != "adaptive" else (None,):

        def loss(z, clip=clip, kind=kind):
            readout = read(z, given, targets, **options)
            return of_readout(readout, kind, tail, clip) + 0.1 * readout.logp_T

        expected = twin(student, teacher, ids, kind, tail, clip) + 0.1 * reference.sampled_logp(
            student, targets, temperature=0.9
        )
        torch.testing.assert_close(loss(student), expected, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(x, student, upstream)[0] for x in (loss(student), expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        if kind != "adaptive":
            assert torch.autograd.gradcheck(loss, student)
            continue
        head, rest = head_gaps(
            read(student, given, **options).student_logq_TB,
            read(student, given, **options).teacher_logq_TB,
            tail=tail,
        )
        share = head / (head + rest)

        def fixed(z, share=share):
            return share * loss(z, kind=0.0) + (1 - share) * loss(z, kind=1.0)

        assert torch.autograd.gradcheck(fixed, student)
        torch.testing.assert_close(
            torch.autograd.grad(fixed(student), student, upstream)[0], grads[0], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_of_the_whole_vocabulary(beta):
    student, teacher = logits(4, 8, 7, scale=1.5).requires_grad_(), logits(4, 8, 8, scale=1.5)
    for clip in (None, 0.05):
        options = dict(support="full", beta=beta, clip=clip, temperature=0.9, teacher_temperature=0.9)
        assert torch.autograd.gradcheck(
            lambda z, options=options: read(z, teacher, **options).divergence_T, student
        )
        expected = reference.full_divergence(student, teacher, beta=beta, temperature=0.9, clip=clip)
        grads = [
            torch.autograd.grad(x.sum(), student)[0]
            for x in (read(student, teacher, **options).divergence_T, expected)
        ]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_adaptive_by_hand():
    """Golden logits: the head is token 1 alone (mass 0.79); shares from the gaps; KLs are golden vectors."""
    s, t = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    head, rest = head_gaps(s, t, tail="raw")
    assert head.item() == pytest.approx(0.786600 - 0.221733, abs=2e-6)
    assert rest.item() == pytest.approx(
        0.602732 - 0.106455 + 0.134488 - 0.064568 + 0.039163 - 0.030008 + 0.011039 - 0.003215, abs=4e-6
    )
    share = head.item() / (head + rest).item()
    expected = share * GOLDEN_FULL[0.0] + (1 - share) * GOLDEN_FULL[1.0]
    assert adaptive(s, t, tail="raw").item() == pytest.approx(expected, abs=1e-6)
    # A tail bucket heavier than any token of the support joins the head last, and only if half of
    # the mass is not reached without it.
    logq = torch.tensor([[0.3, 0.25, 0.45]], dtype=torch.float64).log()
    other = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64).log()
    assert head_gaps(other, logq)[1].item() == pytest.approx(0.15) and head_gaps(
        other, logq, tail="renormalise"
    )[1].item() == pytest.approx(0.05)


def test_adaptive_at_the_edges():
    """Equal: 0 and gradient 0. Impossible tokens: never NaN."""
    for tail in TAILS:
        x = logits(16, 40, 9).requires_grad_()
        readout = read(x, x.detach().clone(), support="teacher", top_k=5, tail=tail)
        loss = of_readout(readout, "adaptive", tail)
        assert (loss == 0).all()
        if tail != "raw":
            assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()
    student, teacher = (
        torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log(),
        torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]).log(),
    )
    assert not adaptive(student, teacher).isnan().any()


@pytest.mark.parametrize("beta", BETAS)
def test_pointwise_clip(beta):
    """Every summand is cut from above and loses its gradient there; without effect it changes
    nothing; buckets and full alike.
    """
    student, teacher = logits(9, 12, 30).requires_grad_(), logits(9, 12, 31)
    for clip in (0.02, 50.0):
        expected = reference.full_divergence(student, teacher, beta=beta, clip=clip)
        found = read(student, teacher, support="full", beta=beta, clip=clip).divergence_T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        for tail in TAILS:
            readout = read(student, teacher, support="teacher", top_k=4, tail=tail)
            loss = divergence(
                readout.student_logq_TB,
                readout.teacher_logq_TB,
                beta=beta,
                normalised=tail != "raw",
                clip=clip,
            )
            ids, _ = reference.topk(teacher, 4)
            s, t = (reference.bucket_logprobs(x, ids, tail=tail) for x in (student, teacher))
            expected = reference.divergence(s, t, beta=beta, clip=clip)
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
            grads = [torch.autograd.grad(x.sum(), student)[0] for x in (loss, expected)]
            torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_in_place_gradient_and_a_second_backward():
    """The gradient lands in the logits' own storage, once."""
    x, y = logits(5, 40, 32, dtype=torch.float32), logits(5, 40, 33, dtype=torch.float32)
    spec = LogProbsSpec(vocab_size=38, top_k=6)

    def loss_of(z, in_place):
        readout = vocab_parallel_logprobs(z, y, None, spec, tp_group=None, in_place=in_place)
        return divergence(readout.student_logq_TB, readout.teacher_logq_TB, beta=0.5, normalised=True).sum()

    apart = x.clone().requires_grad_()
    loss_of(apart, False).backward()
    leaf = x.clone().requires_grad_()
    storage, loss = leaf.data_ptr(), loss_of(leaf, True)
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert grad.data_ptr() == storage and torch.equal(grad, apart.grad)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_teacher_equal_to_student_is_exactly_zero(dtype, beta):
    for tail in TAILS:
        x = logits(16, 40, 9, dtype=dtype).requires_grad_()
        loss = on_support(x, x.detach().clone(), 5, beta=beta, tail=tail)
        assert (loss == 0).all()
        (grad,) = torch.autograd.grad(loss.sum(), x)
        # the truncated KLs do have a gradient there: their "+1" does not cancel
        if tail != "raw" or 0 < beta < 1:
            assert (grad == 0).all()
    x = logits(16, 40, 9, dtype=dtype).requires_grad_()
    loss = full(x, x.detach().clone(), beta=beta)
    assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_more_support_never_lowers_the_divergence():
    """Buckets are a coarser view, so their divergence is a lower bound that grows with K (data
    processing).
    """
    student, teacher = logits(50, 30, 10), logits(50, 30, 11)
    for beta in BETAS:
        rows = [on_support(student, teacher, k, beta=beta, tail="bucket") for k in (1, 2, 5, 12, 29, 30)]
        for smaller, larger in zip(rows, rows[1:], strict=False):
            assert (larger >= smaller - 1e-14).all()
        torch.testing.assert_close(rows[-1], full(student, teacher, beta=beta), rtol=0, atol=1e-13)


def test_the_ends_are_limits_only_after_division():
    student, teacher = logits(20, 30, 12, scale=1.0), logits(20, 30, 13, scale=1.0)
    small = 1e-7
    torch.testing.assert_close(
        full(student, teacher, beta=small) / small, full(student, teacher, beta=0.0), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        full(student, teacher, beta=1 - small) / small, full(student, teacher, beta=1.0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "noise,loss_tolerance,grad_tolerance", [(1.0, 2e-5, 1e-4), (0.1, 1e-4, 1e-3), (0.01, 1e-3, 1e-2)]
)
def test_float32_keeps_tiny_divergences(beta, noise, loss_tolerance, grad_tolerance):
    """Truth: float64 on the same float32 logits. The published 1 - sum formula is wrong by tens of
    percent here, and goes negative.
    """
    student = logits(256, 4096, 14, scale=2.0, dtype=torch.float32)
    # from flat to nearly certain: tiny tails
    student[:, 0] += torch.linspace(0, 25, 256)
    teacher = student + logits(256, 4096, 15, scale=noise, dtype=torch.float32)
    for function in (
        lambda s, t: on_support(s, t, 100, beta=beta, tail="bucket"),
        lambda s, t: full(s, t, beta=beta),
    ):
        x, wide = student.clone().requires_grad_(), student.double().requires_grad_()
        loss, truth = function(x, teacher), function(wide, teacher.double())
        assert (loss >= 0).all()
        error = (loss.double() - truth).abs() / truth
        assert error.quantile(0.99).item() < loss_tolerance
        grad, truth_grad = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(truth.sum(), wide)[0]
        rows = (grad.double() - truth_grad).norm(dim=1) / truth_grad.norm(dim=1)
        assert rows.quantile(0.99).item() < grad_tolerance


def test_log_tail_is_exact_when_tiny():
    x = logits(200, 1000, 16, scale=2.0, dtype=torch.float32)
    x[:, 0] += torch.linspace(0, 60, 200)
    readout = read(x, top_k=10)
    tail, truth = readout.student_logq_TB[:, -1], reference.bucket_logprobs(x, readout.ids_TA)[:, -1]
    assert ((tail.double() - truth).abs() / truth.abs().clamp(min=1)).max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(beta, dtype):
    """+-1e4, all equal, one-hot against one-hot, the largest floats: finite values and gradients,
    JSD at most ln 2.
    """
    rows = torch.zeros(6, 12, dtype=dtype)
    rows[0, 0], rows[1, 0], rows[2, 5], rows[3] = 1e4, -1e4, 1e4, torch.linspace(-1e4, 1e4, 12)
    rows[4] = 3e38 if dtype == torch.float32 else 1e300
    teacher = rows.roll(1, 0)
    for tail in TAILS:
        x = rows.clone().requires_grad_()
        loss = on_support(x, teacher, 4, beta=beta, tail=tail)
        assert loss.isfinite().all()
        if tail != "raw":
            assert (loss >= 0).all()
        if 0 < beta < 1:
            assert (loss <= math.log(2) + 1e-6).all()
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()
    x = rows.clone().requires_grad_()
    loss = full(x, teacher, beta=beta)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta):
    """-inf columns on both sides, on one side, and in the whole tail: never NaN; infinite KLs are
    +inf, KL(T||S) with finite gradient.
    """
    student, teacher = logits(4, 10, 17), logits(4, 10, 18)
    # both
    student[0, 3:], teacher[0, 3:] = -torch.inf, -torch.inf
    # KL(T||S) is infinite
    student[1, 4] = -torch.inf
    # KL(S||T) is infinite
    teacher[2, 6] = -torch.inf
    for function in (
        lambda s, t: on_support(s, t, 9, beta=beta, tail="bucket"),
        lambda s, t: full(s, t, beta=beta),
    ):
        x = student.clone().requires_grad_()
        loss = function(x, teacher)
        assert not loss.isnan().any() and (loss >= 0).all()
        assert loss[[0, 3]].isfinite().all()
        assert (loss[1] == torch.inf) == (beta == 0)
        assert (loss[2] == torch.inf) == (beta == 1)
        grad = torch.autograd.grad(loss.sum(), x)[0]
        assert grad[[0, 1, 3]].isfinite().all()
    small = on_support(student[:1, :3].clone(), teacher[:1, :3], 2, beta=beta, tail="bucket")
    masked = on_support(student[:1], teacher[:1], 2, beta=beta, tail="bucket")
    torch.testing.assert_close(small, masked, rtol=0, atol=1e-14)


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = logits(8, 64, 19, dtype=torch.bfloat16), logits(8, 64, 20, dtype=torch.bfloat16)
    x = student.clone().requires_grad_()
    loss = on_support(x, teacher, 8, beta=0.5, tail="bucket")
    assert loss.dtype == torch.float32
    wide = student.double().requires_grad_()
    truth = on_support(wide, teacher.double(), 8, beta=0.5, tail="bucket")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    (grad,), (truth_grad,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(truth.sum(), wide)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), truth_grad, rtol=5e-3, atol=1e-6)


def test_teacher_gets_no_gradient():
    student, teacher = logits(3, 9, 21).requires_grad_(), logits(3, 9, 22).requires_grad_()
    for loss in (on_support(student, teacher, 4, beta=0.5, tail="bucket"), full(student, teacher, beta=0.5)):
        assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True)[0] is None


def test_no_tokens():
    empty = torch.zeros(0, 6, requires_grad=True)
    loss = on_support(empty, empty.detach(), 2, beta=0.5, tail="bucket")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert full(empty, empty.detach(), beta=0.5).shape == (0,) and entropy(empty, vocab_size=6).shape == (0,)


@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_topk_is_a_total_order(k):
    """Rounded logits tie at the boundary in most rows; equal values go by ascending id, and so do
    -inf columns.
    """
    x = logits(300, 40, 23, scale=1.0).mul(2).round().div(2)
    x[:10] = 0.0
    x[10:20, 2:] = -torch.inf
    for dtype in (torch.float64, torch.bfloat16):
        readout = read(with_padding(x.to(dtype)), vocab_size=40, top_k=k, tail="raw")
        assert torch.equal(readout.ids_TA, reference.topk(x, k)[0])


def test_bad_arguments_are_named():
    x = logits(2, 5, 24)
    for match, options in {
        "top_k must be 1 or more": {"top_k": 0},
        "do not hold a vocabulary of 6": {"vocab_size": 6},
        "tail must be one of": {"tail": "none"},
        "support must be one of": {"support": "nobody"},
        "beta": {"beta": 1.5},
        "temperature": {"temperature": 0.0},
        "needs the teacher's logits": {"support": "full", "teacher": None},
        "a record goes with": {"support": "record"},
        "differ in shape": {"teacher": x[:, :4]},
    }.items():
        options = {"teacher": x} | options
        with pytest.raises(ValueError, match=match):
            read(x, options.pop("teacher"), **options)
    with pytest.raises(ValueError, match="beta"):
        divergence_terms(x, x, beta=-0.1, normalised=True)
