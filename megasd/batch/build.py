"""From scored groups to the batch of a step: plain Python over groups becomes flat tensors."""

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
    """What build_batch needs of data/chat.py: Chat."""

    def encode_prompt(self, messages: list[Message], *, enable_thinking: bool | None = None) -> list[int]:
        """The token ids of the messages and of the opening of an answer."""
        ...


@dataclass(frozen=True)
class _Columns:
    """What Python over groups says about each sample, in the order of the batch."""

    # raw weight of the sample's question
    question_weights: list[float]
    advantages: list[float]
    # ids of the teacher's prompt, then of the contrasting ones; empty without a teacher
    contexts: list[list[list[int]]]
    # contexts that were left out because the teacher's sequence would be too long
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
    """Scored groups -> the batch of a step, and metrics of it.

    room: rollout.max_response_tokens. answer_of: how the verifier reads an answer (CEPO). If a
    teacher sequence is longer than `max_length` tokens, its sample has no teacher (a contrast: is
    left out); the metric "untaught_too_long" counts them.
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
    """Teacher contexts to token ids. Each text is encoded once: the failures of a group share one."""

    def __init__(self, algorithm: AlgorithmConfig, chat: PromptEncoder, max_length: int) -> None:
        self.thinking = algorithm.teacher.thinking if algorithm.teacher is not None else None
        self.chat, self.max_length, self.too_long = chat, max_length, 0
        self.known: dict[str, list[int]] = {}

    def encode(self, contexts: list[TeacherContext], sample: Sample) -> list[list[int]]:
        """Ids of the teacher's prompt and of the contrasting ones; [] for one that is too long with
        the response. Without the teacher's prompt the whole list is empty.
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
    """[N]: a stream that is the same for all tokens of a sample."""
    return batch.streams[stream][batch.response_lens.cumsum(0) - batch.response_lens]


def _longest_wrong(groups: list[Group]) -> Tensor:
    """bool [N]: the longest wrong sample of each group, the first of equals (SSOPD 2605.17497)."""
    chosen = []
    for group in groups:
        wrong = [i for i, s in enumerate(group.samples) if s.verdict is Verdict.WRONG]
        longest = max(wrong, key=lambda i: (len(group.samples[i].response_ids), -i), default=None)
        chosen += [i == longest for i in range(len(group.samples))]
    return torch.tensor(chosen)


# distill.samples -> bool [N], of the samples that have a teacher. A sample whose verifier failed
# counts as not right.
DISTILLED_SAMPLES: dict[str, Callable[[Batch, list[Group]], Tensor]] = {
    "taught": lambda batch, groups: torch.ones_like(batch.scored),
    "wrong": lambda batch, groups: ~batch.right,
    "longest_wrong": lambda batch, groups: _longest_wrong(groups),
    "positive": lambda batch, groups: _first_tokens(batch, "advantage") > 0,
}
# policy_gradient.samples -> bool [N]; the second argument: the samples that distillation takes
REWARDED_SAMPLES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "scored": lambda batch, distilled: batch.scored,
    "undistilled": lambda batch, distilled: batch.scored & ~distilled,
    "right": lambda batch, distilled: batch.right,
    "all": lambda batch, distilled: torch.ones_like(batch.scored),
}


def dataset_groups(
    prompts: list[Prompt], algorithm: AlgorithmConfig, chat: Chat, with_context: list[bool]
) -> list[Group]:
    """One sample a row: its response is the row's own solution.

    Where `with_context` is True, the prompt shows the solution too (nll.template). UserError for a
    row without a solution.
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
                        # no engine sampled it
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
    """NaN for a response that no engine sampled."""
    return torch.tensor(
        sample.response_logps or [float("nan")] * len(sample.response_ids), dtype=torch.float32
    )


def _flat(lists: list[list[int]]) -> Tensor:
    return torch.tensor([x for one in lists for x in one], dtype=torch.int64)
