"""The samples of a step as flat tensors with named streams.

batch/build.py makes a Batch from groups in plain Python, on rank 0; every rank then works on the
tensors. N samples, R response tokens of all samples one after the other, C teacher contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

TERMS = ("distill", "policy_gradient", "nll")


@dataclass
class Batch:
    """N samples on the CPU, with the samples of a question next to each other.

    Every rank holds the whole batch of a step and selects the samples of its rank plan
    (batch/shard.py).
    """

    # int64: the prompts of all samples, one after the other.
    prompt_ids: Tensor
    # int64 [N]: tokens of each prompt.
    prompt_lens: Tensor
    # int64: the teacher prompts of sample 0, of sample 1, ...
    context_ids: Tensor
    # int64 [N, C]: tokens of each teacher prompt. Column 0 is the teacher's prompt; the other
    # columns are the contrasting prompts. 0 means that the sample has no such prompt.
    context_lens: Tensor
    # int64 [R]: the response tokens of all samples.
    response_ids: Tensor
    # int64 [N]: tokens of each response, at least 1.
    response_lens: Tensor
    # float64 [N]: the raw (not normalised) weight of the sample's question.
    question_weight: Tensor
    # int64 [N]: how many samples the sample's question has in the whole batch.
    question_size: Tensor
    # bool [N]: False where the verifier gave no verdict.
    scored: Tensor
    # bool [N]: the sample was judged right. An empty tensor becomes False for all samples.
    right: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    # term -> bool [N]: the samples that take part in the term; see `mask`.
    masks: dict[str, Tensor] = field(default_factory=dict)
    # name ("rollout_logp", "advantage") -> float32 [R].
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if int(self.response_lens.min()) < 1:
            raise ValueError("a sample without response tokens cannot be trained on")
        if len(self.right) == 0:
            self.right = torch.zeros_like(self.scored)
        for name, lens in (
            ("prompt_ids", "prompt_lens"),
            ("context_ids", "context_lens"),
            ("response_ids", "response_lens"),
        ):
            if len(getattr(self, name)) != int(getattr(self, lens).sum()):
                raise ValueError(
                    f"{name} holds {len(getattr(self, name))} tokens, {lens} sums to"
                    f" {int(getattr(self, lens).sum())}"
                )
        for name, stream in self.streams.items():
            if len(stream) != len(self.response_ids):
                raise ValueError(
                    f"stream {name} has {len(stream)} values for {len(self.response_ids)} response tokens"
                )

    def __len__(self) -> int:
        return len(self.response_lens)

    @property
    def distilled(self) -> Tensor:
        """bool [N]: the sample has a teacher context."""
        return self.context_lens[:, 0] > 0

    def mask(self, term: str) -> Tensor:
        """bool [N]: the samples that take part in a term.

        Without an entry in `masks`, samples with a teacher take part in "distill", scored ones in
        "policy_gradient" and all in "nll".
        """
        defaults = {
            "distill": self.distilled,
            "policy_gradient": self.scored,
            "nll": torch.ones_like(self.scored),
        }
        return self.masks.get(term, defaults[term])

    def context_parts(self, context: int) -> list[Tensor]:
        """The prompt ids of one context column by sample; empty if a sample has no such prompt."""
        columns = self.context_lens.shape[1]
        return list(self.context_ids.split(self.context_lens.flatten().tolist()))[context::columns]

    def to_tensors(self) -> dict[str, Tensor]:
        """The batch as a flat dict for `broadcast_tensors`; the inverse of `from_tensors`."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("streams", "masks")}
        named |= {f"stream:{name}": stream for name, stream in self.streams.items()}
        return named | {f"mask:{name}": mask for name, mask in self.masks.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Batch:
        """Make a batch from the dict of `to_tensors`."""
        streams = {
            name.removeprefix("stream:"): t for name, t in tensors.items() if name.startswith("stream:")
        }
        masks = {name.removeprefix("mask:"): t for name, t in tensors.items() if name.startswith("mask:")}
        return cls(
            **{name: t for name, t in tensors.items() if ":" not in name}, streams=streams, masks=masks
        )

    def select(self, indices: list[int]) -> Batch:
        """A batch of the given samples, in the order of `indices`."""
        index = torch.tensor(indices, dtype=torch.int64)

        def ragged(values: Tensor, lens: Tensor) -> Tensor:
            parts = values.split(lens.tolist())
            return torch.cat([parts[i] for i in indices]) if indices else values[:0]

        return Batch(
            prompt_ids=ragged(self.prompt_ids, self.prompt_lens),
            context_ids=ragged(self.context_ids, self.context_lens.sum(1)),
            response_ids=ragged(self.response_ids, self.response_lens),
            streams={name: ragged(stream, self.response_lens) for name, stream in self.streams.items()},
            masks={name: mask[index] for name, mask in self.masks.items()},
            **{
                name: getattr(self, name)[index]
                for name in (
                    "prompt_lens",
                    "context_lens",
                    "response_lens",
                    "question_weight",
                    "question_size",
                    "scored",
                    "right",
                )
            },
        )

    def parts(self, count: int) -> list[Batch]:
        """Cut the batch into `count` minibatches of nearly equal numbers of whole questions."""
        if count == 1:
            return [self]
        questions, start = [], 0
        while start < len(self):
            questions.append(list(range(start, start + int(self.question_size[start]))))
            start += len(questions[-1])
        if count > len(questions):
            raise ValueError(f"{len(questions)} questions cannot be cut into {count} minibatches")
        bounds = [len(questions) * k // count for k in range(count + 1)]
        return [
            self.select([i for q in questions[low:high] for i in q])
            for low, high in zip(bounds, bounds[1:], strict=False)
        ]
