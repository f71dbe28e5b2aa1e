"""Measure the KL between a model that reads a solution and the same model without the solution.

The model with the solution is the teacher T; the model without it is the student S. The KL is
measured at each token of the student's own unguided responses. The mean over the tokens of
epistemic markers is compared with the mean over all tokens (Kim et al., arXiv 2603.24472). torch
only inside functions.

    full     both directions over the whole vocabulary: hidden states of transformers in float32,
             logits a chunk of tokens at a time
    top-k    from an engine's top K log-probs of either side: KL(T||S) of the tokens that both sides
             know, and a bucket for all other tokens

The tokens that both sides know are the intersection A of the two top-K sets, and the sampled token.
{each token of A, all other tokens} is a partition of the vocabulary. So the top-k value is never
above the full value (data processing), and is equal to it if K is the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.analysis.tables import TableRow, ratio

# The probability of a bucket that rounding has emptied.
FLOOR = 1e-9
# So many response tokens have their logits in memory at a time.
CHUNK = 256


def top_k_kl(teacher: Mapping[int, float], student: Mapping[int, float]) -> float:
    """KL(T||S) in nats over the tokens in both dicts and a bucket of all other tokens.

    teacher, student: token id -> log-prob (nats).

    top_k_kl({1: ln .5, 2: ln .25}, {1: ln .25, 2: ln .5}) == .25 ln 2: the bucket has .25 on either
    side and adds nothing.
    """
    both = [token for token in teacher if token in student]
    value = math.fsum(math.exp(teacher[token]) * (teacher[token] - student[token]) for token in both)
    rest_of_teacher = max(FLOOR, 1.0 - math.fsum(math.exp(teacher[token]) for token in both))
    rest_of_student = max(FLOOR, 1.0 - math.fsum(math.exp(student[token]) for token in both))
    return max(0.0, value + rest_of_teacher * math.log(rest_of_teacher / rest_of_student))


def full_kl(
    model: Any, student_prompt: list[int], teacher_prompts: Sequence[list[int]], response: list[int]
) -> list[tuple[list[float], list[float]]]:
    """For each teacher prompt: (KL(T||S), KL(S||T)) in nats at every response token.

    Over the whole vocabulary, float32, temperature 1. `model`: a causal language model of
    transformers. Every prompt is followed by the same response and takes one forward pass.
    """
    import torch

    with torch.inference_mode():
        student = _hidden(model, student_prompt, response)
        return [
            _both_directions(model, student, _hidden(model, prompt, response)) for prompt in teacher_prompts
        ]


def _both_directions(model: Any, student: Any, teacher: Any) -> tuple[list[float], list[float]]:
    """Hidden states [n, h] of either side -> (KL(T||S), KL(S||T)) [n]; rounding below 0 is 0."""
    import torch

    head = model.get_output_embeddings()
    forward: list[float] = []
    reverse: list[float] = []
    for start in range(0, len(student), CHUNK):
        log_s, log_t = (
            torch.log_softmax(head(side[start : start + CHUNK]).float(), dim=-1)
            for side in (student, teacher)
        )
        forward += (log_t.exp() * (log_t - log_s)).sum(-1).clamp(min=0).tolist()
        reverse += (log_s.exp() * (log_s - log_t)).sum(-1).clamp(min=0).tolist()
    return forward, reverse


def _hidden(model: Any, prompt: list[int], response: list[int]) -> Any:
    """The last hidden states [n, h] that predict the n response tokens.

    Each token is predicted at the position before it. Positions are counted from the end.
    """
    import torch

    ids = prompt + response
    assert ids[-len(response) :] == response and prompt, (
        "the response is the tail of both sequences, after a prompt"
    )
    hidden = model.base_model(torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[0]
    return hidden[-len(response) - 1 : -1]


@dataclass
class Tally:
    """Sums of per-token KL over all tokens, each marker's tokens, and any marker's tokens.

    `add` takes the values of one response.
    """

    tokens: int = 0
    total: float = 0.0
    marker_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*MARKERS, "any"), 0))
    marker_total: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*MARKERS, "any"), 0.0))

    def add(self, values: Sequence[float], positions: Mapping[str, Iterable[int]]) -> None:
        """Add the values of one response.

        `values`: KL at each response token (nats). `positions`: marker -> token positions, from
        markers.marker_tokens.
        """
        self.tokens += len(values)
        self.total += math.fsum(values)
        marked = {marker: set(found) for marker, found in positions.items()}
        for marker, found in {**marked, "any": set().union(*marked.values())}.items():
            self.marker_tokens[marker] += len(found)
            self.marker_total[marker] += math.fsum(values[i] for i in found)

    def rows(self, **head: Any) -> list[TableRow]:
        """Rows for all tokens, tokens of any marker, tokens of no marker, and each marker.

        A row holds the number of tokens, their mean KL, and its ratio to the mean of all tokens.
        """
        others = (self.tokens - self.marker_tokens["any"], self.total - self.marker_total["any"])
        parts = {
            "all": (self.tokens, self.total),
            "any": (self.marker_tokens["any"], self.marker_total["any"]),
            "others": others,
        }
        parts |= {marker: (self.marker_tokens[marker], self.marker_total[marker]) for marker in MARKERS}
        overall = ratio(self.total, self.tokens)
        return [
            {
                **head,
                "marker": name,
                "tokens": count,
                "kl": ratio(total, count),
                "ratio_to_mean": ratio(ratio(total, count), overall),
            }
            for name, (count, total) in parts.items()
        ]
