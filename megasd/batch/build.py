"""Build the batch of a step: scored groups in plain Python become flat tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megasd.algo.advantage import Whitener, advantages, shaped_rewards
from megasd.algo.question_weight import question_weight
from megasd.algo.state import AlgorithmState
from megasd.algo.teacher_context import teacher_contexts, with_solution
from megasd.batch.batch import Batch
from megasd.config.schema import DEFAULT_TEMPLATE, AlgorithmConfig, PolicyGradientTerm
from megasd.data.chat import Chat
from megasd.types import Group, Message, Prompt, Sample, TeacherContext, UserError, Verdict


class PromptEncoder(Protocol):
    """The part of data/chat.py's Chat that build_batch needs."""

    def encode_prompt(self, messages: list[Message], *, enable_thinking: bool | None = None) -> list[int]:
        """The token ids of the messages, with the opening of an answer."""
        ...


@dataclass(frozen=True)
class _Columns:
    """Python values of each sample, in the order of the batch."""

    # The raw weight of each sample's question.
    question_weights: list[float]
    advantages: list[float]
    # For each sample: the ids of the teacher's prompt, then of the contrasting prompts. The list is
    # empty if the sample has no teacher.
    contexts: list[list[list[int]]]
    # The number of contexts left out because the teacher's sequence would be too long.
    num_too_long: int


def build_batch(
    groups: list[Group],
    algorithm: AlgorithmConfig,
    chat: PromptEncoder,
    state: AlgorithmState,
    *,
    step: int,
    max_length: int,
    room: int,
    answer_of: Callable[[str], str | None],
) -> tuple[Batch, dict[str, float]]:
    """Make the batch of a step from scored groups, and metrics of the batch.

    room: rollout.max_response_tokens. answer_of: how the verifier reads an answer (CEPO). If the
    sequence under the teacher's prompt is longer than `max_length` tokens, the sample has no
    teacher. If the sequence under a contrasting prompt is too long, that prompt is left out. The
    metric "untaught_too_long" counts both.
    """
    found = _columns(groups, algorithm, chat, state, step, max_length, room, answer_of)
    samples = [sample for group in groups for sample in group.samples]
    width = max((len(one) for one in found.contexts), default=0) or 1
    contexts = [one + [[]] * (width - len(one)) for one in found.contexts]
    lens = torch.tensor([len(s.response_ids) for s in samples])
    plain = Batch(
        prompt_ids=_flat([s.prompt_ids for s in samples]),
        prompt_lens=torch.tensor([len(s.prompt_ids) for s in samples]),
        context_ids=_flat([ids for one in contexts for ids in one]),
        context_lens=torch.tensor([[len(ids) for ids in one] for one in contexts]),
        response_ids=_flat([s.response_ids for s in samples]),
        response_lens=lens,
        question_weight=torch.tensor(found.question_weights, dtype=torch.float64),
        question_size=torch.tensor([len(g.samples) for g in groups for _ in g.samples]),
        scored=torch.tensor([s.verdict is not None and s.verdict.counts for s in samples]),
        right=torch.tensor([s.verdict is Verdict.RIGHT for s in samples]),
        streams={
            "rollout_logp": torch.cat([_rollout_logps(s) for s in samples]),
            "advantage": torch.tensor(found.advantages, dtype=torch.float32).repeat_interleave(lens),
        },
    )
    batch = replace(plain, masks=sample_masks(plain, groups, algorithm))
    distilled = batch.distilled & (batch.question_weight > 0)
    tokens = int(batch.prompt_lens.sum() + batch.response_lens.sum())
    metrics = {
        "taught_samples": float(distilled.sum()),
        "untaught_too_long": float(found.num_too_long),
        "batch_tokens": float(tokens),
    }
    return batch, metrics | {f"{term}_samples": float(mask.sum()) for term, mask in batch.masks.items()}


def _columns(
    groups: list[Group],
    algorithm: AlgorithmConfig,
    chat: PromptEncoder,
    state: AlgorithmState,
    step: int,
    max_length: int,
    room: int,
    answer_of: Callable[[str], str | None],
) -> _Columns:
    weight_of, pg = question_weight(algorithm.question_weight), algorithm.policy_gradient
    encoder = _ContextEncoder(algorithm, chat, max_length)
    weights: list[float] = []
    advantages_N: list[float] = []
    contexts: list[list[list[int]]] = []
    for group in groups:
        size = len(group.samples)
        weights += [weight_of(state.pass_rate(group, algorithm.question_weight))] * size
        read: list[list[TeacherContext]] = [[]] * size
        if algorithm.teacher is not None:
            read = teacher_contexts(
                group,
                algorithm.teacher,
                seed=f"{state.seed}/{step}/{group.prompt.id}",
                prefix_fraction=state.prefix_fraction,
                buffer=state.buffer,
                answer_of=answer_of,
            )
        contexts += [encoder.encode(one, sample) for one, sample in zip(read, group.samples, strict=True)]
        if pg is None:
            advantages_N += [0.0] * size
        else:
            advantages_N += _advantages(group, algorithm, pg, state.whitener, room)
    return _Columns(weights, advantages_N, contexts, encoder.too_long)


def _advantages(
    group: Group,
    algorithm: AlgorithmConfig,
    term: PolicyGradientTerm,
    whitener: Whitener | None,
    room: int,
) -> list[float]:
    advantages_G = advantages(group, term, shaped_rewards(group, algorithm, room=room), whitener)
    bonus_G = [term.right_bonus if s.verdict is Verdict.RIGHT else 0.0 for s in group.samples]
    return [a + b for a, b in zip(advantages_G, bonus_G, strict=True)]


class _ContextEncoder:
    """Turn teacher contexts into token ids.

    Each text is encoded once, since the wrong samples of a group often have the same context.
    """

    def __init__(self, algorithm: AlgorithmConfig, chat: PromptEncoder, max_length: int) -> None:
        self.thinking = algorithm.teacher.thinking if algorithm.teacher is not None else None
        self.chat, self.max_length, self.too_long = chat, max_length, 0
        self.known: dict[str, list[int]] = {}

    def encode(self, contexts: list[TeacherContext], sample: Sample) -> list[list[int]]:
        """The ids of the teacher's prompt and of the contrasting prompts.

        A prompt that is too long together with the response becomes []. If the teacher's prompt
        is too long, the whole list is empty.
        """
        found = []
        for context in contexts:
            key = repr(context.messages)
            if key not in self.known:
                self.known[key] = self.chat.encode_prompt(context.messages, enable_thinking=self.thinking)
            fits = len(self.known[key]) + len(sample.response_ids) <= self.max_length
            self.too_long += not fits
            found.append(self.known[key] if fits else [])
        return found if found and found[0] else []


def sample_masks(batch: Batch, groups: list[Group], algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """term -> bool [N]: the samples that take part in each term that the algorithm has."""
    masks = {}
    distill, pg, nll = algorithm.distill, algorithm.policy_gradient, algorithm.nll
    if distill is not None:
        masks["distill"] = batch.distilled & DISTILLED_SAMPLES[distill.samples](batch, groups)
    if pg is not None:
        distilled = masks.get("distill", torch.zeros_like(batch.scored))
        masks["policy_gradient"] = REWARDED_SAMPLES[pg.samples](batch, distilled)
    if nll is not None:
        chosen = batch.right.clone() if nll.samples == "right" else torch.ones_like(batch.scored)
        dropped = int(nll.drop_shortest * len(batch))
        chosen[batch.response_lens.argsort(stable=True)[:dropped]] = False
        masks["nll"] = chosen
    return masks


def _first_tokens(batch: Batch, stream: str) -> Tensor:
    """[N]: the first token's value of a stream that is constant over each sample."""
    return batch.streams[stream][batch.response_lens.cumsum(0) - batch.response_lens]


def _longest_wrong(groups: list[Group]) -> Tensor:
    """bool [N]: the longest wrong sample of each group (SSOPD 2605.17497); ties take the first."""
    chosen = []
    for group in groups:
        wrong = [i for i, s in enumerate(group.samples) if s.verdict is Verdict.WRONG]
        longest = max(wrong, key=lambda i: (len(group.samples[i].response_ids), -i), default=None)
        chosen += [i == longest for i in range(len(group.samples))]
    return torch.tensor(chosen)


# distill.samples -> bool [N]: which samples with a teacher are distilled. A sample whose verifier
# failed counts as not right.
DISTILLED_SAMPLES: dict[str, Callable[[Batch, list[Group]], Tensor]] = {
    "taught": lambda batch, groups: torch.ones_like(batch.scored),
    "wrong": lambda batch, groups: ~batch.right,
    "longest_wrong": lambda batch, groups: _longest_wrong(groups),
    "positive": lambda batch, groups: _first_tokens(batch, "advantage") > 0,
}
# policy_gradient.samples -> bool [N]: which samples are rewarded. The second argument is the mask
# of the samples that are distilled.
REWARDED_SAMPLES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "scored": lambda batch, distilled: batch.scored,
    "undistilled": lambda batch, distilled: batch.scored & ~distilled,
    "right": lambda batch, distilled: batch.right,
    "all": lambda batch, distilled: torch.ones_like(batch.scored),
}


def dataset_groups(
    prompts: list[Prompt], algorithm: AlgorithmConfig, chat: Chat, with_context: list[bool]
) -> list[Group]:
    """Make one group of one sample for each row, with the row's own solution as response.

    If `with_context` is True, the prompt shows the solution too (nll.template). UserError for a row
    without a solution.
    """
    groups, template = [], DEFAULT_TEMPLATE if algorithm.nll is None else algorithm.nll.template
    for prompt, context in zip(prompts, with_context, strict=True):
        if not prompt.solution:
            raise UserError(
                f'row {prompt.id!r}: algorithm.source=dataset learns the row\'s "solution"; add one'
            )
        messages = (
            with_solution(prompt.messages, prompt.solution, template=template) if context else prompt.messages
        )
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
                        # No engine sampled this response.
                        response_logps=[],
                        text=prompt.solution,
                        finish_reason="stop",
                        version=0,
                        verdict=Verdict.RIGHT,
                    )
                ],
            )
        )
    return groups


def _rollout_logps(sample: Sample) -> Tensor:
    """The engine's log-probs of the response; NaN if no engine sampled the response."""
    return torch.tensor(
        sample.response_logps or [float("nan")] * len(sample.response_ids), dtype=torch.float32
    )


def _flat(lists: list[list[int]]) -> Tensor:
    return torch.tensor([x for one in lists for x in one], dtype=torch.int64)
