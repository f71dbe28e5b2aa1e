"""The meeting point of the two halves: samples as flat tensors with named streams, and their cutting into microbatches.

N samples, R response tokens of all samples one after the other, b rows, s padded length, T response tokens of one
microbatch that this context-parallel rank holds. A *view* is "student" (prompt + response) or "teacher" (teacher prompt
+ response): the response is the same tail of both, and `response_index` names its tokens in either, so a teacher's
hidden state can never meet another token than its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

VIEWS = ("student", "teacher")


@dataclass
class Batch:
    """N samples on the CPU. Every rank holds the whole batch of a step, then takes its `shard`."""

    prompt_ids: Tensor  # int64, prompts one after the other
    prompt_lens: Tensor  # int64 [N]
    teacher_ids: Tensor  # int64, teacher prompts one after the other
    teacher_lens: Tensor  # int64 [N]; 0 = the sample has no teacher
    response_ids: Tensor  # int64 [R]
    response_lens: Tensor  # int64 [N], each at least 1
    question_weight: Tensor  # float64 [N], raw (not normalised) weight of the sample's question
    question_size: Tensor  # int64 [N], samples of the sample's question in the whole batch
    scored: Tensor  # bool [N], False where the verifier gave no verdict
    streams: dict[str, Tensor] = field(default_factory=dict)  # float32 [R] each: "rollout_logp", "advantage"

    def __post_init__(self) -> None:
        if int(self.response_lens.min()) < 1:
            raise ValueError("a sample without response tokens cannot be trained on")
        for name, lens in (("prompt_ids", "prompt_lens"), ("teacher_ids", "teacher_lens"), ("response_ids", "response_lens")):
            if len(getattr(self, name)) != int(getattr(self, lens).sum()):
                raise ValueError(f"{name} holds {len(getattr(self, name))} tokens, {lens} sums to {int(getattr(self, lens).sum())}")
        for name, stream in self.streams.items():
            if len(stream) != len(self.response_ids):
                raise ValueError(f"stream {name} has {len(stream)} values for {len(self.response_ids)} response tokens")

    def __len__(self) -> int:
        return len(self.response_lens)

    @property
    def taught(self) -> Tensor:
        """bool [N]: the sample has a teacher context."""
        return self.teacher_lens > 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat dict for `broadcast_tensors`; the inverse of `from_tensors`."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "streams"}
        return named | {f"stream:{name}": stream for name, stream in self.streams.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Batch:
        streams = {name.removeprefix("stream:"): t for name, t in tensors.items() if name.startswith("stream:")}
        return cls(**{name: t for name, t in tensors.items() if not name.startswith("stream:")}, streams=streams)

    def select(self, indices: list[int]) -> Batch:
        """The given samples, in that order."""
        index = torch.tensor(indices, dtype=torch.int64)

        def ragged(values: Tensor, lens: Tensor) -> Tensor:
            parts = values.split(lens.tolist())
            return torch.cat([parts[i] for i in indices]) if indices else values[:0]

        return Batch(
            prompt_ids=ragged(self.prompt_ids, self.prompt_lens),
            teacher_ids=ragged(self.teacher_ids, self.teacher_lens),
            response_ids=ragged(self.response_ids, self.response_lens),
            streams={name: ragged(stream, self.response_lens) for name, stream in self.streams.items()},
            **{
                name: getattr(self, name)[index]
                for name in ("prompt_lens", "teacher_lens", "response_lens", "question_weight", "question_size", "scored")
            },
        )

    def shard(self, active: Tensor, dp_rank: int, dp_size: int) -> tuple[Batch, Tensor]:
        """This data-parallel rank's samples and their `active` flags (bool [N]): long ones first, dealt there and back.

        Inactive samples (zero weight: they need no forward) are dealt too, so that every sample is counted on one rank.
        The batch must hold at least dp_size samples.
        """
        lengths = (torch.maximum(self.prompt_lens, self.teacher_lens) + self.response_lens).tolist()
        order = sorted(range(len(self)), key=lambda i: (not active[i], -lengths[i], i))
        mine = [i for k, i in enumerate(order) if _dealt_to(k, dp_size) == dp_rank]
        return self.select(mine), active[torch.tensor(mine, dtype=torch.int64)]

    def num_microbatches(self, active: Tensor, dp_size: int, micro_batch_size: int) -> int:
        """Microbatches a rank, the same on all (expert parallelism needs that), at least one."""
        counts = [0] * dp_size
        for k in range(int(active.sum())):
            counts[_dealt_to(k, dp_size)] += 1
        return max(1, -(-max(counts) // micro_batch_size))


def _dealt_to(k: int, dp_size: int) -> int:
    """Boustrophedon: 0 1 2 2 1 0 0 1 2 ..., which balances lengths sorted in falling order."""
    lap, place = divmod(k, dp_size)
    return place if lap % 2 == 0 else dp_size - 1 - place


@dataclass
class Microbatch:
    """What one forward reads on one context-parallel rank."""

    tokens: Tensor  # int64 [b, s / cp] padded, or [1, t / cp] packed
    position_ids: Tensor  # int64, like tokens
    cu_seqlens: Tensor | None  # int32 [b + 1] for packed microbatches: global (all context ranks) padded lengths
    max_seqlen: int
    rows: Tensor  # int64 [T]: rows of hidden [s * b, h] whose logits predict a response token
    response_index: Tensor  # int64 [T]: the predicted token, an index into the local batch's response_ids and streams
    valid: Tensor  # bool [T]: False for filler (a rank must not run with T = 0)

    def to(self, device: torch.device) -> Microbatch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Microbatch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})


def make_microbatches(
    batch: Batch,
    samples: list[int],
    view: str,
    *,
    count: int,
    micro_batch_size: int,
    packing: bool,
    cp_rank: int = 0,
    cp_size: int = 1,
    multiple: int = 1,
    pad_id: int = 0,
) -> list[Microbatch]:
    """`count` microbatches of the given samples of the local batch, in order; missing ones are filler of weight zero.

    Sequences are right-padded to a multiple of `multiple` (2 * cp_size under context parallelism, times TP under sequence
    parallelism), each on its own when packed. Causal attention never lets a real token see the padding.
    """
    if view not in VIEWS:
        raise ValueError(f"view {view!r} is none of {VIEWS}")
    prompts = (batch.prompt_ids, batch.prompt_lens) if view == "student" else (batch.teacher_ids, batch.teacher_lens)
    prompt_parts = prompts[0].split(prompts[1].tolist())
    response_parts = batch.response_ids.split(batch.response_lens.tolist())
    response_starts = (batch.response_lens.cumsum(0) - batch.response_lens).tolist()
    if any(len(prompt_parts[i]) == 0 for i in samples):
        raise ValueError(f"a sample without a {view} prompt was asked for")
    microbatches = []
    for start in range(0, count * micro_batch_size, micro_batch_size):
        chosen = samples[start : start + micro_batch_size]
        filler = not chosen
        if filler:
            chosen = [0]
            prompt_parts = list(prompt_parts)
            if len(prompt_parts[0]) == 0:  # an untaught sample may stand in for nothing: any one token will do
                prompt_parts[0] = response_parts[0][:1]
        sequences = [torch.cat([prompt_parts[i], response_parts[i]]) for i in chosen]
        lengths = [-(-len(s) // multiple) * multiple for s in sequences]
        if not packing:
            lengths = [max(lengths)] * len(sequences)
        tokens, positions, rows, index = [], [], [], []
        local_start = 0
        for row, (i, sequence, length) in enumerate(zip(chosen, sequences, lengths, strict=True)):
            held = _held_positions(length, cp_rank, cp_size)
            padded = torch.full((length,), pad_id, dtype=torch.int64)
            padded[: len(sequence)] = sequence
            tokens.append(padded[held])
            positions.append(held)
            # The logits at position q predict token q + 1: response tokens sit at len(prompt) .. len(sequence) - 1.
            offset = held + 1 - len(prompt_parts[i])
            predicts = ((offset >= 0) & (offset < len(response_parts[i]))).nonzero().squeeze(1)
            rows.append(local_start + predicts if packing else predicts * len(chosen) + row)
            index.append(response_starts[i] + offset[predicts])
            local_start += len(held)
        all_rows, all_index = torch.cat(rows), torch.cat(index)
        valid = torch.ones(len(all_rows), dtype=torch.bool)
        if filler or len(all_rows) == 0:
            all_rows = all_index = torch.zeros(1, dtype=torch.int64)
            valid = torch.zeros(1, dtype=torch.bool)
        join = (lambda parts: torch.cat(parts)[None]) if packing else torch.stack
        microbatches.append(
            Microbatch(
                tokens=join(tokens),
                position_ids=join(positions),
                cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if packing else None,
                max_seqlen=max(lengths),
                rows=all_rows,
                response_index=all_index,
                valid=valid,
            )
        )
    return microbatches


def _held_positions(length: int, cp_rank: int, cp_size: int) -> Tensor:
    """Positions of a padded sequence that this context-parallel rank holds: chunks r and 2*cp-1-r of 2*cp."""
    if cp_size == 1:
        return torch.arange(length)
    chunk = length // (2 * cp_size)
    low, high = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat([torch.arange(low, low + chunk), torch.arange(high, high + chunk)])
