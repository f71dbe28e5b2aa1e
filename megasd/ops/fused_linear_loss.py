"""The output layer and the loss, fused: they run together, one chunk of tokens at a time.

Neither the logits nor the gradient of the logits ever exist for all tokens at once, so the peak
memory of the logits does not depend on T.

T tokens, h hidden, V local vocabulary slice. For each chunk the forward computes the logits of
student and teacher (float32, also from bfloat16 operands), the log-probs of ops/vocab_parallel.py
and the caller's loss of these log-probs. It then computes at once the gradients of the logits, of
the hidden states and of the weight. This takes four GEMMs (student, teacher, hidden gradient,
weight gradient), as many as without fusion.

The forward computes the gradients, so the caller's loss function must contain every factor of the
loss: token weights, normaliser, importance ratio. The backward only returns these gradients. If the
weight's gradient has already gone into `main_grad`, the upstream gradient must be 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec, TeacherRecord, compute_logprobs, write_gradient_
from megasd.ops.vocab_shard import compute_dtype

# (log-probs of a chunk, slice of the chunk's tokens) -> (loss_T, sums by name). loss_T is
# differentiable in the log-probs and contains every weight. The sums of all chunks are added up.
LossFunction = Callable[[LogProbs, slice], tuple[Tensor, dict[str, Tensor]]]
# The BLAS of a CPU has no float32 output for bfloat16 operands. This many rows of a bfloat16 weight
# are widened to float32 at a time.
_WEIGHT_ROWS = 8192


@dataclass
class TeacherHead:
    """A teacher as final hidden states [T, h] and a local slice [V, h] of its output layer.

    Neither tensor gets a gradient.
    """

    hidden_Th: Tensor
    weight_Vh: Tensor


TeacherSource = TeacherHead | TeacherRecord | None


def chunk_tokens(memory_bytes: int, weight_Vh: Tensor, teacher: TeacherSource) -> int:
    """The number of tokens per chunk whose logits fit into `memory_bytes`; at least 1.

    The budget covers the logits of student and teacher (float32) and, on a GPU, a half-precision
    copy of the gradient of the student's logits.
    """
    columns, wide = weight_Vh.shape[0], compute_dtype(weight_Vh).itemsize
    words = wide * (1 + isinstance(teacher, TeacherHead)) + (
        weight_Vh.element_size() if _narrow_gradient(weight_Vh) else 0
    )
    tokens = max(1, memory_bytes // (columns * words))
    return tokens if tokens < 128 else tokens // 128 * 128


def _narrow_gradient(weight_Vh: Tensor) -> bool:
    return weight_Vh.is_cuda and weight_Vh.dtype in (torch.bfloat16, torch.float16)


def _project(hidden_Th: Tensor, weight_Vh: Tensor, out_TV: Tensor) -> Tensor:
    """Compute out = hidden weight^T, the logits, in compute precision.

    Logits rounded to bfloat16 would cost 4 to 19 percent of a small gradient.
    """
    if hidden_Th.dtype == out_TV.dtype:
        return torch.mm(hidden_Th, weight_Vh.t(), out=out_TV)
    if hidden_Th.is_cuda:
        return torch.mm(hidden_Th, weight_Vh.t(), out_dtype=out_TV.dtype, out=out_TV)
    hidden_Th = hidden_Th.to(out_TV.dtype)
    for start in range(0, weight_Vh.shape[0], _WEIGHT_ROWS):
        rows = slice(start, start + _WEIGHT_ROWS)
        out_TV[:, rows] = hidden_Th @ weight_Vh[rows].to(out_TV.dtype).t()
    return out_TV


def _hidden_gradient(gradient_TV: Tensor, weight_Vh: Tensor) -> Tensor:
    """The gradient of the hidden states, [T, h] in compute precision."""
    if gradient_TV.dtype == weight_Vh.dtype:
        wide = compute_dtype(weight_Vh)
        return (
            gradient_TV @ weight_Vh
            if wide == weight_Vh.dtype
            else torch.mm(gradient_TV, weight_Vh, out_dtype=wide)
        )
    hidden_Th = gradient_TV.new_zeros(gradient_TV.shape[0], weight_Vh.shape[1])
    for start in range(0, weight_Vh.shape[0], _WEIGHT_ROWS):
        rows = slice(start, start + _WEIGHT_ROWS)
        hidden_Th.addmm_(gradient_TV[:, rows], weight_Vh[rows].to(gradient_TV.dtype))
    return hidden_Th


def _add_weight_gradient(total_Vh: Tensor | None, gradient_TV: Tensor, hidden_Th: Tensor) -> Tensor:
    """Add gradient^T hidden to the total in place; without a total, return a new one.

    A new total has compute precision.
    """
    if gradient_TV.dtype != hidden_Th.dtype:
        hidden_Th = hidden_Th.to(gradient_TV.dtype)
    if total_Vh is None:
        wide = compute_dtype(gradient_TV)
        return (
            gradient_TV.t() @ hidden_Th
            if wide == hidden_Th.dtype
            else torch.mm(gradient_TV.t(), hidden_Th, out_dtype=wide)
        )
    if total_Vh.dtype == hidden_Th.dtype:
        total_Vh.addmm_(gradient_TV.t(), hidden_Th)
    elif total_Vh.is_cuda:
        torch.addmm(total_Vh, gradient_TV.t(), hidden_Th, out_dtype=total_Vh.dtype, out=total_Vh)
    else:
        total_Vh.add_(gradient_TV.t() @ hidden_Th)
    return total_Vh


def _chunk_of(
    teacher: TeacherSource, tokens: slice, buffer_TV: Tensor | None
) -> Tensor | TeacherRecord | None:
    if isinstance(teacher, TeacherHead):
        assert buffer_TV is not None
        hidden_Th = teacher.hidden_Th[tokens]
        return _project(hidden_Th, teacher.weight_Vh, buffer_TV[: len(hidden_Th)])
    return teacher[tokens] if isinstance(teacher, TeacherRecord) else None


def _check(hidden_Th: Tensor, weight_Vh: Tensor, targets_T: Tensor | None, teacher: TeacherSource) -> None:
    if hidden_Th.dim() != 2 or weight_Vh.dim() != 2 or hidden_Th.shape[1] != weight_Vh.shape[1]:
        raise ValueError(
            f"hidden must be [T, h] and weight [V, h], got {tuple(hidden_Th.shape)} and"
            f" {tuple(weight_Vh.shape)}"
        )
    if hidden_Th.dtype != weight_Vh.dtype:
        raise ValueError(f"hidden is {hidden_Th.dtype} and weight {weight_Vh.dtype}; cast one of them")
    if targets_T is not None and targets_T.shape != hidden_Th.shape[:1]:
        raise ValueError(f"{tuple(targets_T.shape)} targets for {hidden_Th.shape[0]} tokens")
    if isinstance(teacher, TeacherHead) and (
        teacher.hidden_Th.shape[0] != hidden_Th.shape[0] or teacher.weight_Vh.shape[0] != weight_Vh.shape[0]
    ):
        raise ValueError(
            f"teacher of {teacher.hidden_Th.shape[0]} tokens and {teacher.weight_Vh.shape[0]} columns next to"
            f" a student of {hidden_Th.shape[0]} and {weight_Vh.shape[0]}"
        )


class _Buffers:
    """Memory for the logits of a chunk and for the gradient of these logits; all chunks use it."""

    def __init__(self, weight_Vh: Tensor, teacher: TeacherSource, tokens: int, *, gradient: bool) -> None:
        shape, wide = (tokens, weight_Vh.shape[0]), compute_dtype(weight_Vh)
        self.student_TV = torch.empty(shape, dtype=wide, device=weight_Vh.device)
        self.teacher_TV = torch.empty_like(self.student_TV) if isinstance(teacher, TeacherHead) else None
        narrow = gradient and _narrow_gradient(weight_Vh)
        self.gradient_TV = (
            torch.empty(shape, dtype=weight_Vh.dtype, device=weight_Vh.device) if narrow else None
        )


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_Th: Tensor,
        weight_Vh: Tensor,
        targets_T: Tensor | None,
        spec: LogProbsSpec,
        loss_fn: LossFunction,
        teacher: TeacherSource,
        tp_group: dist.ProcessGroup | None,
        memory_bytes: int,
        reduce_hidden_grad: bool,
        train: bool,
        sums: dict[str, Tensor],
    ) -> Tensor:
        num_tokens, wide = hidden_Th.shape[0], compute_dtype(weight_Vh)
        wants_hidden, wants_weight = train and ctx.needs_input_grad[0], train and ctx.needs_input_grad[1]
        main_grad = getattr(weight_Vh, "main_grad", None) if wants_weight else None
        weight_grad = main_grad
        hidden_grad = torch.empty_like(hidden_Th) if wants_hidden else None

        size = min(chunk_tokens(memory_bytes, weight_Vh, teacher), max(1, num_tokens))
        buffers = _Buffers(weight_Vh, teacher, size, gradient=wants_hidden or wants_weight)
        loss = torch.zeros((), dtype=wide, device=hidden_Th.device)
        for start in range(0, num_tokens, size):
            tokens = slice(start, min(start + size, num_tokens))
            student_TV = _project(hidden_Th[tokens], weight_Vh, buffers.student_TV[: tokens.stop - start])
            teacher_TV = _chunk_of(teacher, tokens, buffers.teacher_TV)
            logprobs, state = compute_logprobs(
                student_TV,
                teacher_TV,
                None if targets_T is None else targets_T[tokens],
                spec,
                tp_group=tp_group,
            )
            loss_T, gradients = _differentiate(loss_fn, logprobs, tokens, sums, wants_hidden or wants_weight)
            loss += loss_T.detach().sum()
            if gradients is None:
                continue
            out = None if buffers.gradient_TV is None else buffers.gradient_TV[: tokens.stop - start]
            kept = teacher_TV if isinstance(teacher_TV, Tensor) else None
            write_gradient_(student_TV, kept, state, *gradients, spec=spec, tp_group=tp_group, out=out)
            gradient_TV = student_TV if out is None else out
            if hidden_grad is not None:
                hidden_grad[tokens] = _hidden_gradient(gradient_TV, weight_Vh).to(hidden_Th.dtype)
            if wants_weight:
                weight_grad = _add_weight_gradient(weight_grad, gradient_TV, hidden_Th[tokens])
        returned_grad = None
        if wants_weight and main_grad is None:
            # A batch without tokens has made no gradient: return zeros.
            returned_grad = torch.zeros_like(weight_Vh) if weight_grad is None else weight_grad
            returned_grad = returned_grad.to(weight_Vh.dtype)
        ctx.save_for_backward(hidden_grad, returned_grad)
        ctx.weight = weight_Vh if main_grad is not None else None
        ctx.reduce_group = (
            tp_group
            if reduce_hidden_grad and tp_group is not None and dist.get_world_size(tp_group) > 1
            else None
        )
        ctx.done = False
        return loss.float() if wide == torch.float32 else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.done:
            raise RuntimeError("a fused loss can run backward once: its weight gradient has been handed over")
        ctx.done = True
        hidden_grad, weight_grad = ctx.saved_tensors
        if ctx.weight is not None:
            _expect_one(grad)
            weight_grad = _placeholder(ctx.weight)
        else:
            weight_grad = None if weight_grad is None else weight_grad.mul_(grad)
        if hidden_grad is not None:
            # hidden_grad may be changed in place: the backward runs once.
            hidden_grad.mul_(grad)
            if ctx.reduce_group is not None:
                dist.all_reduce(hidden_grad, group=ctx.reduce_group)
        return hidden_grad, weight_grad, *[None] * 9


def _differentiate(
    loss_fn: LossFunction, logprobs: LogProbs, tokens: slice, sums: dict[str, Tensor], train: bool
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None] | None]:
    """Compute the caller's loss of a chunk and the gradients of this loss in the log-probs.

    The gradients are those in (student_logq_TB, divergence_T, logp_T), None without `train`. The
    loss function's sums are added to `sums`. O(K) work, the same on all ranks.
    """
    names = ("student_logq_TB", "divergence_T", "logp_T")
    with torch.set_grad_enabled(train):
        leaves = {
            n: getattr(logprobs, n).detach().requires_grad_(train)
            for n in names
            if getattr(logprobs, n) is not None
        }
        loss_T, chunk_sums = loss_fn(replace(logprobs, **leaves), tokens)
        gradients = None
        if train:
            found = iter(
                torch.autograd.grad(loss_T.sum(), list(leaves.values()), allow_unused=True)
                if loss_T.requires_grad
                else ()
            )
            in_logq, in_divergence, in_logp = (next(found, None) if n in leaves else None for n in names)
            gradients = in_logq, in_divergence, in_logp
    for name, value in chunk_sums.items():
        sums[name] = sums[name] + value if name in sums else value
    return loss_T, gradients


def _expect_one(grad: Tensor) -> None:
    message = (
        "the weight gradient is already in main_grad, made for an upstream gradient of 1: put every factor"
        " into the loss function"
    )
    if grad.is_cuda:
        # The assertion runs on the GPU, so the host does not wait.
        torch._assert_async(grad == 1, message)
    elif grad != 1:
        raise RuntimeError(message)


def _placeholder(weight: Tensor) -> Tensor:
    """A gradient for autograd that stands in for a weight's gradient that is already in main_grad.

    This is Megatron's convention (core/tensor_parallel/layers.py, 0.16.1). The hook of Megatron's
    DDP fires when autograd gets the placeholder: it starts the reduction of the bucket, and it does
    not add the placeholder. `zero_out_wgrad` marks a weight with a second use (tied embeddings).
    Autograd adds the gradient of the second use to the placeholder, so the placeholder is zeros.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's attribute
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


def fused_linear_loss(
    hidden_Th: Tensor,
    weight_Vh: Tensor,
    targets_T: Tensor | None,
    spec: LogProbsSpec,
    loss_fn: LossFunction,
    *,
    teacher: TeacherSource,
    tp_group: dist.ProcessGroup | None,
    memory_bytes: int,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute logits, log-probs, loss and gradients, one chunk of tokens at a time.

    Returns (loss, sums): the scalar sum over tokens of loss_fn's losses (float32; float64 for
    float64 weights), and loss_fn's sums added up over the chunks.

    hidden_Th [T, h] and weight_Vh [V, h] have one dtype; targets_T are int64 global ids. T must be
    the same on all ranks of tp_group; the loss then is the same too. hidden_Th and weight_Vh get
    gradients, the teacher gets none. If weight_Vh has a main_grad, the forward adds the weight's
    gradient to it, and the upstream gradient must be 1 (else RuntimeError). If not, autograd gets
    the weight's gradient. Under no_grad nothing is accumulated. The backward runs once.
    memory_bytes: budget of the chunk's logits. A step's token weights must be in loss_fn.
    ValueError for shapes or dtypes that do not fit together.

    Collectives: those of the log-probs once per chunk, and in the backward one all_reduce of the
    hidden gradient over tp_group. With reduce_hidden_grad=False the caller does this reduction
    instead (sequence parallelism: the reduce-scatter that belongs to the gather before this call).
    """
    _check(hidden_Th, weight_Vh, targets_T, teacher)
    if isinstance(teacher, TeacherHead):
        teacher = TeacherHead(teacher.hidden_Th.detach(), teacher.weight_Vh.detach())
    sums: dict[str, Tensor] = {}
    train = torch.is_grad_enabled()
    loss = _FusedLinearLoss.apply(
        hidden_Th,
        weight_Vh,
        targets_T,
        spec,
        loss_fn,
        teacher,
        tp_group,
        memory_bytes,
        reduce_hidden_grad,
        train,
        sums,
    )
    return loss, sums


@torch.no_grad()
def fused_linear_logprobs(
    hidden_Th: Tensor,
    weight_Vh: Tensor,
    targets_T: Tensor | None,
    spec: LogProbsSpec,
    *,
    teacher: TeacherSource = None,
    tp_group: dist.ProcessGroup | None,
    memory_bytes: int,
) -> LogProbs:
    """Compute the log-probs of all tokens from hidden states, chunk by chunk, without gradient.

    Arguments are those of fused_linear_loss. Collectives: those of the log-probs once per chunk.
    """
    _check(hidden_Th, weight_Vh, targets_T, teacher)
    size = min(chunk_tokens(memory_bytes, weight_Vh, teacher), max(1, hidden_Th.shape[0]))
    buffers = _Buffers(weight_Vh, teacher, size, gradient=False)
    parts = []
    for start in range(0, max(1, hidden_Th.shape[0]), size):
        tokens = slice(start, min(start + size, hidden_Th.shape[0]))
        student_TV = _project(hidden_Th[tokens], weight_Vh, buffers.student_TV[: tokens.stop - start])
        teacher_TV = _chunk_of(teacher, tokens, buffers.teacher_TV)
        parts.append(
            compute_logprobs(
                student_TV,
                teacher_TV,
                None if targets_T is None else targets_T[tokens],
                spec,
                tp_group=tp_group,
            )[0]
        )
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(LogProbs)}
    return LogProbs(
        **{name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    )


@torch.no_grad()
def fused_linear_teacher_record(
    hidden_Th: Tensor,
    weight_Vh: Tensor,
    k: int,
    *,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    memory_bytes: int,
) -> TeacherRecord:
    """Compute a teacher's record (the k most likely tokens and the tail) from its hidden states.

    Collectives: one all_gather per chunk.
    """
    spec = LogProbsSpec(vocab_size=vocab_size, support="student", top_k=k, temperature=temperature)
    logprobs = fused_linear_logprobs(
        hidden_Th, weight_Vh, None, spec, tp_group=tp_group, memory_bytes=memory_bytes
    )
    assert logprobs.ids_TA is not None and logprobs.student_logq_TB is not None
    logq_TB = logprobs.student_logq_TB.float()
    return TeacherRecord(logprobs.ids_TA.to(torch.int32), logq_TB[:, :-1], logq_TB[:, -1])
