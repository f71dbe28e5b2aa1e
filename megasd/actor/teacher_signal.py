"""What the teacher's forward leaves for the student's forward over the same samples.

Student and teacher read different prompts. Therefore their packing, their context-parallel shards
and their microbatches do not align. A signal is kept by sample and place in the response, and the
student's microbatch fetches the rows of the tokens that it holds.

S kept rows, R response tokens of the rank batch, T tokens of a microbatch, K top-k, h hidden,
V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.batch.batch import Batch
from megasd.ops.fused_linear_loss import TeacherHead
from megasd.ops.vocab_parallel import TeacherRecord


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher of a rank batch: rows for the distillation loss, streams for the token weights.

    kept: what distillation compares the student with, one row per distilled token and one spare
    row. It is a hidden state `[S, h]` with the teacher's output layer, or a record of K tokens.
    Tokens without a teacher read the spare row, which means nothing: their weight is 0. kept is
    None for an algorithm without a distillation term, and before the last pipeline stage.
    """

    # int64 [R]: the row of each response token, -1 (the spare row) for a token without a teacher;
    # empty where nothing is kept
    slot_R: Tensor
    kept: TeacherHead | TeacherRecord | None = None
    # [R] or [C - 1, R] each, on the last stage; loss/token_weights.py says which and what for
    streams: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[Tensor]:
        """The kept tensors of S rows each."""
        if isinstance(self.kept, TeacherRecord):
            return [self.kept.ids_TK, self.kept.logq_TK, self.kept.log_tail_T]
        return [] if self.kept is None else [self.kept.hidden_Th]

    @property
    def num_bytes(self) -> int:
        """Bytes of the kept rows on this rank.

        A row takes 8 K + 4 bytes as a record, and h words of the model's dtype as a hidden state.
        """
        return sum(t.numel() * t.element_size() for t in self.rows)

    def of(self, index_T: Tensor) -> TeacherHead | TeacherRecord | None:
        """The teacher of some response tokens, for ops/fused_linear_loss.py.

        index_T: int64 [T], places in the rank batch's response_ids.
        """
        if self.kept is None:
            return None
        rows_T = self.slot_R[index_T]
        if isinstance(self.kept, TeacherRecord):
            return self.kept[rows_T]
        return TeacherHead(self.kept.hidden_Th[rows_T], self.kept.weight_Vh)


def no_signal(device: torch.device) -> TeacherSignal:
    """The signal of an algorithm without a teacher: no rows and no streams."""
    return TeacherSignal(torch.zeros(0, dtype=torch.int64, device=device))


def row_of_each_token(batch: Batch, samples: list[int]) -> tuple[Tensor, int]:
    """(slot_R on the CPU, number of rows) for the response tokens of `samples`, in that order."""
    slot_R = torch.full((len(batch.response_ids),), -1, dtype=torch.int64)
    starts = (batch.response_lens.cumsum(0) - batch.response_lens).tolist()
    used = 0
    for i in samples:
        length = int(batch.response_lens[i])
        slot_R[starts[i] : starts[i] + length] = torch.arange(used, used + length)
        used += length
    return slot_R, used


class HiddenRows:
    """Hidden states `[S, h]` that a schedule's callback fills in, microbatch by microbatch.

    The tensor is made beforehand: parts that are joined afterwards would need twice the memory.
    The last row is the spare row.
    """

    def __init__(self, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._hidden_Sh = torch.zeros(num_rows + 1, hidden_size, dtype=dtype, device=device)

    def add(self, slots_T: Tensor, hidden_Th: Tensor, columns: slice) -> None:
        """Write some rows' `columns` of h. slots_T: int64, as slot_R has them."""
        self._hidden_Sh[slots_T, columns] = hidden_Th

    def finish(self, cp_group: dist.ProcessGroup | None) -> Tensor:
        """All rows. Collectives: one all_reduce over context-parallel ranks (None: none)."""
        return _sum_over(cp_group, self._hidden_Sh)


class RecordRows:
    """Records of K tokens that a schedule's callback fills in, microbatch by microbatch.

    The tensors are made beforehand, as those of HiddenRows. The last row is the spare row.
    """

    def __init__(self, num_rows: int, top_k: int, device: torch.device) -> None:
        self._record = TeacherRecord(
            torch.zeros(num_rows + 1, top_k, dtype=torch.int32, device=device),
            torch.zeros(num_rows + 1, top_k, device=device),
            torch.zeros(num_rows + 1, device=device),
        )

    def add(self, slots_T: Tensor, record: TeacherRecord) -> None:
        """Write some rows. slots_T: int64, as slot_R has them."""
        self._record.ids_TK[slots_T] = record.ids_TK
        self._record.logq_TK[slots_T] = record.logq_TK
        self._record.log_tail_T[slots_T] = record.log_tail_T

    def finish(self, cp_group: dist.ProcessGroup | None) -> TeacherRecord:
        """All rows. Collectives: three all_reduces over context-parallel ranks (None: none)."""
        ids_TK = _sum_over(cp_group, self._record.ids_TK)
        logq_TK = _sum_over(cp_group, self._record.logq_TK)
        log_tail_T = _sum_over(cp_group, self._record.log_tail_T)
        # A record's ids are distinct: the spare row chooses no token.
        ids_TK[-1] = -1
        return TeacherRecord(ids_TK, logq_TK, log_tail_T)


def _sum_over(cp_group: dist.ProcessGroup | None, filled: Tensor) -> Tensor:
    """A token was filled in on one context-parallel rank and is zero on all other ranks of it."""
    if cp_group is not None:
        dist.all_reduce(filled, group=cp_group)
    return filled
