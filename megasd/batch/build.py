"""From scored groups to the batch of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasd.algo.advantage import Whitener, advantages, shaped_rewards
from megasd.algo.question_weight import question_weight
from megasd.algo.state import AlgorithmState
from megasd.algo.teacher_context import teacher_contexts, with_solution
from megasd.batch.batch import TERMS, Batch
from megasd.config.schema import AlgorithmConfig
from megasd.data.chat import Chat
from megasd.types import Group, Prompt, Sample, TeacherContext, UserError, Verdict


def build_batch(
    groups: list[Group],
    algorithm: AlgorithmConfig,
    chat: Chat,
    memory: AlgorithmState,
    *,
    step: int,
    max_length: int,
    room: int,
    answer_of: Callable[[str], str | None],
) -> tuple[Batch, dict[str, float]]:
    """Scored groups -> the batch of a step, and figures about it. room:
    rollout.max_response_tokens; answer_of: the verifier's reading.

    A teacher sequence longer than `max_length` tokens leaves its sample untaught (a contrast:
    unseen); they are counted in "untaught_too_long".
    """
    weight_of, pg = question_weight(algorithm.question_weight), algorithm.policy_gradient
    samples, weights, advantages_N, contexts = [], [], [], []
    encoder = _ContextEncoder(algorithm, chat, max_length)
    for group in groups:
        samples += group.samples
        weights += [weight_of(memory.pass_rate(group, algorithm.question_weight))] * len(group.samples)
        found: list[list[TeacherContext]] = [[]] * len(group.samples)
        if algorithm.teacher is not None:
            seed = f"{memory.seed}/{step}/{group.prompt.id}"
            found = teacher_contexts(
                group,
                algorithm.teacher,
                seed=seed,
                prefix_fraction=memory.prefix_fraction,
                buffer=memory.buffer,
                answer_of=answer_of,
            )
        contexts += [encoder.encode(one, sample) for one, sample in zip(found, group.samples, strict=True)]
        advantages_G = [0.0] * len(group.samples)
        if pg is not None:
            advantages_G = _advantages(group, algorithm, memory.whitener, room)
        advantages_N += advantages_G
    columns = max((len(one) for one in contexts), default=0) or 1
    contexts = [one + [[]] * (columns - len(one)) for one in contexts]
    lens = torch.tensor([len(s.response_ids) for s in samples])
    batch = Batch(
        prompt_ids=_flat([s.prompt_ids for s in samples]),
        prompt_lens=torch.tensor([len(s.prompt_ids) for s in samples]),
        context_ids=_flat([ids for one in contexts for ids in one]),
        context_lens=torch.tensor([[len(ids) for ids in one] for one in contexts]),
        response_ids=_flat([s.response_ids for s in samples]),
        response_lens=lens,
        question_weight=torch.tensor(weights, dtype=torch.float64),
        question_size=torch.tensor([len(g.samples) for g in groups for _ in g.samples]),
        scored=torch.tensor([s.verdict is not None and s.verdict.counts for s in samples]),
        right=torch.tensor([s.verdict is Verdict.RIGHT for s in samples]),
        streams={
            "rollout_logp": torch.cat([_rollout_logps(s) for s in samples]),
            "advantage": torch.tensor(advantages_N, dtype=torch.float32).repeat_interleave(lens),
        },
    )
    batch.masks = sample_masks(batch, groups, algorithm)
    taught = batch.distilled & (batch.question_weight > 0)
    tokens = int(batch.prompt_lens.sum() + batch.response_lens.sum())
    figures = {
        "taught_samples": float(taught.sum()),
        "untaught_too_long": float(encoder.too_long),
        "batch_tokens": float(tokens),
    }
    return batch, figures | {f"{term}_samples": float(mask.sum()) for term, mask in batch.masks.items()}


def _advantages(
    group: Group, algorithm: AlgorithmConfig, whitener: Whitener | None, room: int
) -> list[float]:
    pg = algorithm.policy_gradient
    advantages_G = advantages(group, pg, shaped_rewards(group, algorithm, room=room), whitener)
    bonus_G = [pg.right_bonus if s.verdict is Verdict.RIGHT else 0.0 for s in group.samples]
    return [a + b for a, b in zip(advantages_G, bonus_G, strict=True)]


class _ContextEncoder:
    """Teacher contexts to token ids, each text once: the failures of a group share one."""

    def __init__(self, algorithm: AlgorithmConfig, chat: Chat, max_length: int) -> None:
        self.thinking = algorithm.teacher.thinking if algorithm.teacher is not None else None
        self.chat, self.max_length, self.too_long = chat, max_length, 0
        self.known: dict[str, list[int]] = {}

    def encode(self, contexts: list[TeacherContext], sample: Sample) -> list[list[int]]:
        """Ids of the teacher's and of the contrasting prompts; empty where one with the response is
        too long.
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
    distill, pg, nll = (getattr(algorithm, term) for term in TERMS)
    if distill is not None:
        mask = batch.distilled.clone()
        # one whose verifier failed is taught like a wrong one
        if distill.samples == "wrong":
            mask &= ~batch.right
        elif distill.samples == "positive":
            mask &= _first_tokens(batch, "advantage") > 0
        elif distill.samples == "longest_wrong":
            mask &= _longest_wrong(groups)
        masks["distill"] = mask
    if pg is not None:
        chosen = {
            "scored": batch.scored,
            "all": torch.ones_like(batch.scored),
            "right": batch.right,
            "undistilled": batch.scored & ~masks.get("distill", torch.zeros_like(batch.scored)),
        }
        masks["policy_gradient"] = chosen[pg.samples]
    if nll is not None:
        masks["nll"] = batch.right.clone() if nll.samples == "right" else torch.ones_like(batch.scored)
        dropped = int(nll.drop_shortest * len(batch))
        masks["nll"][batch.response_lens.argsort(stable=True)[:dropped]] = False
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


def dataset_groups(
    prompts: list[Prompt], algorithm: AlgorithmConfig, chat: Chat, with_context: list[bool]
) -> list[Group]:
    """One sample a row: the row's own solution, its prompt carrying that solution where
    `with_context` says so. UserError without one.
    """
    groups = []
    for prompt, context in zip(prompts, with_context, strict=True):
        if not prompt.solution:
            raise UserError(
                f'row {prompt.id!r}: algorithm.source=dataset learns the row\'s "solution"; add one'
            )
        messages = (
            with_solution(prompt.messages, prompt.solution, template=algorithm.nll.template)
            if context
            else prompt.messages
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
                        # nothing sampled it
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
