"""The teacher's signal finds its token in every layout, by sample and place in the response.

Proves rows, spare row and bytes, of hidden states and of records. tests/distributed/test_golden.py
proves the whole way through a model, with layouts and context parallelism.
"""

from __future__ import annotations

import torch

from megasd.actor.teacher_signal import HiddenRows, RecordRows, TeacherSignal, row_of_each_token
from megasd.batch.batch import Batch
from megasd.batch.microbatch import make_microbatches
from megasd.ops.fused_linear_loss import TeacherHead
from megasd.ops.vocab_parallel import TeacherRecord


def batch() -> Batch:
    """Three samples; teacher prompts are longer than the student's, the second sample has none."""
    lens = {"prompt": [2, 3, 4], "teacher": [5, 0, 7], "response": [3, 2, 4]}
    ids = {name: torch.arange(sum(n)) for name, n in lens.items()}
    return Batch(
        prompt_ids=ids["prompt"],
        prompt_lens=torch.tensor(lens["prompt"]),
        context_ids=ids["teacher"],
        context_lens=torch.tensor(lens["teacher"])[:, None],
        response_ids=ids["response"],
        response_lens=torch.tensor(lens["response"]),
        question_weight=torch.ones(3, dtype=torch.float64),
        question_size=torch.full((3,), 3),
        scored=torch.ones(3, dtype=torch.bool),
        streams={},
    )


def test_states_filled_in_teacher_order_are_read_in_student_order():
    """Teacher: one packed microbatch per context rank of two; student: padded, another microbatch
    size, no context parallelism.
    """
    slot_R, num_rows = row_of_each_token(batch(), [0, 2])
    rows = HiddenRows(num_rows, 6, torch.bfloat16, torch.device("cpu"))
    for cp_rank in (0, 1):
        cut = dict(packing=True, cp_rank=cp_rank, cp_size=2, multiple=4)
        for microbatch in make_microbatches(batch(), [[0], [2]], 0, **cut):
            index = microbatch.response_index[microbatch.valid]
            rows.add(slot_R[index], index.to(torch.bfloat16)[:, None].expand(-1, 6) + 1, slice(0, 6))
    kept = TeacherSignal(slot_R, TeacherHead(rows.finish(None), torch.zeros(4, 6)))
    (student,) = make_microbatches(batch(), [[0, 1, 2]], None, packing=False)
    head = kept.of(student.response_index)
    assert isinstance(head, TeacherHead)
    undistilled = (student.response_index >= 3) & (student.response_index < 5)
    assert torch.equal(head.hidden_Th[~undistilled, 0].long(), student.response_index[~undistilled] + 1)
    assert (head.hidden_Th[undistilled] == 0).all()
    assert kept.num_bytes == (7 + 1) * 6 * 2


def test_a_record_and_its_spare_row():
    slot_R, num_rows = row_of_each_token(batch(), [0, 2])
    rows = RecordRows(num_rows, 4, torch.device("cpu"))
    ids_TK = torch.arange(4, dtype=torch.int32).expand(num_rows, 4)
    rows.add(torch.arange(num_rows), TeacherRecord(ids_TK, -torch.ones(num_rows, 4), torch.zeros(num_rows)))
    kept = TeacherSignal(slot_R, rows.finish(None))
    # last token of sample 2, a token without a teacher, the first of sample 0
    record = kept.of(torch.tensor([8, 3, 0]))
    assert isinstance(record, TeacherRecord)
    assert record.ids_TK.tolist() == [[0, 1, 2, 3], [-1] * 4, [0, 1, 2, 3]]
    assert kept.num_bytes == (7 + 1) * (8 * 4 + 4)


def test_no_distilled_sample():
    slot_R, num_rows = row_of_each_token(batch(), [])
    rows = HiddenRows(num_rows, 6, torch.float32, torch.device("cpu"))
    kept = TeacherSignal(slot_R, TeacherHead(rows.finish(None), torch.zeros(4, 6)))
    assert kept.of(torch.tensor([0, 5])).hidden_Th.shape == (2, 6)
