"""What bench_kernel.py measures: seeded inputs, and one job per case.

T tokens, V this rank's columns, K top-k, h hidden. Level "logits": the rank's slices of both logits
are given. Level "linear": hidden states and the rank's slice of the output weight are given, both
need gradients, and the teacher shares the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from bench_rivals import (
    CopyToRanks,
    GatherColumns,
    TruncatedForwardKL,
    generalized_jsd,
    liger_jsd,
    topk_self_distillation,
)
from torch import Tensor

from megasd.loss.divergence import divergence
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_loss, fused_linear_teacher_record
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec, TeacherRecord, vocab_parallel_logprobs

BETA = 0.5
# Columns of a token that are raised, by up to MAX_SPIKE nats.
NUM_SPIKES, MAX_SPIKE = 3, 25.0
LOGIT_STD, TEACHER_NOISE = 2.0, 0.1
# Tokens drawn at a time, so that whole rows of the vocabulary never exist for all tokens.
ROWS = 64


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    vocab: columns over all ranks, divisible by tp. dtype: of the logits, or of hidden states and
    weight. chunk_tokens: tokens whose two logits the chunked cases may hold.
    """

    tokens: int
    vocab: int
    hidden: int
    top_k: int
    tp: int
    dtype: str
    device: str
    chunk_tokens: int
    seed: int = 0


@dataclass
class Inputs:
    """Tensors of one level; the other level's are None."""

    setting: Setting
    group: dist.ProcessGroup | None
    student_TV: Tensor | None = None
    teacher_TV: Tensor | None = None
    hidden_Th: Tensor | None = None
    weight_Vh: Tensor | None = None
    teacher_hidden_Th: Tensor | None = None

    def first(self, tokens: int) -> Inputs:
        """The first tokens, copied."""
        names = ("student_TV", "teacher_TV", "hidden_Th", "teacher_hidden_Th")
        few = {n: getattr(self, n)[:tokens].clone() for n in names if getattr(self, n) is not None}
        return replace(self, setting=replace(self.setting, tokens=min(tokens, self.setting.tokens)), **few)


def make_inputs(
    setting: Setting, level: str, rank: int, device: torch.device, group: dist.ProcessGroup | None
) -> Inputs:
    """Draw the same tensors for every number of ranks; this rank keeps its own columns."""
    dtype = getattr(torch, setting.dtype)
    width = setting.vocab // setting.tp
    columns = slice(rank * width, (rank + 1) * width)
    generator = torch.Generator(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def spikes(tokens: int) -> tuple[Tensor, Tensor]:
        ids_TS = torch.randint(setting.vocab, (tokens, NUM_SPIKES), generator=generator, device=device)
        return ids_TS, torch.rand(tokens, NUM_SPIKES, generator=generator, device=device) * MAX_SPIKE

    if level == "logits":
        student_TV = torch.empty(setting.tokens, width, dtype=dtype, device=device)
        teacher_TV = torch.empty_like(student_TV)
        for start in range(0, setting.tokens, ROWS):
            generator.manual_seed(setting.seed + start)
            block = slice(start, min(start + ROWS, setting.tokens))
            rows_TV = normal(block.stop - start, setting.vocab) * LOGIT_STD
            rows_TV.scatter_add_(1, *spikes(len(rows_TV)))
            student_TV[block] = rows_TV[:, columns]
            teacher_TV[block] = rows_TV.add_(normal(*rows_TV.shape), alpha=TEACHER_NOISE)[:, columns]
        return Inputs(setting, group, student_TV, teacher_TV)
    generator.manual_seed(setting.seed)
    weight_Vh = normal(setting.vocab, setting.hidden) * (LOGIT_STD * setting.hidden**-0.5)
    hidden_Th = normal(setting.tokens, setting.hidden)
    ids_TS, height_TS = spikes(setting.tokens)
    for ids_T, height_T in zip(ids_TS.unbind(1), height_TS.unbind(1), strict=True):
        raised_Th = weight_Vh[ids_T]
        hidden_Th += raised_Th * (height_T / raised_Th.square().sum(-1))[:, None]
    teacher_hidden_Th = hidden_Th + normal(*hidden_Th.shape) * (TEACHER_NOISE / LOGIT_STD)
    kept = {
        "hidden_Th": hidden_Th,
        "weight_Vh": weight_Vh[columns].clone(),
        "teacher_hidden_Th": teacher_hidden_Th,
    }
    return Inputs(setting, group, **{name: x.to(dtype) for name, x in kept.items()})


@dataclass
class Job:
    """What is timed: forward() returns the loss; its gradients in `leaves` are the backward.

    before() restores what a run destroys, and is not timed. The last leaf is split over the ranks.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    before: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """A row of the benchmark.

    source: "ours", or a rival's letter in benchmarks/README.md. level: "logits" or "linear".
    one_rank: the rival has no tensor parallelism. reads_k: the result depends on top_k.
    """

    source: str
    label: str
    level: str
    make: Callable[[Inputs], Job]
    one_rank: bool = False
    reads_k: bool = True


# Rivals -------------------------------------------------------------------------------------------


def _gather_logits(inputs: Inputs) -> Job:
    student_TV = inputs.student_TV.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            teacher_TV = GatherColumns.apply(inputs.teacher_TV, inputs.group)
        whole_TV = GatherColumns.apply(student_TV, inputs.group)
        return topk_self_distillation(whole_TV, teacher_TV, inputs.setting.top_k, BETA).mean()

    return Job(forward, (student_TV,))


def _gather_linear(inputs: Inputs) -> Job:
    hidden_Th, weight_Vh = inputs.hidden_Th.requires_grad_(), inputs.weight_Vh.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            teacher_TV = GatherColumns.apply(inputs.teacher_hidden_Th @ weight_Vh.t(), inputs.group)
        student_TV = GatherColumns.apply(
            CopyToRanks.apply(hidden_Th, inputs.group) @ weight_Vh.t(), inputs.group
        )
        return topk_self_distillation(student_TV, teacher_TV, inputs.setting.top_k, BETA).mean()

    return Job(forward, (hidden_Th, weight_Vh))


def _trl_topk(inputs: Inputs) -> Job:
    student_TV = inputs.student_TV.requires_grad_()
    return Job(
        lambda: topk_self_distillation(student_TV, inputs.teacher_TV, inputs.setting.top_k, BETA).mean(),
        (student_TV,),
    )


def _trl_full(inputs: Inputs) -> Job:
    student_TV = inputs.student_TV.requires_grad_()
    return Job(lambda: generalized_jsd(student_TV, inputs.teacher_TV, BETA).mean(), (student_TV,))


def _forward_kl(inputs: Inputs) -> Job:
    record, student_TV = _record_of_logits(inputs), inputs.student_TV.requires_grad_()
    return Job(
        lambda: TruncatedForwardKL.apply(student_TV, record.ids_TK, record.logq_TK, inputs.group).mean(),
        (student_TV,),
    )


def _liger(inputs: Inputs) -> Job:
    hidden_Th, weight_Vh = inputs.hidden_Th.requires_grad_(), inputs.weight_Vh.requires_grad_()
    chunk = inputs.setting.chunk_tokens

    def forward() -> torch.Tensor:
        return liger_jsd(hidden_Th, weight_Vh, inputs.teacher_hidden_Th, weight_Vh.detach(), BETA, chunk)

    return Job(forward, (hidden_Th, weight_Vh))


def _copy(inputs: Inputs) -> Job:
    """Both logits copied once: four words a column.

    That is as much as reading both logits, then reading one again and writing its gradient.
    """
    out_TV = torch.zeros_like(inputs.student_TV)

    def forward() -> Tensor:
        out_TV.copy_(inputs.student_TV)
        out_TV.copy_(inputs.teacher_TV)
        return out_TV[0, 0]

    return Job(forward)


def _gemm(inputs: Inputs) -> Job:
    """The four matrix products of the loss, chunk by chunk into existing buffers.

    They are student logits, teacher logits, hidden gradient and weight gradient.
    """
    hidden_Th, weight_Vh, chunk = (
        inputs.hidden_Th,
        inputs.weight_Vh,
        min(inputs.setting.tokens, inputs.setting.chunk_tokens),
    )
    student_TV, teacher_TV = (
        torch.zeros(chunk, len(weight_Vh), dtype=weight_Vh.dtype, device=weight_Vh.device) for _ in range(2)
    )
    hidden_grad_Th, weight_grad_Vh = torch.zeros_like(hidden_Th), torch.zeros_like(weight_Vh)

    def forward() -> Tensor:
        for start in range(0, len(hidden_Th), chunk):
            tokens = slice(start, min(start + chunk, len(hidden_Th)))
            logits_TV = student_TV[: tokens.stop - start]
            torch.mm(hidden_Th[tokens], weight_Vh.t(), out=logits_TV)
            torch.mm(inputs.teacher_hidden_Th[tokens], weight_Vh.t(), out=teacher_TV[: tokens.stop - start])
            torch.mm(logits_TV, weight_Vh, out=hidden_grad_Th[tokens])
            weight_grad_Vh.addmm_(logits_TV.t(), hidden_Th[tokens])
        return weight_grad_Vh[0, 0]

    return Job(forward)


# Ours ---------------------------------------------------------------------------------------------


def _loss(log_probs: LogProbs, *, beta: float, normalised: bool) -> Tensor:
    if log_probs.divergence_T is not None:
        return log_probs.divergence_T
    return divergence(log_probs.student_logq_TB, log_probs.teacher_logq_TB, beta=beta, normalised=normalised)


def _record_of_logits(inputs: Inputs) -> TeacherRecord:
    spec = LogProbsSpec(inputs.setting.vocab, "student", inputs.setting.top_k)
    found = vocab_parallel_logprobs(inputs.teacher_TV, None, None, spec, tp_group=inputs.group)
    return TeacherRecord(
        found.ids_TA.to(torch.int32),
        found.student_logq_TB[:, :-1].float(),
        found.student_logq_TB[:, -1].float(),
    )


def _log_probs(
    support: str, *, tail: str = "bucket", beta: float = BETA, in_place: bool = False
) -> Callable[[Inputs], Job]:
    def make(inputs: Inputs) -> Job:
        spec = LogProbsSpec(inputs.setting.vocab, support, inputs.setting.top_k, tail, beta)
        teacher = _record_of_logits(inputs) if support == "record" else inputs.teacher_TV
        student_TV = inputs.student_TV.requires_grad_()
        kept_TV = student_TV.detach().clone() if in_place else None

        def forward() -> Tensor:
            log_probs = vocab_parallel_logprobs(
                student_TV, teacher, None, spec, tp_group=inputs.group, in_place=in_place
            )
            return _loss(log_probs, beta=beta, normalised=tail != "raw").mean()

        before = (lambda: student_TV.data.copy_(kept_TV)) if in_place else (lambda: None)
        return Job(forward, (student_TV,), before)

    return make


def _fused(support: str) -> Callable[[Inputs], Job]:
    def make(inputs: Inputs) -> Job:
        setting = inputs.setting
        hidden_Th, weight_Vh = inputs.hidden_Th.requires_grad_(), inputs.weight_Vh.requires_grad_()
        # Two float32 logits, and on a GPU the gradient's copy in half precision.
        column = 8 + (2 if weight_Vh.is_cuda and weight_Vh.dtype == torch.bfloat16 else 0)
        call = {"tp_group": inputs.group, "memory_bytes": setting.chunk_tokens * len(weight_Vh) * column}
        if support == "record":
            of_record = {"vocab_size": setting.vocab, "temperature": 1.0}
            teacher = fused_linear_teacher_record(
                inputs.teacher_hidden_Th, weight_Vh.detach(), setting.top_k, **of_record, **call
            )
        else:
            teacher = TeacherHead(inputs.teacher_hidden_Th, weight_Vh.detach())
        spec = LogProbsSpec(setting.vocab, support, setting.top_k, beta=BETA)

        def loss_fn(log_probs: LogProbs, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return _loss(log_probs, beta=BETA, normalised=True) / setting.tokens, {}

        return Job(
            lambda: fused_linear_loss(hidden_Th, weight_Vh, None, spec, loss_fn, teacher=teacher, **call)[0],
            (hidden_Th, weight_Vh),
        )

    return make


CASES: dict[str, Case] = {
    "gather": Case("a", "gather logits + SDPO formula", "logits", _gather_logits),
    "trl-topk": Case("c", "TRL top-k formula", "logits", _trl_topk, one_rank=True),
    "trl-full": Case("c", "TRL generalized JSD formula", "logits", _trl_full, one_rank=True, reads_k=False),
    "forward-kl": Case("d", "teacher-top-k forward KL (verl)", "logits", _forward_kl),
    "copy": Case("e", "bound: copy of both logits", "logits", _copy, reads_k=False),
    "topk": Case("ours", "top-k", "logits", _log_probs("student")),
    "topk-in-place": Case("ours", "top-k, gradient in place", "logits", _log_probs("student", in_place=True)),
    "record-kl": Case(
        "ours", "teacher record, the loss of (d)", "logits", _log_probs("record", tail="raw", beta=0.0)
    ),
    "full": Case("ours", "full vocabulary", "logits", _log_probs("full"), reads_k=False),
    "gather-linear": Case("a", "GEMM + gather + SDPO formula", "linear", _gather_linear),
    "liger": Case("b", "Liger chunked JSD, full vocabulary", "linear", _liger, one_rank=True, reads_k=False),
    "gemm": Case("e", "bound: the 4 GEMMs", "linear", _gemm, reads_k=False),
    "fused-topk": Case("ours", "fused top-k", "linear", _fused("student")),
    "fused-record": Case("ours", "fused teacher record", "linear", _fused("record")),
    "fused-union": Case("ours", "fused union of both top-k", "linear", _fused("union")),
    "fused-full": Case("ours", "fused full vocabulary", "linear", _fused("full"), reads_k=False),
}
