"""A training step without a model, for methods_cases.py: scored groups -> batch -> weights and
credit -> loss and gradient of the logits.

Everything goes through the public pieces: build_batch, loss/token_weights.py, the readout on
vocabulary shards, the objective, the rows of algo/recipes.py. Only the model is missing: logits
(float64) stand in for it. Every rank makes the same whole tensors and takes its part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megasd.algo.recipes import RECIPES
from megasd.algo.stages import at
from megasd.algo.state import AlgorithmState
from megasd.batch.balance import by_count
from megasd.batch.batch import Batch
from megasd.batch.build import build_batch
from megasd.config.schema import AlgorithmConfig
from megasd.config.variants import credit_traits, token_weight_traits
from megasd.loss.exact_sum import reduce_metrics
from megasd.loss.objective import METRIC_WEIGHTS, logprobs_spec, objective, token_divergence
from megasd.loss.sequence_stats import EntropyGate
from megasd.loss.token_weights import TokenWeights, token_weights
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_loss
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec, vocab_parallel_logprobs
from megasd.types import Group, Prompt, Sample, Verdict

VOCAB, PADDED, ROOM, TEMPERATURE, TOP_K = 13, 16, 8, 0.9, 4
RIGHT, WRONG, ERROR = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR
CLOSE = dict(rtol=1e-12, atol=1e-13)


class Letters:
    """Stands in for a tokenizer: one id per character."""

    def encode_prompt(
        self, messages: list[dict[str, str]], *, enable_thinking: bool | None = None
    ) -> list[int]:
        return [ord(c) for m in messages for c in m["content"]]


@dataclass
class Layout:
    """tp x dp ranks, tensor parallelism innermost, as Megatron has it."""

    tp: int
    dp: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def dp_rank(self) -> int:
        return dist.get_rank() // self.tp


def layouts() -> list[Layout]:
    """All that this number of ranks allows; those of one sort of parallelism first."""
    found, world, rank = [], dist.get_world_size(), dist.get_rank()
    for tp, dp in {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(1, 4), (2, 2)]}[world]:
        tp_groups = [dist.new_group(list(range(d * tp, (d + 1) * tp))) for d in range(dp)]
        dp_groups = [dist.new_group(list(range(t, world, tp))) for t in range(tp)]
        found.append(Layout(tp, dp, tp_groups[rank // tp], dp_groups[rank % tp]))
    return found


def alone(layout: Layout) -> Layout:
    """The same tensor parallelism without data parallelism: every data-parallel rank does all of the work."""
    return replace(layout, dp=1, dp_group=None)


@dataclass
class World:
    """Scored groups and what models say about their tokens: logits [R, V] of student and teacher,
    [2, R, V] of contrasting teachers.
    """

    groups: list[Group]
    student: torch.Tensor
    teacher: torch.Tensor
    contrasts: torch.Tensor
    # [R] where the logits of a token are; None: in order
    places: torch.Tensor | None = None


def logits(shape: tuple[int, ...], seed: int, scale: float = 2.0) -> torch.Tensor:
    return (
        torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    )


def world(verdicts: list[list[Verdict]], seed: int = 0) -> World:
    g = torch.Generator().manual_seed(seed)
    groups = []
    for j, row in enumerate(verdicts):
        prompt = Prompt(
            f"q{j}",
            [{"role": "user", "content": f"question {j}"}],
            "42",
            "by thought\nit is 42",
            pass_rate=(j % 3 + 1) / 5,
        )
        group = Group(prompt)
        for i, verdict in enumerate(row):
            length = int(torch.randint(1, ROOM, (), generator=g))
            ids = torch.randint(VOCAB, (length,), generator=g).tolist()
            logps = (-torch.rand(length, generator=g) * 4).tolist()
            group.samples.append(
                Sample(prompt.id, i, [1, 2], ids, logps, f"says {i}", "stop", 0, verdict=verdict)
            )
        groups.append(group)
    tokens = sum(len(s.response_ids) for group in groups for s in group.samples)
    return World(
        groups, logits((tokens,), seed + 1), logits((tokens,), seed + 2), logits((2, tokens), seed + 3)
    )


MIXED = [
    [RIGHT, WRONG, WRONG, RIGHT],
    [RIGHT, RIGHT, RIGHT, RIGHT],
    [WRONG, WRONG, ERROR, WRONG],
    [WRONG, RIGHT, WRONG, WRONG],
    [ERROR, RIGHT, WRONG, RIGHT],
]


def shard(x: torch.Tensor, tp_group: dist.ProcessGroup, garbage: float = 1e4) -> torch.Tensor:
    """This rank's columns, the padding filled with a value that would win every comparison."""
    whole = torch.nn.functional.pad(x, (0, PADDED - x.shape[1]), value=garbage)
    width = PADDED // dist.get_world_size(tp_group)
    rank = dist.get_rank(tp_group)
    return whole[:, rank * width : (rank + 1) * width].clone()


def whole_of(local: torch.Tensor, tp_group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(parts, local.contiguous(), group=tp_group)
    whole = torch.cat(parts, dim=1)
    assert (whole[:, VOCAB:] == 0).all(), "padded columns have a gradient"
    return whole[:, :VOCAB]


def read_alone(x: torch.Tensor, targets: torch.Tensor, layout: Layout) -> LogProbs:
    spec = LogProbsSpec(VOCAB, "none", temperature=TEMPERATURE)
    return vocab_parallel_logprobs(shard(x, layout.tp_group), None, targets, spec, tp_group=layout.tp_group)


def signals(
    batch: Batch, mine: World, algorithm: AlgorithmConfig, layout: Layout, old: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What passes before the student's step leave; garbage where there is no teacher, which nothing
    may read.
    """
    lens, targets = batch.response_lens, batch.response_ids
    present = (batch.context_lens > 0).repeat_interleave(lens, dim=0).t()
    taught = present[0] if algorithm.teacher is not None else torch.zeros(len(targets), dtype=torch.bool)
    streams = dict(batch.streams) | {"distilled": taught}
    teacher = read_alone(mine.teacher, targets, layout)
    streams |= {
        "teacher_logp": torch.where(taught, teacher.logp_T, 3.0),
        "teacher_entropy": torch.where(taught, teacher.entropy_T, 9.0),
    }
    contrasts = [read_alone(x, targets, layout).logp_T for x in mine.contrasts[: len(present) - 1]]
    none = teacher.logp_T.new_zeros(0, len(targets))
    streams |= {
        "contrast_logp": torch.stack(contrasts) if contrasts else none,
        "contrast_present": present[1:],
    }
    if old is not None:
        streams["old_logp"] = old
    elif credit_traits(algorithm).needs_old_logp:
        streams["old_logp"] = read_alone(mine.student, targets, layout).logp_T
    if algorithm.distill is not None and token_weight_traits(algorithm).reads_divergence:
        spec = logprobs_spec(algorithm, temperature=TEMPERATURE, vocab_size=VOCAB)
        x, y = shard(mine.student, layout.tp_group), shard(mine.teacher, layout.tp_group)
        streams["divergence"] = token_divergence(
            vocab_parallel_logprobs(x, y, targets, spec, tp_group=layout.tp_group), algorithm.distill
        )
    return streams


def batch_of(groups: list[Group], algorithm: AlgorithmConfig) -> tuple[Batch, AlgorithmState]:
    memory = AlgorithmState(algorithm, seed=1, steps=100)
    options = dict(step=0, max_length=10**6, room=ROOM, answer_of=lambda text: text)
    return build_batch(groups, algorithm, Letters(), memory, **options)[0], memory


@dataclass
class Result:
    # the plain sum of the microbatches' and data-parallel ranks' losses
    loss: torch.Tensor
    # [R, V] in the student's logits, of all ranks
    gradient: torch.Tensor
    # of the objective
    metrics: dict[str, float]
    # of this rank
    token_weights: TokenWeights
    # its tokens
    places: torch.Tensor


def step(
    w: World,
    algorithm: AlgorithmConfig,
    layout: Layout,
    *,
    microbatches: int = 1,
    fused: bool = False,
    old=None,
) -> Result:
    """One training step without a model. microbatches: tokens dealt in turn. fused: by the fused
    output layer, on the identity.
    """
    batch, memory = batch_of(w.groups, algorithm)
    batch.streams["place"] = torch.arange(len(batch.response_ids), dtype=torch.float32)
    whole, num_tokens = batch, len(batch.response_ids)
    if layout.dp > 1:
        lengths = (
            torch.maximum(batch.prompt_lens, batch.context_lens.amax(1)) + batch.response_lens
        ).tolist()
        batch = batch.select(
            by_count(lengths, (batch.question_weight > 0).tolist(), layout.dp, 1)[layout.dp_rank].samples
        )
    places = batch.streams.pop("place").long()
    whole.streams.pop("place", None)
    mine = replace(w, student=w.student[places], teacher=w.teacher[places], contrasts=w.contrasts[:, places])
    gate = EntropyGate(warmup=1, ratio=0.5)
    gate.observe(0.1)
    mean, kind = (
        memory.dataset_mean([group.prompt for group in w.groups]),
        algorithm.question_weight.normaliser,
    )
    options = dict(normaliser=kind, mean_weight=mean, room=ROOM, dp_group=layout.dp_group)
    streams = signals(batch, mine, algorithm, layout, None if old is None else old[places])
    weighed = token_weights(
        batch, streams, algorithm, observe=lambda median: (gate.observe(median), median), **options
    )
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(num_tokens, VOCAB, dtype=torch.float64)
    totals: dict[str, torch.Tensor] = {}
    for m in range(microbatches):
        index = torch.arange(m, len(places), microbatches)
        part, part_gradient, sums = of_tokens(
            mine, batch.response_ids, weighed, index, algorithm, layout, fused=fused
        )
        loss, gradient[places[index]] = loss + part, part_gradient
        totals = {name: totals.get(name, 0) + words for name, words in sums.items()}
    if layout.dp > 1:
        dist.all_reduce(loss, group=layout.dp_group)
        dist.all_reduce(gradient, group=layout.dp_group)
    by = {name: METRIC_WEIGHTS.get(name, "tokens") for name in totals}
    metrics = reduce_metrics(totals, {name: over for name, over in by.items() if over}, group=layout.dp_group)
    return Result(loss, gradient, metrics, weighed, places)


def of_tokens(
    mine: World,
    targets: torch.Tensor,
    weighed: TokenWeights,
    index: torch.Tensor,
    algorithm: AlgorithmConfig,
    layout: Layout,
    *,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradient [T, V], metric words) of some tokens."""
    group, valid = layout.tp_group, torch.ones(len(index), dtype=torch.bool)
    spec = logprobs_spec(algorithm, temperature=TEMPERATURE, vocab_size=VOCAB)

    def loss_fn(readout: LogProbs, tokens: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        streams, weights = (
            {k: v[..., index[tokens]] for k, v in d.items()} for d in (weighed.streams, weighed.weights)
        )
        return objective(readout, streams, weights, valid[tokens], algorithm)

    student, teacher = mine.student[index], mine.teacher[index]
    if fused:
        weight = shard(torch.eye(VOCAB, dtype=torch.float64), group, 0.0).t().contiguous()
        hidden, head = (
            student.requires_grad_(),
            TeacherHead(teacher, weight) if algorithm.distill is not None else None,
        )
        loss, sums = fused_linear_loss(
            hidden, weight, targets[index], spec, loss_fn, teacher=head, tp_group=group, memory_bytes=1 << 9
        )
        loss.backward()
        return loss.detach(), hidden.grad, sums
    x = shard(student, group).requires_grad_()
    y = shard(teacher, group) if algorithm.distill is not None else None
    loss_T, sums = loss_fn(
        vocab_parallel_logprobs(x, y, targets[index], spec, tp_group=group), slice(0, len(index))
    )
    loss_T.sum().backward()
    return loss_T.detach().sum(), whole_of(x.grad, group), sums


def small(algorithm: AlgorithmConfig, **changes: object) -> AlgorithmConfig:
    """The row with a support that is smaller than the vocabulary, and changes of its distillation term."""
    if algorithm.distill is None:
        return algorithm
    return replace(algorithm, distill=replace(algorithm.distill, **{"top_k": TOP_K} | changes))


def rows() -> dict[str, AlgorithmConfig]:
    """Every recipe as it is at the first step, and after its stages."""
    found = {name: small(at(row, 0, 100)) for name, row in RECIPES.items()}
    return found | {
        f"{name} at the end": small(at(row, 99, 100)) for name, row in RECIPES.items() if row.stages
    }


def same(a: Result, b: Result, *, bits: bool = True) -> None:
    """Equal loss and gradient, and metrics where both have them; to the last bit or to 1e-12."""
    both = a.metrics.keys() & b.metrics.keys()
    if bits:
        assert torch.equal(a.loss, b.loss) and torch.equal(a.gradient, b.gradient), (
            a.loss - b.loss,
            (a.gradient - b.gradient).abs().max(),
        )
        assert {name: a.metrics[name] for name in both} == {name: b.metrics[name] for name in both}
    else:
        torch.testing.assert_close(a.loss, b.loss, **CLOSE)
        torch.testing.assert_close(a.gradient, b.gradient, **CLOSE)
    assert a.gradient.abs().max() > 1e-6, "nothing was learned, so nothing was compared"
