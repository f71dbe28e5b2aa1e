"""The teacher's forward pass over a rank batch, without gradient.

It keeps what the distillation loss compares the student with, and reads the log-probs and
entropies that credit assignment and token weights need.

R response tokens of the rank batch, T of a microbatch, S kept rows, C contexts, h hidden,
V local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor.rank_batch import RankBatch
from megasd.actor.student import Student
from megasd.actor.teacher import Teacher
from megasd.actor.teacher_signal import (
    HiddenRows,
    RecordRows,
    TeacherSignal,
    no_signal,
    row_of_each_token,
)
from megasd.batch.microbatch import Microbatch
from megasd.config.variants import reads_teacher_logprobs
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_logprobs, fused_linear_teacher_record
from megasd.ops.vocab_parallel import LogProbsSpec, TeacherRecord


def teacher_forward(student: Student, teacher: Teacher, batches: list[RankBatch]) -> list[TeacherSignal]:
    """The signal of each rank batch of a step: what the student's pass over it reads of the teacher.

    For distillation a signal keeps hidden states or records of the first context. For credit and
    confidence weights its streams are the log-probs of the sampled tokens under each context, and
    the entropy under the first. Without a teacher, or without a term that reads it, a signal is
    empty. Collectives: the model's, those of ops/vocab_parallel.py, and all_reduces over the
    context-parallel group.
    """
    algorithm, empty = batches[0].algorithm, no_signal(student.mesh.device)
    if not teacher.passes or not any(one.teacher_microbatches for one in batches):
        return [empty for _ in batches]
    if not student.mesh.is_last_stage:
        return [_run_before_last_stage(student, teacher, one, empty) for one in batches]
    repeats = algorithm.minibatches * algorithm.epochs > 1
    weight_Vh = teacher.output_weight(repeats=repeats)
    return [_signal(student, teacher, weight_Vh, one, empty) for one in batches]


@torch.no_grad()
def _run_before_last_stage(
    student: Student, teacher: Teacher, rank_batch: RankBatch, empty: TeacherSignal
) -> TeacherSignal:
    """Run the teacher on a pipeline stage before the last one, which gets no hidden states."""
    for context, groups in enumerate(rank_batch.teacher_microbatches):
        microbatches = student.microbatches(rank_batch.batch, groups, context)
        teacher.run(microbatches, lambda microbatch, hidden_Th, columns: None)
    if rank_batch.algorithm.distill is None:
        return empty
    return TeacherSignal(_places(student, rank_batch, 0)[0])


@torch.no_grad()
def _signal(
    student: Student, teacher: Teacher, weight_Vh: Tensor, rank_batch: RankBatch, empty: TeacherSignal
) -> TeacherSignal:
    """The signal on the last pipeline stage."""
    term, reads = rank_batch.algorithm.distill, reads_teacher_logprobs(rank_batch.algorithm)
    passes = []
    for context, groups in enumerate(rank_batch.teacher_microbatches):
        keeps = context == 0 and term is not None
        collector = _Collector(student, teacher, weight_Vh, rank_batch, context, keeps=keeps, reads=reads)
        teacher.run(student.microbatches(rank_batch.batch, groups, context), collector.add)
        passes.append(collector.finish())
    streams = _streams(passes) if reads else {}
    if term is None:
        return replace(empty, streams=streams)
    return TeacherSignal(passes[0].slot_R, passes[0].kept, streams)


def _places(student: Student, rank_batch: RankBatch, context: int) -> tuple[Tensor, int]:
    """(slot_R on the device, number of rows) of the samples that have the context."""
    samples = sorted(i for group in rank_batch.teacher_microbatches[context] for i in group)
    slot_R, num_rows = row_of_each_token(rank_batch.batch, samples)
    return slot_R.to(student.mesh.device), num_rows


@dataclass(frozen=True)
class _ContextPass:
    """What one context of the samples gave."""

    slot_R: Tensor
    kept: TeacherHead | TeacherRecord | None
    # float32 [R], nats; 0 where they were not read
    logp_R: Tensor
    entropy_R: Tensor


class _Collector:
    """Takes the hidden states of one context from the schedule and keeps what is read of them.

    `add` fills tensors that are made beforehand, since a list of parts would need twice the memory
    when it is joined. A teacher of several passes has one joint hidden state a token, whose columns
    come pass by pass. So its log-probs are read in `finish`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        weight_Vh: Tensor,
        rank_batch: RankBatch,
        context: int,
        *,
        keeps: bool,
        reads: bool,
    ) -> None:
        """keeps: for the distillation loss. reads: log-probs and entropies, for the streams."""
        spec, device = rank_batch.spec, student.mesh.device
        self.student, self.weight_Vh, self.rank_batch = student, weight_Vh, rank_batch
        self.keeps, self.reads, self.is_joint = keeps, reads, len(teacher.passes) > 1
        self.dtype, self.temperature = student.model_config.params_dtype, spec.teacher_temperature
        self.record_k = min(spec.top_k, student.vocab_size) if spec.support == "record" and keeps else 0
        self.holds_hidden = not self.record_k and (keeps or self.is_joint)
        self.slot_R, num_rows = _places(student, rank_batch, context)
        self.records = RecordRows(num_rows if self.record_k else 0, self.record_k, device)
        hidden_size = teacher.hidden_size if self.holds_hidden else 0
        self.hidden = HiddenRows(num_rows, hidden_size, self.dtype, device)
        num_tokens = len(rank_batch.batch.response_ids)
        self.logp_R, self.entropy_R = (torch.zeros(num_tokens, device=device) for _ in range(2))

    def add(self, microbatch: Microbatch, hidden_Th: Tensor, columns: slice) -> None:
        """One microbatch of one pass; columns: their places in the joint hidden states."""
        # All tensor-parallel ranks skip filler alike, and only they talk to each other below.
        if microbatch.is_filler:
            return
        index, student = microbatch.response_index, self.student
        slots, hidden_Th = self.slot_R[index], hidden_Th.to(self.dtype)
        if self.record_k:
            record = fused_linear_teacher_record(
                hidden_Th,
                self.weight_Vh,
                self.record_k,
                vocab_size=student.vocab_size,
                temperature=self.temperature,
                tp_group=student.mesh.tp_group,
                memory_bytes=student.loss_memory_bytes,
            )
            self.records.add(slots, record)
        elif self.holds_hidden:
            self.hidden.add(slots, hidden_Th, columns)
        if self.reads and not self.is_joint:
            self._read(index, hidden_Th)

    def finish(self) -> _ContextPass:
        """What came in, whole on every context-parallel rank. Collectives: all_reduces over them."""
        mesh = self.student.mesh
        cp_group = mesh.cp_group if mesh.cp_size > 1 else None
        kept: TeacherHead | TeacherRecord | None = None
        if self.record_k:
            kept = self.records.finish(cp_group)
        elif self.holds_hidden:
            kept = TeacherHead(self.hidden.finish(cp_group), self.weight_Vh)
        if self.reads and isinstance(kept, TeacherHead) and self.is_joint:
            present = (self.slot_R >= 0).nonzero().squeeze(1)
            self._read(present, kept.hidden_Th[self.slot_R[present]])
        elif self.reads and cp_group is not None:
            # Each token was read on one context-parallel rank.
            for values_R in (self.logp_R, self.entropy_R):
                dist.all_reduce(values_R, group=cp_group)
        return _ContextPass(self.slot_R, kept if self.keeps else None, self.logp_R, self.entropy_R)

    def _read(self, index_T: Tensor, hidden_Th: Tensor) -> None:
        """Log-probs and entropies of some tokens from their joint hidden states."""
        student = self.student
        logprobs = fused_linear_logprobs(
            hidden_Th,
            self.weight_Vh,
            self.rank_batch.targets[index_T],
            LogProbsSpec(vocab_size=student.vocab_size, support="none", temperature=self.temperature),
            tp_group=student.mesh.tp_group,
            memory_bytes=student.loss_memory_bytes,
        )
        assert logprobs.logp_T is not None and logprobs.entropy_T is not None, "targets were given"
        self.logp_R[index_T], self.entropy_R[index_T] = logprobs.logp_T.float(), logprobs.entropy_T.float()


def _streams(passes: list[_ContextPass]) -> dict[str, Tensor]:
    """The streams that loss/token_weights.py reads: of the first context and of the contrasts."""
    first, contrasts = passes[0], passes[1:]
    none = first.logp_R.new_zeros(0, len(first.logp_R))
    return {
        "teacher_logp": first.logp_R,
        "teacher_entropy": first.entropy_R,
        "distilled": first.slot_R >= 0,
        "contrast_logp": torch.cat([none, *(one.logp_R[None] for one in contrasts)]),
        "contrast_present": torch.cat([none.bool(), *((one.slot_R >= 0)[None] for one in contrasts)]),
    }
