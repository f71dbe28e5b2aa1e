"""The teacher's forward pass over a rank batch, without gradient.

It keeps what the distillation loss compares the student with, and reads the log-probs and
entropies that credit assignment and token weights need.

R response tokens of the rank batch, T of a microbatch, S kept rows, C contexts, h hidden,
V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor.parallel import Mesh
from megasd.actor.rank_batch import RankBatch
from megasd.actor.teacher import Teacher
from megasd.actor.teacher_signal import (
    HiddenRows,
    RecordRows,
    TeacherSignal,
    no_signal,
    row_of_each_token,
)
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_logprobs, fused_linear_teacher_record
from megasd.ops.vocab_parallel import LogProbsSpec, TeacherRecord


@dataclass(frozen=True)
class TeacherPass:
    """Call it with a rank batch, on every rank alike."""

    teacher: Teacher
    mesh: Mesh
    vocab_size: int
    # dtype of kept hidden states: the model's
    dtype: torch.dtype
    # most memory that the logits of a chunk of tokens may take
    memory_bytes: int
    # (batch, samples of each microbatch, context) -> microbatches
    cut: Callable[[Batch, list[list[int]], int], list[Microbatch]]

    @torch.no_grad()
    def __call__(self, rank_batch: RankBatch) -> TeacherSignal:
        """Run the teacher, forward only, over the samples and contexts that the algorithm reads.

        For distillation the signal keeps hidden states or records of the first context. For credit
        and confidence weights its streams are the log-probs of the sampled tokens under each
        context, and the entropy under the first. Collectives: the model's, those of
        ops/vocab_parallel.py, and all-reduces over the context-parallel group.
        """
        term, pg = rank_batch.algorithm.distill, rank_batch.algorithm.policy_gradient
        reads = (pg is not None and pg.credit is not None) or (
            term is not None and term.token_weight == "confidence"
        )
        passes = [
            self._pass(rank_batch, context, keeps=context == 0 and term is not None, reads=reads)
            for context in range(len(rank_batch.teacher_microbatches))
        ]
        if not passes:
            return no_signal(self.mesh.device)
        streams = _streams(passes) if reads and self.mesh.is_last_stage else {}
        if term is None:
            return TeacherSignal(no_signal(self.mesh.device).slot_R, None, streams)
        return TeacherSignal(passes[0].slot_R, passes[0].kept, streams)

    def _pass(self, rank_batch: RankBatch, context: int, *, keeps: bool, reads: bool) -> _ContextPass:
        """One context of the samples."""
        mesh = self.mesh
        groups = rank_batch.teacher_microbatches[context]
        slot_R, num_rows = row_of_each_token(rank_batch.batch, sorted(i for group in groups for i in group))
        slot_R = slot_R.to(mesh.device)
        microbatches = self.cut(rank_batch.batch, groups, context)
        if not mesh.is_last_stage:
            self.teacher.run(microbatches, lambda microbatch, hidden_Th, columns: None)
            return _ContextPass(slot_R)
        collector = _Collector(self, rank_batch, slot_R, num_rows, keeps=keeps, reads=reads)
        self.teacher.run(microbatches, collector.add)
        return collector.finish(mesh.cp_group if mesh.cp_size > 1 else None)


@dataclass(frozen=True)
class _ContextPass:
    """The results of one context; off the last pipeline stage the rows' places alone."""

    slot_R: Tensor
    kept: TeacherHead | TeacherRecord | None = None
    # float32 [R], zero where they were not read
    logp_R: Tensor | None = None
    entropy_R: Tensor | None = None


class _Collector:
    """Takes the hidden states of one context from the schedule and keeps what is read of them.

    `add` fills tensors that are made beforehand, since a list of parts would need twice the memory
    when it is joined. A teacher of several passes has one hidden state a token, whose columns come
    pass by pass: its log-probs are read in `finish`.
    """

    def __init__(
        self,
        run: TeacherPass,
        rank_batch: RankBatch,
        slot_R: Tensor,
        num_rows: int,
        *,
        keeps: bool,
        reads: bool,
    ) -> None:
        spec, algorithm = rank_batch.spec, rank_batch.algorithm
        self.run, self.rank_batch, self.slot_R, self.keeps, self.reads = run, rank_batch, slot_R, keeps, reads
        self.several = len(run.teacher.passes) > 1
        self.temperature = spec.teacher_temperature
        self.record_k = min(spec.top_k, run.vocab_size) if spec.support == "record" and keeps else 0
        device = run.mesh.device
        holds_hidden = not self.record_k and (keeps or self.several)
        self.hidden = HiddenRows(num_rows, run.teacher.hidden_size if holds_hidden else 0, run.dtype, device)
        self.holds_hidden = holds_hidden
        self.records = RecordRows(num_rows if self.record_k else 0, self.record_k, device)
        self.weight_Vh = run.teacher.output_weight(repeats=algorithm.minibatches * algorithm.epochs > 1)
        num_tokens = len(rank_batch.batch.response_ids)
        self.logp_R, self.entropy_R = (torch.zeros(num_tokens, device=device) for _ in range(2))

    def add(self, microbatch: Microbatch, hidden_Th: Tensor, columns: slice) -> None:
        """One microbatch of one pass; columns: where its hidden states stand in the joint ones."""
        # All tensor-parallel ranks skip it alike; the collectives below are theirs alone.
        if microbatch.is_filler:
            return
        index, run = microbatch.response_index, self.run
        slots, hidden_Th = self.slot_R[index], hidden_Th.to(run.dtype)
        if self.record_k:
            record = fused_linear_teacher_record(
                hidden_Th,
                self.weight_Vh,
                self.record_k,
                vocab_size=run.vocab_size,
                temperature=self.temperature,
                tp_group=run.mesh.tp_group,
                memory_bytes=run.memory_bytes,
            )
            self.records.add(slots, record)
        elif self.holds_hidden:
            self.hidden.add(slots, hidden_Th, columns)
        if self.reads and not self.several:
            self._read(index, hidden_Th)

    def finish(self, cp_group: dist.ProcessGroup | None) -> _ContextPass:
        """What came in, whole on every context-parallel rank. Collectives: all_reduces over them."""
        kept: TeacherHead | TeacherRecord | None = None
        if self.record_k:
            kept = self.records.finish(cp_group)
        elif self.holds_hidden:
            kept = TeacherHead(self.hidden.finish(cp_group), self.weight_Vh)
        if self.reads and self.several:
            present = (self.slot_R >= 0).nonzero().squeeze(1)
            self._read(present, kept.hidden_Th[self.slot_R[present]])
        elif self.reads and cp_group is not None:
            # Each token was read on one context-parallel rank.
            for values_R in (self.logp_R, self.entropy_R):
                dist.all_reduce(values_R, group=cp_group)
        return _ContextPass(self.slot_R, kept if self.keeps else None, self.logp_R, self.entropy_R)

    def _read(self, index: Tensor, hidden_Th: Tensor) -> None:
        run = self.run
        plain = LogProbsSpec(vocab_size=run.vocab_size, support="none", temperature=self.temperature)
        found = fused_linear_logprobs(
            hidden_Th,
            self.weight_Vh,
            self.rank_batch.targets[index],
            plain,
            tp_group=run.mesh.tp_group,
            memory_bytes=run.memory_bytes,
        )
        self.logp_R[index], self.entropy_R[index] = found.logp_T.float(), found.entropy_T.float()


def _streams(passes: list[_ContextPass]) -> dict[str, Tensor]:
    """The streams that loss/token_weights.py reads: of the first context, and of the contrasts."""
    first, contrasts = passes[0], passes[1:]
    none = first.logp_R.new_zeros(0, len(first.logp_R))
    return {
        "teacher_logp": first.logp_R,
        "teacher_entropy": first.entropy_R,
        "distilled": first.slot_R >= 0,
        "contrast_logp": torch.cat([none, *(one.logp_R[None] for one in contrasts)]),
        "contrast_present": torch.cat([none.bool(), *((one.slot_R >= 0)[None] for one in contrasts)]),
    }
