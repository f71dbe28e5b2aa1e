"""The numbers that a rank batch takes from the whole batch.

Proves that the mean question weight has the bits that loss/normalise.py gets, which samples need a
forward, and at which temperature the loss reads the student.
"""

from __future__ import annotations

import pytest
import torch

from megasd.actor.rank_batch import active_samples, mean_question_weight, softmax_temperature
from megasd.algo.recipes import RECIPES
from megasd.batch.batch import Batch
from megasd.loss.normalise import global_normalisers


def make_batch() -> Batch:
    """Five questions of 3, 1, 4, 2 and 2 samples of one or two tokens; question 1 has no weight,
    sample 4 no teacher.
    """
    sizes = torch.tensor([3, 1, 4, 2, 2])
    question_size, num = sizes.repeat_interleave(sizes), 12
    lens = torch.arange(num) % 2 + 1
    advantage = torch.linspace(-1, 1, num)
    advantage[5] = 0.0
    contexts = torch.ones(num, 1, dtype=torch.int64)
    contexts[4] = 0
    return Batch(
        prompt_ids=torch.zeros(num, dtype=torch.int64),
        prompt_lens=torch.ones(num, dtype=torch.int64),
        context_ids=torch.zeros(int(contexts.sum()), dtype=torch.int64),
        context_lens=contexts,
        response_ids=torch.zeros(int(lens.sum()), dtype=torch.int64),
        response_lens=lens,
        question_weight=torch.tensor(
            [0.43301, 0.0, 0.5, 0.33072, 0.12345], dtype=torch.float64
        ).repeat_interleave(sizes),
        question_size=question_size,
        scored=torch.ones(num, dtype=torch.bool),
        streams={"advantage": advantage.repeat_interleave(lens)},
    )


@pytest.mark.parametrize("normaliser", ["informative", "batch"])
def test_minibatches_are_divided_by_the_whole_batchs_mean(normaliser: str) -> None:
    batch = make_batch()
    masks = {"distill": torch.ones(len(batch.response_ids), dtype=torch.bool)}
    weights = {"distill": batch.question_weight}
    whole = global_normalisers(
        weights, batch.question_size, masks, batch.response_lens, normaliser=normaliser
    )["distill"]
    assert mean_question_weight(batch, normaliser) == whole.mean_weight
    assert [len(part) for part in batch.parts(2)] == [4, 8]


def test_who_needs_a_forward() -> None:
    batch = make_batch()
    weighted = (batch.question_weight > 0).tolist()
    assert active_samples(batch, RECIPES["sc_sdpo"]).tolist() == [
        w and i != 4 for i, w in enumerate(weighted)
    ]
    # no advantage, no gradient
    assert active_samples(batch, RECIPES["grpo"]).tolist() == [w and i != 5 for i, w in enumerate(weighted)]
    assert active_samples(batch, RECIPES["rlcsd"]).tolist() == active_samples(batch, RECIPES["grpo"]).tolist()
    # the teacher adds to an advantage of 0
    assert active_samples(batch, RECIPES["antisd"]).tolist() == weighted
    # grpo without question weights
    assert active_samples(batch, RECIPES["ssopd"]).tolist() == [
        (w and i != 4) or i != 5 for i, w in enumerate(weighted)
    ]


def test_a_likelihood_is_one_at_temperature_1() -> None:
    """SSD samples at 1.5: at that temperature the start model would be the optimum already, and
    nothing would be learned.
    """
    assert softmax_temperature(RECIPES["ssd"], 1.5) == softmax_temperature(RECIPES["sft"], 1.5) == 1.0
    assert softmax_temperature(RECIPES["opsd"], 1.1) == softmax_temperature(RECIPES["grpo"], 1.1) == 1.1
