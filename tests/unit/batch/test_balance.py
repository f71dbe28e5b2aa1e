"""Dealing of samples to data-parallel ranks and microbatches, on lengths alone.

Proves, for ten length distributions and a thousand random cases: every sample on exactly one rank,
equal numbers of microbatches on all ranks, no budget exceeded but by a single sample, FLOPs of the
costliest rank below 1.05 of the mean (student forward and backward, recomputation, the teacher's
pass as it is packed again). Does not prove losses: tests/distributed/test_golden.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasd.algo.recipes import RECIPES
from megasd.batch import balance
from megasd.batch.balance import Part, Workload, by_count, by_tokens, computed_tokens, pack
from megasd.batch.batch import Batch
from megasd.batch.shard import Costs, RankPlan, plan_ranks
from megasd.config.schema import ActorConfig
from megasd.models.flops import (
    forward_flops,
    layers_flops,
    linear_weights,
    output_flops,
    recompute_flops,
    scores_flops,
)
from tests.unit.batch.length_cases import DISTRIBUTIONS, LIMIT, Lengths

HF = json.loads((Path(__file__).parents[3] / "configs" / "model" / "Qwen3-8B.json").read_text())


def make_batch(lengths: Lengths, *, without_weight: int = 0) -> Batch:
    """Lengths are all that matters; the last `without_weight` samples have weight 0."""
    prompts, responses, contexts = (torch.tensor(column) for column in zip(*lengths, strict=True))
    weight = torch.ones(len(lengths), dtype=torch.float64)
    weight[len(lengths) - without_weight :] = 0.0
    return Batch(
        prompt_ids=torch.zeros(int(prompts.sum()), dtype=torch.int64),
        prompt_lens=prompts,
        context_ids=torch.zeros(int(contexts.sum()), dtype=torch.int64),
        context_lens=contexts[:, None],
        response_ids=torch.zeros(int(responses.sum()), dtype=torch.int64),
        response_lens=responses,
        question_weight=weight,
        question_size=torch.ones(len(lengths), dtype=torch.int64),
        scored=torch.ones(len(lengths), dtype=torch.bool),
        streams={"advantage": torch.ones(int(responses.sum()))},
    )


def deals(
    lengths: Lengths, ranks: int, actor: ActorConfig, *, multiple: int = 1
) -> tuple[Batch, list[RankPlan]]:
    """Of every rank. Samples without a teacher's context are active too: grpo's term beside
    distillation (the recipe ssopd).
    """
    batch = make_batch(lengths, without_weight=len(lengths) // 8)
    costs = Costs(HF, [HF], actor, multiple)
    active = batch.question_weight > 0
    return batch, plan_ranks(batch, active, RECIPES["ssopd"], costs, ranks)


def check(
    lengths: Lengths, batch: Batch, found: list[RankPlan], actor: ActorConfig, multiple: int
) -> list[float]:
    """Every promise of a deal; the FLOPs of each rank, counted here from the sequences alone."""
    up = lambda n: -(-n // multiple) * multiple  # noqa: E731
    assert sorted(i for one in found for i in one.samples) == list(range(len(lengths))) and all(
        one.samples for one in found
    )
    assert len({len(one.microbatches) for one in found}) == 1
    assert len({tuple(map(len, one.teacher_microbatches)) for one in found}) == 1
    loads = []
    for one in found:
        load = 0.0
        for cut, column, passes in ((one.microbatches, 0, 3), (one.teacher_microbatches[0], 2, 1)):
            flat = [i for group in cut for i in group]
            assert len(flat) == len(set(flat))
            for group in cut:
                sizes = [up(lengths[one.samples[i]][column] + lengths[one.samples[i]][1]) for i in group]
                taken = sum(sizes) if actor.packing else max(sizes, default=0) * len(sizes)
                assert len(group) <= 1 or taken <= actor.max_tokens_per_microbatch
                for i, size in zip(group, sizes, strict=True):
                    size = size if actor.packing else max(sizes)
                    again = recompute_flops(HF, size, actor) if column == 0 else 0.0
                    load += passes * forward_flops(HF, size, lengths[one.samples[i]][1]) + again
        loads.append(load)
        computed = {one.samples[i] for group in one.microbatches for i in group}
        assert computed == {i for i in one.samples if batch.question_weight[i] > 0}
        taught = {one.samples[i] for group in one.teacher_microbatches[0] for i in group}
        assert taught == {i for i in computed if lengths[i][2] > 0}
    return loads


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ranks_get_equal_work(name: str, packing: bool) -> None:
    lengths = DISTRIBUTIONS[name]()
    for ranks, multiple in ((2, 1), (4, 16), (8, 1)):
        actor = ActorConfig(packing=packing, recompute_granularity="full")
        actor.max_tokens_per_microbatch = LIMIT + 512 if max(r for _, r, _ in lengths) > 64 else 512
        batch, found = deals(lengths, ranks, actor, multiple=multiple)
        loads = check(lengths, batch, found, actor, multiple)
        assert max(loads) * ranks / sum(loads) < 1.05, loads
        assert all(one.metrics == found[0].metrics for one in found)
        assert found[0].metrics["flops_balance"] == pytest.approx(max(loads) * ranks / sum(loads), abs=2e-2)


# Samples by a seed: drawing each of them by hypothesis would take most of the time.
lengths_of_samples = st.builds(
    lambda seed, size: [
        (rng.randint(1, 40), rng.randint(1, 300), rng.choice((0, 3, 200)))
        for rng in [random.Random(seed)]
        for _ in range(size)
    ],
    st.integers(0, 2**32),
    st.integers(8, 24),
)


@settings(max_examples=1000, deadline=None, database=None)
@given(
    lengths_of_samples,
    st.integers(1, 8),
    st.integers(1, 700),
    st.booleans(),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 4),
)
def test_counts_are_equal_in_random_cases(
    lengths: Lengths, ranks: int, budget: int, packing: bool, multiple: int, stages: int
) -> None:
    actor = ActorConfig(
        packing=packing, max_tokens_per_microbatch=budget, pipeline_model_parallel_size=stages
    )
    batch, found = deals(lengths, ranks, actor, multiple=multiple)
    check(lengths, batch, found, actor, multiple)
    over = sum(
        -(-(p + r) // multiple) * multiple > budget
        for k, (p, r, _) in enumerate(lengths)
        if batch.question_weight[k] > 0
    )
    over += sum(
        c > 0 and -(-(c + r) // multiple) * multiple > budget
        for (_, r, c), w in zip(lengths, batch.question_weight, strict=True)
        if w
    )
    assert found[0].metrics["over_budget"] == over
    # no stage of a pipeline idles for want of microbatches
    if int((batch.question_weight > 0).sum()) >= stages * ranks:
        assert len(found[0].microbatches) >= stages


@given(
    st.lists(st.integers(1, 500), min_size=4, max_size=30), st.integers(1, 4), st.integers(1, 9), st.data()
)
@settings(max_examples=100, deadline=None, database=None)
def test_dealing_by_count(lengths: list[int], ranks: int, size: int, data: st.DataObject) -> None:
    active = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    parts = by_count(lengths, active, ranks, size)
    assert sorted(i for part in parts for i in part.samples) == list(range(len(lengths))) and all(
        part.samples for part in parts
    )
    assert (
        len({len(part.microbatches) for part in parts}) == 1 and max(map(len, parts[0].microbatches)) <= size
    )
    assert all(active[i] for part in parts for one in part.microbatches for i in one)
    assert not any(active[i] for part in parts for i in part.idle)


def test_a_packed_microbatch_is_filled_and_a_padded_one_holds_neighbours() -> None:
    tokens = [9, 1, 5, 5, 4, 8]
    assert pack(tokens, range(6), 10, packing=True) == [[0, 1], [5], [2, 3], [4]]
    # padding 1 to 4 costs more than a launch
    assert pack(tokens, range(6), 10, packing=False) == [[0], [5], [2, 3], [4], [1]]
    assert pack([99, 3, 97, 98], range(4), 320, packing=False) == [[0, 3, 2], [1]]
    # longer than the budget: alone
    assert pack(tokens, range(6), 8, packing=True)[0] == [0]
    assert computed_tokens(tokens, [[0, 1], [2, 4]], packing=True) == 19
    assert computed_tokens(tokens, [[0, 1], [2, 4], []], packing=False) == 28


def test_a_lone_sample_and_none() -> None:
    """Ranks without a sample to compute run filler; idle samples go to those first."""
    parts = by_tokens(Workload([5] * 4, [1.0] * 4, [0.0] * 4, 8, True), [False, True, False, False], 4)
    assert sorted(len(part.samples) for part in parts) == [1] * 4
    assert sorted(part.microbatches for part in parts) == [[[]], [[]], [[]], [[1]]]
    parts = by_tokens(Workload([5] * 2, [1.0] * 2, [0.0] * 2, 8, True), [False, False], 2)
    assert parts == [Part([[]], [0]), Part([[]], [1])]


def test_more_microbatches_are_opened_where_the_fewest_cannot_be_even() -> None:
    """Three microbatches of 100 tokens hold all, but four on two ranks cannot share nine samples of
    30 evenly; costs can by six.
    """
    tokens, cost = [30] * 9 + [10] * 2, [3.0] * 9 + [1.0, 2.0]
    parts = by_tokens(Workload(tokens, cost, [0.0] * 11, 100, True), [True] * 11, 2)
    loads = [sum(cost[i] for i in part.samples) for part in parts]
    assert max(loads) <= balance.GOAL * sum(loads) / 2


def test_what_a_sequence_costs() -> None:
    weights = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288
    assert linear_weights(HF) == weights
    assert layers_flops(HF, 10) == 36 * (2 * weights * 10 + 4 * 32 * 128 * 55)
    assert forward_flops(HF, 10, 4) == layers_flops(HF, 10) + output_flops(HF, 4)
    assert recompute_flops(HF, 10, ActorConfig()) == 0.0
    assert recompute_flops(HF, 10, ActorConfig(recompute_granularity="full")) == layers_flops(HF, 10)
    block = ActorConfig(
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=9,
        pipeline_model_parallel_size=2,
    )
    assert recompute_flops(HF, 10, block) == layers_flops(HF, 10) / 2
    assert recompute_flops(HF, 10, ActorConfig(recompute_granularity="selective")) == scores_flops(HF, 10)
    mlp = ActorConfig(recompute_granularity="selective", recompute_modules=["mlp"])
    assert recompute_flops(HF, 10, mlp) == 36 * 2 * 3 * 4096 * 12288 * 10
