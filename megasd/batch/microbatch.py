"""The microbatches of a rank as the tensors that Megatron's schedules run; which samples share one
is balance.py's matter.

b rows, s padded length, t packed tokens, T response tokens of one microbatch that this
context-parallel rank holds. A sequence is a prompt and the response: the student's prompt, or one
of the sample's teacher contexts. The response is the same tail of all of them, and `response_index`
names its tokens in each, so a teacher's hidden state can never meet another token than its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megasd.batch.batch import Batch


@dataclass
class Microbatch:
    """What one forward reads on one context-parallel rank."""

    # int64 [b, s / cp] padded, or [1, t / cp] packed
    tokens: Tensor
    # int64, like tokens
    position_ids: Tensor
    # int32 [b + 1] for packed microbatches: global (all context ranks) padded lengths
    cu_seqlens: Tensor | None
    max_seqlen: int
    # int64 [T]: rows of hidden [s * b, h] whose logits predict a response token
    rows: Tensor
    # int64 [T]: the predicted token, an index into the local batch's response_ids and streams
    response_index: Tensor
    # bool [T]: all True, or one False where there is nothing to predict (a rank must not run with T
    # = 0)
    valid: Tensor
    # the latter, known without asking the device
    is_filler: bool

    def to(self, device: torch.device) -> Microbatch:
        """A copy on the device. To a GPU from pinned memory, so that nobody waits for it; on the
        CPU itself.
        """
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            position_ids=move(self.position_ids),
            cu_seqlens=None if self.cu_seqlens is None else move(self.cu_seqlens),
            rows=move(self.rows),
            response_index=move(self.response_index),
            valid=move(self.valid),
        )


def make_microbatches(
    batch: Batch,
    groups: list[list[int]],
    context: int | None,
    *,
    packing: bool,
    cp_rank: int = 0,
    cp_size: int = 1,
    multiple: int = 1,
    pad_id: int = 0,
) -> list[Microbatch]:
    """One microbatch of each group of samples of the local batch; an empty group gives filler of weight zero.

    context: None for the student's prompts, 0 for the teacher's, k for the k-th that it is contrasted with.
    Sequences are right-padded to a multiple of `multiple` (2 * cp_size under context parallelism,
    times TP under sequence parallelism), each on its own when packed. Causal attention never lets a
    real token see the padding.
    """
    prompt_parts = (
        batch.prompt_ids.split(batch.prompt_lens.tolist())
        if context is None
        else batch.context_parts(context)
    )
    response_parts = batch.response_ids.split(batch.response_lens.tolist())
    response_starts = (batch.response_lens.cumsum(0) - batch.response_lens).tolist()
    if any(len(prompt_parts[i]) == 0 for chosen in groups for i in chosen):
        raise ValueError(f"a sample without teacher context {context} was requested")
    microbatches = []
    for chosen in groups:
        samples = [(prompt_parts[i], response_parts[i], response_starts[i]) for i in chosen]
        # two tokens stand in for nothing
        filler = [(response_parts[0][:1], response_parts[0][:1], 0)]
        microbatches.append(
            _microbatch(
                samples or filler,
                packing=packing,
                cp_rank=cp_rank,
                cp_size=cp_size,
                multiple=multiple,
                pad_id=pad_id,
                is_filler=not samples,
            )
        )
    return microbatches


def _microbatch(
    samples: list[tuple[Tensor, Tensor, int]],
    *,
    packing: bool,
    cp_rank: int,
    cp_size: int,
    multiple: int,
    pad_id: int,
    is_filler: bool,
) -> Microbatch:
    """samples: prompt ids, response ids, and the place of the response in the batch's response_ids.

    A microbatch none of whose response tokens lies on this context-parallel rank is filler too.
    """
    sequences = [torch.cat([prompt, response]) for prompt, response, _ in samples]
    lengths = [-(-len(s) // multiple) * multiple for s in sequences]
    if not packing:
        lengths = [max(lengths)] * len(sequences)
    tokens, positions, rows, index = [], [], [], []
    local_start = 0
    for row, ((prompt, response, start), sequence, length) in enumerate(
        zip(samples, sequences, lengths, strict=True)
    ):
        held = _held_positions(length, cp_rank, cp_size)
        padded = torch.full((length,), pad_id, dtype=torch.int64)
        padded[: len(sequence)] = sequence
        tokens.append(padded[held])
        positions.append(held)
        # The logits at position q predict token q + 1: response tokens sit at len(prompt) ..
        # len(sequence) - 1.
        offset = held + 1 - len(prompt)
        predicts = ((offset >= 0) & (offset < len(response))).nonzero().squeeze(1)
        rows.append(local_start + predicts if packing else predicts * len(samples) + row)
        index.append(start + offset[predicts])
        local_start += len(held)
    all_rows, all_index = torch.cat(rows), torch.cat(index)
    valid = torch.ones(len(all_rows), dtype=torch.bool)
    if is_filler or len(all_rows) == 0:
        is_filler = True
        all_rows = all_index = torch.zeros(1, dtype=torch.int64)
        valid = torch.zeros(1, dtype=torch.bool)
    return Microbatch(
        tokens=torch.cat(tokens)[None] if packing else torch.stack(tokens),
        position_ids=torch.cat(positions)[None] if packing else torch.stack(positions),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if packing else None,
        max_seqlen=max(lengths),
        rows=all_rows,
        response_index=all_index,
        valid=valid,
        is_filler=is_filler,
    )


def _held_positions(length: int, cp_rank: int, cp_size: int) -> Tensor:
    """Positions of a padded sequence that this context-parallel rank holds: chunks r and 2*cp-1-r of 2*cp."""
    if cp_size == 1:
        return torch.arange(length)
    chunk = length // (2 * cp_size)
    low, high = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat([torch.arange(low, low + chunk), torch.arange(high, high + chunk)])
