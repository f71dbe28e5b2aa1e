"""Unsharded float64 twins of the operations of ops/ and loss/, for tests only: the definition,
written as directly as torch allows.

T tokens, V whole vocabulary (no padding), K top-k, B buckets = K + 1. Gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.config.schema import DistillTerm


def topk(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids_TK and values_TK in the total order (value descending, id ascending)."""
    values, ids = logits_TV.double().sort(dim=-1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def bucket_logprobs(
    logits_TV: Tensor, ids_TK: Tensor, *, temperature: float = 1.0, tail: str = "bucket"
) -> Tensor:
    """Log-probabilities of the chosen ids, and of all the rest when `tail` is "bucket": [T, K + 1]
    or [T, K].
    """
    logp_TV = (logits_TV.double() / temperature).log_softmax(-1)
    chosen_TK = logp_TV.gather(1, ids_TK)
    if tail == "raw":
        return chosen_TK
    if tail == "renormalise":
        return chosen_TK.log_softmax(-1)
    # nothing is left: autograd through an empty logsumexp gives NaN
    if ids_TK.shape[1] == logits_TV.shape[1]:
        return torch.cat([chosen_TK, torch.full_like(chosen_TK[:, :1], -torch.inf)], dim=-1)
    rest_T = logp_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1)
    return torch.cat([chosen_TK, rest_T[:, None]], dim=-1)


def divergence(
    student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, beta: float, clip: float | None = None
) -> Tensor:
    """KL(T||S) at beta 0, KL(S||T) at beta 1, else beta KL(T||M) + (1 - beta) KL(S||M) with M =
    beta T + (1 - beta) S: [T].

    clip: upper bound of each bin's summand.
    """
    s, t = student_logq_TB.double(), teacher_logq_TB.double().detach()
    if beta == 0:
        summands = t.exp() * (t - s)
    elif beta == 1:
        summands = s.exp() * (s - t)
    else:
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        summands = beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)
    return (summands if clip is None else summands.clamp(max=clip)).sum(-1)


def adaptive(student_logq_TB: Tensor, teacher_logq_TB: Tensor, *, last_is_tail: bool) -> Tensor:
    """Shares of KL(T||S) and KL(S||T) by the gaps |T - S| over the teacher's head (half of its
    mass) and over the rest: [T].
    """
    rows = []
    for s, t in zip(student_logq_TB.double(), teacher_logq_TB.double().detach(), strict=True):
        order = sorted(range(len(t)), key=lambda b: (last_is_tail and b == len(t) - 1, -t[b].item(), b))
        head, mass = [], 0.0
        for b in order:
            if mass < 0.5:
                head.append(b)
            mass += t[b].exp().item()
        gap = (t.exp() - s.detach().exp()).abs()
        share = gap[head].sum() / gap.sum()
        forward, reverse = divergence(s[None], t[None], beta=0.0), divergence(s[None], t[None], beta=1.0)
        rows.append(share * forward + (1 - share) * reverse)
    return torch.cat(rows)


@dataclass(frozen=True)
class DivergenceTwin:
    """What the tests of every divergence compare loss/divergence.py with."""

    # (student_logq_TB, teacher_logq_TB, term) -> [T], float64; a bucket for the tail is the last one
    of_buckets: Callable[[Tensor, Tensor, DistillTerm], Tensor]
    # constants with which it is compared; and the value on five buckets that test_divergence.py
    # names STUDENT and TEACHER, from an independent script (None: unknown)
    cases: tuple[tuple[DistillTerm, float | None], ...]
    # The rounding error (nats) that value and gradient may have where the teacher is the student.
    rounding: float = 1e-15


def _mixture(student_logq_TB: Tensor, teacher_logq_TB: Tensor, term: DistillTerm) -> Tensor:
    return divergence(student_logq_TB, teacher_logq_TB, beta=term.beta, clip=term.pointwise_clip)


def _adaptive(student_logq_TB: Tensor, teacher_logq_TB: Tensor, term: DistillTerm) -> Tensor:
    return adaptive(student_logq_TB, teacher_logq_TB, last_is_tail=term.tail == "bucket")


# One row for each row of loss/divergence.py: DIVERGENCES. test_divergence.py and, on 1, 2 and 4
# tensor-parallel ranks, tests/distributed/ops_cases.py compare value and gradient of every row.
DIVERGENCES: dict[str, DivergenceTwin] = {
    "mixture": DivergenceTwin(
        _mixture,
        (
            (DistillTerm(beta=0.0), 0.770548),
            (DistillTerm(beta=0.5), 0.187417),
            (DistillTerm(beta=0.9), 0.074210),
            (DistillTerm(beta=1.0), 0.868531),
            (DistillTerm(beta=0.0, pointwise_clip=0.05), -0.175482),
        ),
    ),
    "adaptive": DivergenceTwin(_adaptive, ((DistillTerm(divergence="adaptive"), None),)),
}


def full_divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    clip: float | None = None,
) -> Tensor:
    """The same divergence over the whole vocabulary: [T]. teacher_temperature None: the student's."""
    student_logq_TV = (student_logits_TV.double() / temperature).log_softmax(-1)
    teacher_logq_TV = (teacher_logits_TV.double() / (teacher_temperature or temperature)).log_softmax(-1)
    return divergence(student_logq_TV, teacher_logq_TV, beta=beta, clip=clip)


def union(first_K: Tensor, second_K: Tensor) -> Tensor:
    """The distinct ids of two rows."""
    return torch.cat([first_K, second_K]).unique()


def sampled_logp(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of the sampled token: [T]."""
    return (logits_TV.double() / temperature).log_softmax(-1).gather(1, targets_T[:, None])[:, 0]


def entropy(logits_TV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats: [T]."""
    logp_TV = (logits_TV.double() / temperature).log_softmax(-1)
    return -torch.special.xlogy(logp_TV.exp(), logp_TV.exp()).sum(-1)
