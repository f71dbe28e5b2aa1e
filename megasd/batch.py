"""The meeting point of the two halves: a step's samples as flat tensors with named streams.

Left of it plain Python over groups, right of it tensors on every rank. N samples, R response tokens of all samples one
after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megasd.algo.advantage import advantages
from megasd.algo.context import teacher_contexts, with_solution
from megasd.algo.pass_rate import question_weight
from megasd.config import AlgorithmConfig
from megasd.data.chat import Chat
from megasd.types import Group, Prompt, Sample, UserError, Verdict


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


def build_batch(groups: list[Group], algorithm: AlgorithmConfig, chat: Chat, *, max_length: int) -> tuple[Batch, dict[str, float]]:
    """Scored groups -> the batch of a step, and figures about it.

    A teacher sequence longer than `max_length` tokens leaves its sample untaught; such samples are counted in "untaught_too_long".
    """
    weight_of = question_weight(algorithm.question_weight)
    prompt_ids, teacher_ids, response_ids, logps, per_sample, too_long = [], [], [], [], [], 0
    for group in groups:
        contexts: list = [None] * len(group.samples)
        if algorithm.teacher is not None:
            teacher = algorithm.teacher
            contexts = teacher_contexts(group, teacher.context, template=teacher.template, strip_thinking=teacher.strip_thinking)
        advantages_G = [0.0] * len(group.samples)
        if algorithm.policy_gradient is not None:
            advantages_G = advantages(group, algorithm.policy_gradient.advantage)
        encoded: dict[str, list[int]] = {}  # the failures of a group share one context
        for sample, context, advantage in zip(group.samples, contexts, advantages_G, strict=True):
            ids: list[int] = []
            if context is not None:
                key = context.messages[-1]["content"]
                ids = encoded[key] = encoded.get(key) or chat.encode_prompt(context.messages)
                if len(ids) + len(sample.response_ids) > max_length:
                    ids, too_long = [], too_long + 1
            prompt_ids.append(sample.prompt_ids)
            teacher_ids.append(ids)
            response_ids.append(sample.response_ids)
            logps.append(sample.response_logps)
            scored = sample.verdict is not None and sample.verdict.counts
            per_sample.append((weight_of(group.pass_rate), len(group.samples), scored, advantage))
    weights, sizes, scored, advantages_N = zip(*per_sample, strict=True)
    lens = torch.tensor([len(r) for r in response_ids])
    batch = Batch(
        prompt_ids=_flat(prompt_ids),
        prompt_lens=torch.tensor([len(p) for p in prompt_ids]),
        teacher_ids=_flat(teacher_ids),
        teacher_lens=torch.tensor([len(t) for t in teacher_ids]),
        response_ids=_flat(response_ids),
        response_lens=lens,
        question_weight=torch.tensor(weights, dtype=torch.float64),
        question_size=torch.tensor(sizes),
        scored=torch.tensor(scored),
        streams={
            "rollout_logp": torch.tensor([x for one in logps for x in one], dtype=torch.float32),
            "advantage": torch.tensor(advantages_N, dtype=torch.float32).repeat_interleave(lens),
        },
    )
    taught = batch.taught & (batch.question_weight > 0)
    tokens = int(batch.prompt_lens.sum() + batch.response_lens.sum())
    return batch, {"taught_samples": float(taught.sum()), "untaught_too_long": float(too_long), "batch_tokens": float(tokens)}


def dataset_groups(prompts: list[Prompt], algorithm: AlgorithmConfig, chat: Chat, with_context: list[bool]) -> list[Group]:
    """One sample a row: the row's own solution, its prompt carrying that solution where `with_context` says so. UserError without one."""
    groups = []
    for prompt, context in zip(prompts, with_context, strict=True):
        if not prompt.solution:
            raise UserError(f'row {prompt.id!r}: algorithm.source=dataset learns the row\'s "solution"; add one')
        messages = with_solution(prompt.messages, prompt.solution, template=algorithm.nll.template) if context else prompt.messages
        response = chat.encode_response(prompt.solution)
        groups.append(
            Group(
                prompt,
                [
                    Sample(
                        prompt_id=prompt.id,
                        index=0,
                        prompt_ids=chat.encode_prompt(messages),
                        response_ids=response,
                        response_logps=[0.0] * len(response),
                        text=prompt.solution,
                        finish_reason="stop",
                        version=0,
                        verdict=Verdict.RIGHT,
                    )
                ],
            )
        )
    return groups


def _flat(lists: list[list[int]]) -> Tensor:
    return torch.tensor([x for one in lists for x in one], dtype=torch.int64)
