"""KL between the model that reads a solution (teacher T) and the model that does not (student S),
token by token of the student's own unguided responses; on the tokens of epistemic markers against
the mean (Kim et al., arXiv 2603.24472). torch only inside functions.

    full     both directions over the whole vocabulary: hidden states of transformers in float32,
             logits a chunk of tokens at a time
    top-k    from an engine's top K log-probs of either side: KL(T||S) of what both sides know, and
             a bucket for the rest

What both sides know is the intersection A of the two top-K sets and the sampled token. {each token
of A, all others} is a partition of the vocabulary, so the top-k value is never above the full one
(data processing), and is equal to it when K is the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.analysis.tables import TableRow, ratio

# probability of a bucket that rounding has emptied
FLOOR = 1e-9
# response tokens whose logits exist at a time
CHUNK = 256


def top_k_kl(teacher: Mapping[int, float], student: Mapping[int, float]) -> float:
    """KL(T||S) in nats over the tokens that both know and a bucket of all others; values are
    log-probs (nats) by token id.

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
    """For each teacher prompt (KL(T||S), KL(S||T)) in nats at every response token, over the whole
    vocabulary, float32, temperature 1.

    `model`: a causal language model of transformers. Every prompt is followed by the same response;
    each is one forward pass.
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
    """Last hidden states [n, h] that predict the n response tokens: those of the positions before
    them, counted from the end.
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
    """Sums of per-token KL: of all tokens, of each marker's, and of those of any marker. `add`
    takes one response.
    """

    tokens: int = 0
    total: float = 0.0
    marker_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*MARKERS, "any"), 0))
    marker_total: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*MARKERS, "any"), 0.0))

    def add(self, values: Sequence[float], positions: Mapping[str, Iterable[int]]) -> None:
        """`values`: KL at each response token (nats); `positions`: marker -> token positions, as
        markers.marker_tokens gives them.
        """
        self.tokens += len(values)
        self.total += math.fsum(values)
        marked = {marker: set(found) for marker, found in positions.items()}
        for marker, found in {**marked, "any": set().union(*marked.values())}.items():
            self.marker_tokens[marker] += len(found)
            self.marker_total[marker] += math.fsum(values[i] for i in found)

    def rows(self, **head: Any) -> list[TableRow]:
        """A row for all tokens, for those of any marker, for all others and for each marker:
        tokens, mean KL, and its ratio to the mean.
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
