"""The teacher's pass over a rank batch: what distillation keeps of it, and the log-probs and
entropies that credit and token weights read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.actor.parallel import Mesh
from megasd.actor.rank_batch import RankBatch
from megasd.actor.teacher import Teacher
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch
from megasd.ops.fused_linear_loss import fused_linear_logprobs, fused_linear_teacher_record
from megasd.ops.vocab_parallel import LogProbsSpec


@dataclass
class TeacherPass:
    """Call it with a rank batch, on every rank alike."""

    teacher: Teacher
    mesh: Mesh
    vocab_size: int
    # of kept hidden states: the model's
    dtype: torch.dtype
    # of a chunk's logits
    memory_bytes: int
    # (batch, samples of each microbatch, context) -> microbatches
    cut: Callable[[Batch, list[list[int]], int], list[Microbatch]]

    @torch.no_grad()
    def __call__(self, rank_batch: RankBatch) -> TeacherSignal | None:
        """Teacher passes, forward only, over the samples that some term asks about.

        For distillation the signal keeps hidden states or records; for credit and confidence
        weights rank_batch.streams get the log-probs of the sampled tokens under each context, and
        under the first the entropy. Collectives: the model's, those of ops/vocab_parallel.py, and
        all-reduces over the context-parallel group.
        """
        term, pg = rank_batch.algorithm.distill, rank_batch.algorithm.policy_gradient
        reads = (pg is not None and pg.credit is not None) or (
            term is not None and term.token_weight == "confidence"
        )
        signal = None
        for context in range(len(rank_batch.teacher_microbatches)):
            keeps = context == 0 and term is not None
            one = self._pass(rank_batch, context, keeps=keeps, reads=reads)
            signal = one if keeps else signal
        return signal

    def _pass(self, rank_batch: RankBatch, context: int, *, keeps: bool, reads: bool) -> TeacherSignal:
        """One context of the samples. A teacher of several passes keeps hidden states until the
        last of them.
        """
        batch, mesh, spec = rank_batch.batch, self.mesh, rank_batch.spec
        groups, several = rank_batch.teacher_microbatches[context], len(self.teacher.passes) > 1
        record_k = (
            min(spec.top_k, self.vocab_size)
            if spec.support == "record" and keeps and mesh.is_last_stage
            else None
        )
        holds = (keeps or several) and mesh.is_last_stage
        signal = TeacherSignal.empty(
            batch,
            sorted(i for group in groups for i in group),
            hidden_size=self.teacher.hidden_size if holds else 0,
            top_k=record_k,
            dtype=self.dtype,
            device=mesh.device,
        )
        repeats = rank_batch.algorithm.minibatches * rank_batch.algorithm.epochs > 1
        weight_Vh = self.teacher.output_weight(repeats=repeats) if mesh.is_last_stage else None
        logp_R, entropy_R = (torch.zeros(len(batch.response_ids), device=mesh.device) for _ in range(2))

        def read(index: Tensor, hidden_Th: Tensor) -> None:
            plain = LogProbsSpec(
                vocab_size=self.vocab_size, support="none", temperature=spec.teacher_temperature
            )
            found = fused_linear_logprobs(
                hidden_Th,
                weight_Vh,
                rank_batch.targets[index],
                plain,
                tp_group=mesh.tp_group,
                memory_bytes=self.memory_bytes,
            )
            logp_R[index], entropy_R[index] = found.logp_T.float(), found.entropy_T.float()

        def keep(microbatch: Microbatch, hidden_Th: Tensor, columns: slice) -> None:
            # on all tensor-parallel ranks alike, which alone talk to each other below
            if microbatch.is_filler:
                return
            index = microbatch.response_index
            slots, hidden_Th = signal.slot_R[index], hidden_Th.to(self.dtype)
            if record_k is not None:
                record = fused_linear_teacher_record(
                    hidden_Th,
                    weight_Vh,
                    record_k,
                    vocab_size=self.vocab_size,
                    temperature=spec.teacher_temperature,
                    tp_group=mesh.tp_group,
                    memory_bytes=self.memory_bytes,
                )
                signal.record.ids_TK[slots], signal.record.logq_TK[slots] = record.ids_TK, record.logq_TK
                signal.record.log_tail_T[slots] = record.log_tail_T
            elif holds:
                signal.hidden_Sh[slots, columns] = hidden_Th
            if reads and not several:
                read(index, hidden_Th)

        self.teacher.run(self.cut(batch, groups, context), keep)
        if not mesh.is_last_stage:
            return signal
        cp_group = mesh.cp_group if mesh.cp_size > 1 else None
        signal.complete(cp_group)
        signal.output_weight_Vh = None if record_k is not None else weight_Vh
        if reads:
            present_R = signal.slot_R >= 0
            if several:
                read(present_R.nonzero().squeeze(1), signal.hidden_Sh[signal.slot_R[present_R]])
            elif cp_group is not None:
                # each token was read on one context-parallel rank
                for values_R in (logp_R, entropy_R):
                    torch.distributed.all_reduce(values_R, group=cp_group)
            self._add_streams(rank_batch, context, logp_R, entropy_R, present_R)
        return signal

    def _add_streams(
        self, rank_batch: RankBatch, context: int, logp_R: Tensor, entropy_R: Tensor, present_R: Tensor
    ) -> None:
        if context == 0:
            none = logp_R.new_zeros(0, len(logp_R))
            rank_batch.streams |= {
                "teacher_logp": logp_R,
                "teacher_entropy": entropy_R,
                "distilled": present_R,
            }
            rank_batch.streams |= {"contrast_logp": none, "contrast_present": none.bool()}
        else:
            for name, row_R in (("contrast_logp", logp_R), ("contrast_present", present_R)):
                rank_batch.streams[name] = torch.cat([rank_batch.streams[name], row_R[None]])
