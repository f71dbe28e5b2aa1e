"""Make the tensors of a rank's microbatches, which Megatron's schedules run.

balance.py decides which samples form a microbatch.

b rows, s padded length, t packed tokens, T response tokens of one microbatch that this
context-parallel rank holds. A sequence is a prompt and the response. The prompt is the student's
prompt, or one of the sample's teacher contexts. All sequences of a sample end with the same
response, and `response_index` names each response token in each sequence. So student and teacher
are always compared on the same token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megasd.batch.batch import Batch


@dataclass
class Microbatch:
    """The input of one forward on one context-parallel rank."""

    # int64 [b, s / cp] padded, or [1, t / cp] packed: token ids.
    tokens: Tensor
    # int64, the shape of tokens: the position of each token in the padded sequence.
    position_ids: Tensor
    # int32 [b + 1]: cumulative padded lengths over all context ranks; None if padded, not packed.
    cu_seqlens: Tensor | None
    max_seqlen: int
    # int64 [T]: the rows of hidden [s * b, h] whose logits predict a response token.
    rows: Tensor
    # int64 [T]: the predicted token, as an index into the local batch's response_ids and streams.
    response_index: Tensor
    # bool [T]: all True; in filler a single False, since a rank must not run with T = 0.
    valid: Tensor
    # True if there is nothing to predict. It is a Python value, so that reading it does not wait
    # for the device.
    is_filler: bool

    def to(self, device: torch.device) -> Microbatch:
        """A copy on the device; on the CPU the microbatch itself.

        The copy to a GPU starts from pinned memory, so that the CPU does not wait for it.
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
    """Make one microbatch of each group of samples; an empty group gives filler of weight zero.

    groups: indices into the local batch. context: None for the student's prompts, 0 for the
    teacher's prompts, k for the k-th contrasting prompts. Sequences are right-padded to a multiple
    of `multiple` (2 * cp_size under context parallelism, times TP under sequence parallelism). If
    packed, each sequence is padded on its own. Causal attention never lets a real token see the
    padding. ValueError if a requested sample has no such prompt.
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
        # Filler has two tokens, since a microbatch must not be empty.
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
    """Make one microbatch of the given samples.

    samples: (prompt ids, response ids, start of the response in the batch's response_ids). If no
    response token lies on this context-parallel rank, the microbatch is filler too.
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
    """The positions of a padded sequence that this context-parallel rank holds.

    Rank r holds the chunks r and 2*cp-1-r of 2*cp chunks.
    """
    if cp_size == 1:
        return torch.arange(length)
    chunk = length // (2 * cp_size)
    low, high = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat([torch.arange(low, low + chunk), torch.arange(high, high + chunk)])
