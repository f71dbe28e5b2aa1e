"""2,000 random readouts of extreme logits: +-1e4, -inf on one or both sides, one-hot rows, equal
rows, tiny vocabularies.

Proves: nothing is ever NaN, a Jensen-Shannon divergence lies in [0, ln 2], an entropy in [0, ln V],
padded columns get gradient 0. Does not prove: ranks without a possible token
(tests/distributed/test_ops.py), accuracy (test_divergence.py).
"""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasd.loss.divergence import divergence
from megasd.ops.vocab_parallel import TAILS, LogProbsSpec, vocab_parallel_logprobs

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1e4, -1e4, -math.inf, 88.0, -104.0, 1e-30]), st.floats(-30, 30, width=32)
)


@st.composite
def pairs(draw):
    """Logits of student and teacher, [T, V]; every row has a possible token."""
    vocab, tokens = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    sides = []
    for _ in range(2):
        rows = []
        for _ in range(tokens):
            kind = draw(st.sampled_from(["any", "any", "equal", "one-hot"]))
            row = draw(st.lists(NUMBERS, min_size=vocab, max_size=vocab))
            if kind == "equal":
                row = [draw(st.sampled_from([0.0, 1e4, -1e4]))] * vocab
            elif kind == "one-hot":
                row = [-math.inf] * vocab
            row[draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([0.0, 1e4, 3.0]))
            rows.append(row)
        sides.append(rows)
    return sides


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sides=pairs(),
    support=st.sampled_from(["student", "teacher", "union", "full"]),
    k=st.integers(1, 12),
    tail=st.sampled_from(TAILS),
    beta=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    clip=st.sampled_from([None, None, 0.05]),
    temperature=st.sampled_from([1.0, 0.5]),
    wide=st.booleans(),
    padding=st.integers(0, 3),
)
def test_never_nan(sides, support, k, tail, beta, clip, temperature, wide, padding):
    dtype = torch.float64 if wide else torch.float32
    student, teacher = (
        torch.nn.functional.pad(torch.tensor(rows, dtype=dtype), (0, padding), value=1e5) for rows in sides
    )
    student.requires_grad_()
    tokens, vocab = student.shape[0], student.shape[1] - padding
    spec = LogProbsSpec(vocab, support, k, tail, beta=beta, clip=clip, temperature=temperature)
    readout = vocab_parallel_logprobs(
        student, teacher, torch.zeros(tokens, dtype=torch.int64), spec, tp_group=None
    )
    loss = readout.divergence_T
    if loss is None:
        loss = divergence(
            readout.student_logq_TB, readout.teacher_logq_TB, beta=beta, normalised=tail != "raw", clip=clip
        )
    assert not loss.isnan().any() and not readout.logp_T.isnan().any()
    assert ((readout.entropy_T >= -1e-6) & (readout.entropy_T <= math.log(vocab) + 1e-5)).all()
    plain = clip is not None or (tail == "raw" and support != "full")
    if 0 < beta < 1:
        assert ((loss >= 0) & (loss <= math.log(2) + 1e-6)).all()
    elif not plain:
        assert (loss >= 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert not grad.isnan().any() and (grad[:, vocab:] == 0).all()
    if 0 < beta < 1:
        assert grad.isfinite().all()
