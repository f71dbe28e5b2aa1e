"""Cases of the reducer, run by torchrun; see test_reduce.py. One batch in float64, dealt in every
way, against one process without groups.

The toy model has two parameters a, b and the per-token loss a base_t + b other_t: elementwise, so
that a token's loss has the same bits wherever it is computed, and only the sums could differ.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megasd.loss.exact_sum import exact_value, exact_words, reduce_metrics
from megasd.loss.megatron_scaling import megatron_loss
from megasd.loss.normalise import AGGREGATIONS, NORMALISERS, global_normalisers, term_weights, weighted
from tools.bench_meters import RingBytes

# questions of a batch
RAW, SIZES = [0.0, 0.25, 0.5, 0.3307189, 0.0, 0.4841229], [4, 3, 5, 2, 6, 4]
QUESTION = torch.tensor([j for j, n in enumerate(SIZES) for _ in range(n)])
N = len(QUESTION)
SIZE = torch.tensor(SIZES)[QUESTION]
LENS = torch.arange(N) * 5 % 13 + 1
STARTS = LENS.cumsum(0) - LENS
OWNER = torch.arange(N).repeat_interleave(LENS)
PLACE = torch.arange(len(OWNER)) - STARTS[OWNER]
# By token: some samples not at all (1, 5, 9, ...), of the others no first token and none after the
# seventh, so short ones drop out too.
MASKS = {
    "distill": (OWNER % 4 != 1) & (PLACE >= 1) & (PLACE < 7),
    "nll": torch.ones(len(OWNER), dtype=torch.bool),
}
TAKING_PART = {term: [int(MASKS[term][OWNER == i].sum()) for i in range(N)] for term in MASKS}
DATASET_MEAN, ROOM = 0.2, 16
MEANS = {"loss_per_token": "tokens", "loss_per_taught": "taught_tokens"}
THETA = torch.tensor([1.25, 0.75])


def tables(signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses over several orders of magnitude."""
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, int(LENS.sum()), generator=g, dtype=torch.float64).mul(3).exp()
    return (
        (base, other * torch.randn(len(base), generator=g, dtype=torch.float64)) if signed else (base, other)
    )


@dataclass
class Layout:
    """dp x cp ranks, context parallelism innermost, as Megatron has it; dp_group without,
    world_group with it; None: one process.
    """

    dp: int = 1
    cp: int = 1
    rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    world_group: dist.ProcessGroup | None = None


def layouts() -> list[Layout]:
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for dp, cp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 2)):
        if dp * cp == world:
            groups = [dist.new_group(list(range(c, world, cp))) for c in range(cp)]
            found.append(Layout(dp, cp, rank, groups[rank % cp], dist.new_group(list(range(world)))))
    return found


def deals(dp: int) -> dict[str, list[list[int]]]:
    """Name -> the samples of every data-parallel rank."""

    def cut(order: list[int]) -> list[list[int]]:
        return [order[r * N // dp : (r + 1) * N // dp] for r in range(dp)]

    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(dp)).tolist()
    found = {
        "contiguous": cut(list(range(N))),
        "strided": [list(range(r, N, dp)) for r in range(dp)],
        "shuffled": cut(shuffled),
    }
    if dp > 1:
        nothing = [i for i in shuffled if RAW[QUESTION[i]] == 0]
        others = [i for i in shuffled if RAW[QUESTION[i]] > 0]
        found["first_rank_learns_nothing"] = [nothing, *(others[r :: dp - 1] for r in range(dp - 1))]
        found["first_rank_is_empty"] = [[], *(shuffled[r :: dp - 1] for r in range(dp - 1))]
        split = {
            len({r for r in range(dp) for i in found["strided"][r] if QUESTION[i] == j})
            for j in range(len(SIZES))
        }
        # a question's samples lie on all ranks
        assert max(split) == dp
    return found


def context_shard(sample: int, cp: int, cp_rank: int) -> list[int]:
    """Positions of the response on a context-parallel rank: 2 cp chunks, one from the front and its
    mirror from the back.
    """
    length = int(LENS[sample])
    chunks = [p * 2 * cp // length for p in range(length)]
    return [p for p, chunk in enumerate(chunks) if min(chunk, 2 * cp - 1 - chunk) == cp_rank]


def step(
    layout: Layout,
    mine: list[int],
    microbatches: int,
    *,
    weights: dict[str, torch.Tensor],
    aggregation: str,
    normaliser: str,
    term: str,
    dtype: torch.dtype,
    signed: bool,
) -> tuple[dict[str, float], float, torch.Tensor]:
    """A training step on this rank's samples: (metrics, the plain sum of the microbatches' losses,
    the gradient), global all of them.
    """
    index = torch.tensor(mine, dtype=torch.int64)
    # its responses
    whole = torch.tensor([int(STARTS[i]) + p for i in mine for p in range(int(LENS[i]))], dtype=torch.int64)
    masks = {name: mask[whole] for name, mask in MASKS.items()}
    local_weights = {name: weight[index] for name, weight in weights.items()}
    options = {"normaliser": normaliser, "dataset_mean": DATASET_MEAN, "dp_group": layout.dp_group}
    with RingBytes() as seen:
        normalisers = global_normalisers(local_weights, SIZE[index], masks, LENS[index], **options)
    assert seen.calls["forward"] == (layout.dp > 1) and seen.received["forward"] <= 2 * 8 * (
        5 + 8 * len(masks)
    )
    weight_R = term_weights(
        local_weights[term],
        masks[term],
        LENS[index],
        normaliser=normalisers[term],
        aggregation=aggregation,
        room=ROOM,
    )
    starts_R = LENS[index].cumsum(0) - LENS[index]
    base, other = (table.to(dtype) for table in tables(signed))
    theta = THETA.to(dtype).clone().requires_grad_()
    plain = torch.zeros((), dtype=dtype)
    totals: dict[str, torch.Tensor] = {}
    for m in range(microbatches):
        places = [
            (i, p)
            for i in range(m, len(mine), microbatches)
            for p in context_shard(mine[i], layout.cp, layout.rank % layout.cp)
        ]
        local = torch.tensor([int(starts_R[i]) + p for i, p in places], dtype=torch.int64)
        tokens = torch.tensor([int(STARTS[mine[i]]) + p for i, p in places], dtype=torch.int64)
        weight_T = weight_R[local]
        loss_T = theta[0] * base[tokens] + theta[1] * other[tokens]
        loss_T.retain_grad()
        loss, num_tokens, log = megatron_loss(weighted(loss_T, weight_T.to(dtype)).sum())
        assert num_tokens == 0 and log == {} and loss.dtype == dtype
        loss.backward()
        plain += loss.detach()
        exact_T = weighted(loss_T.detach().double(), weight_T)
        sums = {
            "loss": exact_T,
            "tokens": torch.ones(len(tokens)),
            "taught_tokens": weight_T > 0,
            "loss_per_token": loss_T,
            "loss_per_taught": weighted(loss_T, weight_T > 0),
            "grad_a": loss_T.grad.double() * base[tokens].double(),
            "grad_b": loss_T.grad.double() * other[tokens].double(),
        }
        for name, values in sums.items():
            totals[name] = totals.get(name, 0) + exact_words(values)
    with RingBytes() as seen:
        metrics = reduce_metrics(totals, MEANS, group=layout.world_group)
    assert seen.calls["forward"] == (layout.dp * layout.cp > 1) and seen.received[
        "forward"
    ] <= 2 * 8 * 3 * len(totals)
    gradient = theta.grad
    if layout.world_group is not None:
        dist.all_reduce(plain, group=layout.world_group)
        dist.all_reduce(gradient, group=layout.world_group)
    metrics |= {
        f"{name}.{key}": value
        for name, figures in normalisers.items()
        for key, value in vars(figures).items()
    }
    return metrics, plain.item(), gradient


def by_definition(
    weight: torch.Tensor, aggregation: str, normaliser: str, term: str, losses: torch.Tensor
) -> float:
    """sum(w l) / normaliser, written from the definition over unique questions, in plain Python."""
    per_question = [float(weight[QUESTION == j][0]) for j in range(len(SIZES))]
    informative = [w for w in per_question if w > 0]
    mean = {
        "informative": math.fsum(informative) / len(informative),
        "batch": math.fsum(informative) / len(SIZES),
        "dataset": DATASET_MEAN,
        "none": 1.0,
    }[normaliser]
    in_some_mask = int((MASKS["distill"] | MASKS["nll"]).sum())
    terms = []
    for t in MASKS[term].nonzero()[:, 0].tolist():
        i = int(OWNER[t])
        share = {
            "sequence_mean": N * TAKING_PART[term][i],
            "sequence_mean_taking_part": sum(n > 0 for n in TAKING_PART[term]) * TAKING_PART[term][i],
            "token_mean": sum(TAKING_PART[term]),
            "sequence_sum": N * ROOM,
            "token_mean_of_terms": in_some_mask,
        }[aggregation]
        terms.append(float(weight[i]) / mean / share * float(losses[t]))
    return math.fsum(terms)


def settings() -> list[dict]:
    """Every aggregation and every normaliser (on one and two ranks their product); every
    aggregation with the other term and in float32.
    """
    weight = torch.tensor(RAW, dtype=torch.float64)[QUESTION]
    weights = {"distill": weight, "nll": torch.ones_like(weight)}
    exact, rounded = {"dtype": torch.float64, "signed": True}, {"dtype": torch.float32, "signed": False}
    found = [
        dict(aggregation=aggregation, normaliser=normaliser, term="distill", **exact)
        for aggregation, normaliser in itertools.product(AGGREGATIONS, NORMALISERS)
        if dist.get_world_size() <= 2 or "sequence_mean" == aggregation or "informative" == normaliser
    ]
    for aggregation in AGGREGATIONS:
        found.append(
            dict(aggregation=aggregation, normaliser="informative", term="nll", **exact | {"signed": False})
        )
        found.append(dict(aggregation=aggregation, normaliser="informative", term="distill", **rounded))
    return [{"weights": weights} | one for one in found]


def every_split(all_layouts: list[Layout]) -> int:
    count = 0
    for setting in settings():
        alone, _, gradient = step(Layout(), list(range(N)), 1, **setting)
        double, _, double_gradient = step(Layout(), list(range(N)), 1, **setting | {"dtype": torch.float64})
        base, other = tables(setting["signed"])
        term, aggregation, normaliser = setting["term"], setting["aggregation"], setting["normaliser"]
        defined = by_definition(
            setting["weights"][term], aggregation, normaliser, term, THETA[0] * base + THETA[1] * other
        )
        torch.testing.assert_close(double["loss"], defined, rtol=1e-12, atol=0)
        assert (
            alone["distill.num_questions"] == 4
            and alone["nll.num_questions"] == alone["distill.num_all_questions"] == 6
        )
        assert alone["distill.num_taking_part"] < alone["nll.num_taking_part"] == N
        for layout in all_layouts:
            for (name, deal), microbatches in itertools.product(deals(layout.dp).items(), (1, 2, 4)):
                metrics, plain, grad = step(layout, deal[layout.rank // layout.cp], microbatches, **setting)
                where = (
                    f"{layout.dp=} {layout.cp=} {name} {microbatches=} {aggregation} {normaliser}"
                    f" {setting['dtype']} {term}"
                )
                # every bit, normalisers included
                assert metrics == alone, f"{where}: {metrics} is not {alone}"
                tolerance = 1e-6 if setting["dtype"] == torch.float32 else 1e-12
                for found, expected in (
                    (plain, double["loss"]),
                    (grad.double(), double_gradient),
                    (grad, gradient),
                ):
                    torch.testing.assert_close(
                        found, expected, rtol=tolerance, atol=0, msg=lambda m, where=where: f"{where}: {m}"
                    )
                count += 1
    return count


def nothing_informative(all_layouts: list[Layout]) -> int:
    """|S| = 0: a loss of exactly 0, gradients of exactly 0, and an optimizer that steps without harm."""
    weights = dict.fromkeys(MASKS, torch.zeros(N, dtype=torch.float64))
    count = 0
    for layout, aggregation, (dtype, normaliser), microbatches in itertools.product(
        all_layouts, AGGREGATIONS, zip((torch.float64, torch.float32) * 2, NORMALISERS, strict=True), (2,)
    ):
        for deal in deals(layout.dp).values():
            mine = deal[layout.rank // layout.cp]
            options = dict(
                aggregation=aggregation, normaliser=normaliser, term="distill", dtype=dtype, signed=True
            )
            metrics, plain, grad = step(layout, mine, microbatches, weights=weights, **options)
            assert metrics["loss"] == plain == 0.0 and (grad == 0).all()
            assert (
                metrics["loss_per_taught"] == 0.0
                and metrics["taught_tokens"] == 0.0
                and metrics["tokens"] == int(LENS.sum())
            )
            assert (
                metrics["distill.num_questions"] == metrics["distill.mean_weight"] == 0
                and metrics["distill.num_samples"] == N
            )
            parameter = torch.nn.Parameter(THETA.to(dtype).clone())
            parameter.grad = grad
            torch.optim.SGD([parameter], lr=1.0).step()
            assert torch.equal(parameter.detach(), THETA.to(dtype))
            count += 1
    return count


def not_finite(all_layouts: list[Layout]) -> int:
    """A value on one rank that is not finite is NaN on all; the other metrics are untouched."""
    for layout in all_layouts:
        words = {
            "bad": exact_words(torch.tensor([1.0, math.inf if layout.rank == 0 else 2.0])),
            "good": exact_words(torch.tensor(0.1)),
        }
        metrics = reduce_metrics(words, {"bad": "good"}, group=layout.world_group)
        assert math.isnan(metrics["bad"]) and metrics["good"] == exact_value(
            words["good"] * layout.dp * layout.cp
        )
    return len(all_layouts)


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    all_layouts = layouts()
    for case in (every_split, nothing_informative, not_finite):
        count = case(all_layouts)
        if dist.get_rank() == 0:
            print(f"passed {case.__name__} {count}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
