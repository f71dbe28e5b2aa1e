"""What is kept of the teacher's pass until the student's: a hidden state or an O(K) record per
response token, found by its place.

Student and teacher read different prompts, so their packing, context-parallel shards and
microbatches do not align. The signal is therefore kept by (sample, response offset), and the
student's microbatch fetches the rows of the tokens that it holds.

S kept tokens, R response tokens of the rank batch, T tokens of a microbatch, h hidden, V local
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.batch.batch import Batch
from megasd.ops.fused_linear_loss import TeacherHead
from megasd.ops.vocab_parallel import TeacherRecord


@dataclass
class TeacherSignal:
    """Rows for the taught tokens and one more, whose values mean nothing, for tokens without a
    teacher (their weight is 0).

    Exactly one of `hidden_Sh` (with the teacher's own output layer) and `record` is there; on
    pipeline stages before the last, neither.
    """

    # int64: the row of each response token, -1 (the spare row) where there is none
    slot_R: Tensor
    hidden_Sh: Tensor | None = None
    output_weight_Vh: Tensor | None = None
    record: TeacherRecord | None = None
    # [R] or [C - 1, R] each, on the last stage; see loss/token_weights.py
    streams: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls,
        batch: Batch,
        samples: list[int],
        *,
        hidden_size: int,
        top_k: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Rows, all zero, for the response tokens of `samples`: hidden states, or a record of
        `top_k` tokens when that is given.
        """
        slot_R = torch.full((len(batch.response_ids),), -1, dtype=torch.int64)
        starts = (batch.response_lens.cumsum(0) - batch.response_lens).tolist()
        used = 0
        for i in samples:
            length = int(batch.response_lens[i])
            slot_R[starts[i] : starts[i] + length] = torch.arange(used, used + length)
            used += length
        signal = cls(slot_R.to(device))
        if top_k is None:
            signal.hidden_Sh = torch.zeros(used + 1, hidden_size, dtype=dtype, device=device)
        else:
            rows = {"size": (used + 1, top_k), "device": device}
            signal.record = TeacherRecord(
                torch.zeros(**rows, dtype=torch.int32),
                torch.zeros(**rows),
                torch.zeros(used + 1, device=device),
            )
        return signal

    @property
    def tensors(self) -> list[Tensor]:
        """The kept rows."""
        if self.record is not None:
            return [self.record.ids_TK, self.record.logq_TK, self.record.log_tail_T]
        return [] if self.hidden_Sh is None else [self.hidden_Sh]

    @property
    def num_bytes(self) -> int:
        """Bytes kept on this rank: 8 K + 4 a token for a record, h times the model's word for
        hidden states.
        """
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def complete(self, cp_group: dist.ProcessGroup | None) -> None:
        """After the teacher's pass: a token was filled on one context-parallel rank, zero on the
        others. One all_reduce a tensor.
        """
        if cp_group is not None:
            for t in self.tensors:
                dist.all_reduce(t, group=cp_group)
        # a record's ids are distinct: no token is chosen in the spare row
        if self.record is not None:
            self.record.ids_TK[-1] = -1

    def of(self, index_T: Tensor) -> TeacherHead | TeacherRecord:
        """The teacher of the response tokens `index_T` (places in the rank batch's response_ids)."""
        rows_T = self.slot_R[index_T]
        if self.record is not None:
            return self.record[rows_T]
        return TeacherHead(self.hidden_Sh[rows_T], self.output_weight_Vh)
