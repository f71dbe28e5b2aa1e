"""Batch and microbatches: every response token is predicted exactly once, by the right row, in both
views, whatever the cut.

Does not prove the model's numbers (tests/distributed/test_golden.py).
"""

from __future__ import annotations

import pytest
import torch

from megasd.batch.balance import by_count, chunks
from megasd.batch.batch import Batch
from megasd.batch.microbatch import make_microbatches


def make_batch(num: int = 7) -> Batch:
    g = torch.Generator().manual_seed(3)
    prompt, teacher, response = (torch.randint(low, 9, (num,), generator=g) for low in (1, 4, 1))
    teacher[2] = 0
    tokens = int(response.sum())
    return Batch(
        prompt_ids=torch.arange(int(prompt.sum())),
        prompt_lens=prompt,
        context_ids=torch.arange(1000, 1000 + 2 * int(teacher.sum())),
        # a teacher's prompt and one to contrast it with
        context_lens=torch.stack([teacher, teacher], dim=1),
        response_ids=torch.arange(100, 100 + tokens),
        response_lens=response,
        question_weight=torch.ones(num, dtype=torch.float64),
        question_size=torch.ones(num, dtype=torch.int64),
        scored=torch.ones(num, dtype=torch.bool),
        streams={"rollout_logp": torch.arange(tokens, dtype=torch.float32)},
    )


@pytest.mark.parametrize("context", [None, 0, 1])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_each_response_token_is_predicted_once(
    context: int | None, packing: bool, cp_size: int, micro_batch_size: int
) -> None:
    batch = make_batch()
    samples = [i for i in range(len(batch)) if context is None or batch.distilled[i]]
    # one of filler
    count = -(-len(samples) // micro_batch_size) + 1
    seen: list[int] = []
    for cp_rank in range(cp_size):
        cut = make_microbatches(
            batch, chunks(samples, micro_batch_size, count), context, packing=packing,
            cp_rank=cp_rank, cp_size=cp_size, multiple=2 * cp_size,
        )  # fmt: skip
        assert len(cut) == count
        for m in cut:
            # rows of Megatron's hidden [s, b, h]
            flat = m.tokens[0] if packing else m.tokens.T.reshape(-1)
            positions = m.position_ids[0] if packing else m.position_ids.T.reshape(-1)
            assert m.tokens.shape == m.position_ids.shape and len(m.rows) == len(m.valid) > 0
            assert m.valid.all() != m.is_filler and (len(m.valid) == 1 or not m.is_filler)
            for row, index in zip(m.rows[m.valid].tolist(), m.response_index[m.valid].tolist(), strict=True):
                seen.append(index)
                # The row holds the token before the predicted one: a response token, or the prompt's last.
                before = int(flat[row])
                assert before == 100 + index - 1 or before not in batch.response_ids.tolist()
                assert positions[row] >= 0
    taught = torch.isin(torch.arange(len(batch)), torch.tensor(samples)).repeat_interleave(
        batch.response_lens
    )
    assert sorted(seen) == taught.nonzero().squeeze(1).tolist()


def test_shards_hold_every_sample_once_and_share_the_work() -> None:
    batch = make_batch(16)
    active = torch.arange(16) % 3 != 0
    parts = by_count((batch.prompt_lens + batch.response_lens).tolist(), active.tolist(), 4, 2)
    ids = torch.cat([batch.select(part.samples).response_ids for part in parts])
    assert sorted(ids.tolist()) == batch.response_ids.tolist()
    counts = [sum(map(len, part.microbatches)) for part in parts]
    assert sum(counts) == int(active.sum()) and max(counts) - min(counts) <= 1
    assert [len(part.microbatches) for part in parts] == [-(-max(counts) // 2)] * 4


def test_tensors_and_back() -> None:
    batch = make_batch()
    again = Batch.from_tensors(batch.to_tensors())
    assert all(
        torch.equal(a, b)
        for a, b in zip(batch.to_tensors().values(), again.to_tensors().values(), strict=True)
    )


def test_inconsistent_batches_are_refused() -> None:
    tensors = make_batch().to_tensors()
    with pytest.raises(ValueError, match="rollout_logp"):
        Batch.from_tensors(tensors | {"stream:rollout_logp": torch.zeros(1)})
    with pytest.raises(ValueError, match="prompt_ids"):
        Batch.from_tensors(tensors | {"prompt_ids": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="without teacher context 1"):
        make_microbatches(make_batch(), [[2]], 1, packing=False)


def test_minibatches_are_whole_questions() -> None:
    batch = make_batch(12)
    batch.question_size = torch.tensor([3] * 3 + [2] * 2 + [4] * 4 + [1] + [2] * 2)
    parts = batch.parts(3)
    assert [part.question_size.tolist() for part in parts] == [[3] * 3, [2] * 2 + [4] * 4, [1, 2, 2]]
    assert torch.equal(torch.cat([part.response_ids for part in parts]), batch.response_ids)
    with pytest.raises(ValueError, match="5 questions cannot be cut into 6"):
        batch.parts(6)
