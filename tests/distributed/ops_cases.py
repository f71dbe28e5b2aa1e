"""Cases of test_ops.py, run under torchrun on any number of ranks. Every rank makes the same whole tensors and takes its slice."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from megasd.algo.pass_rate import normalise
from megasd.loss.divergence import divergence
from megasd.loss.reduce import global_normaliser, megatron_loss, reduce_metrics, token_weights
from megasd.ops import reference
from megasd.ops.topk import vocab_parallel_topk
from megasd.ops.vocab_parallel import TAILS, bucket_logprobs, entropy, full_divergence, sampled_logp

TOLERANCE = dict(rtol=0, atol=1e-12)
VOCAB, PADDED = 21, 24  # 4 ranks: the last slice holds 3 padded columns; k = 21 is more than a slice
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast", "all_to_all_single")


def logits(num_tokens, vocab, seed, scale=3.0):
    return torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def shard(x, padded, garbage=1e4):
    """This rank's columns, padding filled with a value that would win every comparison."""
    whole = torch.cat([x, torch.full((x.shape[0], padded - x.shape[1]), garbage, dtype=x.dtype)], dim=1)
    width = padded // dist.get_world_size()
    return whole[:, dist.get_rank() * width : (dist.get_rank() + 1) * width].clone()


def whole_of(local, vocab):
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    whole = torch.cat(parts, dim=1)
    assert (whole[:, vocab:] == 0).all(), "padded columns have a gradient"
    return whole[:, :vocab]


def same_on_all_ranks(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    assert all((part == parts[0]).all() for part in parts), "ranks differ"


class CountCollectives:
    """Counts the calls of torch.distributed collectives while it is open."""

    def __enter__(self):
        self.count, self.real = 0, {name: getattr(dist, name) for name in COLLECTIVES}
        for name, real in self.real.items():
            setattr(dist, name, self.counted(real))
        return self

    def counted(self, real):
        def call(*args, **kwargs):
            self.count += 1
            return real(*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, real in self.real.items():
            setattr(dist, name, real)


def buckets_and_divergence(group):
    student, teacher, upstream = logits(9, VOCAB, 0).requires_grad_(), logits(9, VOCAB, 1), logits(9, 1, 2)[:, 0]
    for k, tail, beta, temperature in itertools.product((1, 8, VOCAB), TAILS, (0.0, 0.3, 1.0), (0.7,)):
        x = shard(student.detach(), PADDED).requires_grad_()
        with CountCollectives() as selection:
            ids, values = vocab_parallel_topk(x, k, vocab_size=VOCAB, tp_group=group)
        expected_ids, expected_values = reference.topk(student, k)
        assert (ids == expected_ids).all() and (values == expected_values).all()
        with CountCollectives() as forward:
            s = bucket_logprobs(x, ids, vocab_size=VOCAB, tp_group=group, temperature=temperature, tail=tail)
        t = bucket_logprobs(shard(teacher, PADDED, -5.0), ids, vocab_size=VOCAB, tp_group=group, temperature=temperature, tail=tail)
        loss = divergence(s, t, beta=beta, normalised=tail != "raw")
        same_on_all_ranks(s)
        same_on_all_ranks(loss)
        with CountCollectives() as backward:
            (grad,) = torch.autograd.grad(loss, x, upstream)
        assert (selection.count, forward.count, backward.count) == (1, 1, 0)
        expected_tail = "raw" if k == VOCAB and tail == "bucket" else tail
        s, t = (reference.bucket_logprobs(y, expected_ids, temperature=temperature, tail=expected_tail) for y in (student, teacher))
        expected = reference.divergence(s, t, beta=beta)
        torch.testing.assert_close(loss, expected, **TOLERANCE)
        torch.testing.assert_close(whole_of(grad, VOCAB), torch.autograd.grad(expected, student, upstream)[0], **TOLERANCE)


def full_and_scalars(group):
    student, teacher, upstream = logits(9, VOCAB, 3).requires_grad_(), logits(9, VOCAB, 4), logits(9, 1, 5)[:, 0]
    targets = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 1.4):
        for beta in (0.0, 0.1, 0.5, 1.0):
            x = shard(student.detach(), PADDED).requires_grad_()
            with CountCollectives() as forward:
                loss = full_divergence(x, shard(teacher, PADDED, 9.0), beta=beta, vocab_size=VOCAB, tp_group=group, temperature=temperature)
            same_on_all_ranks(loss)
            with CountCollectives() as backward:
                (grad,) = torch.autograd.grad(loss, x, upstream)
            assert (forward.count, backward.count) == (2, 0)
            expected = reference.full_divergence(student, teacher, beta=beta, temperature=temperature)
            torch.testing.assert_close(loss, expected, **TOLERANCE)
            torch.testing.assert_close(whole_of(grad, VOCAB), torch.autograd.grad(expected, student, upstream)[0], **TOLERANCE)
        x = shard(student.detach(), PADDED).requires_grad_()
        with CountCollectives() as forward:
            logp = sampled_logp(x, targets, vocab_size=VOCAB, tp_group=group, temperature=temperature)
        same_on_all_ranks(logp)
        expected = reference.sampled_logp(student, targets, temperature=temperature)
        torch.testing.assert_close(logp, expected, **TOLERANCE)
        with CountCollectives() as backward:
            (grad,) = torch.autograd.grad(logp, x, upstream)
        assert (forward.count, backward.count) == (1, 0)
        torch.testing.assert_close(whole_of(grad, VOCAB), torch.autograd.grad(expected, student, upstream)[0], **TOLERANCE)
        entropies = entropy(x, vocab_size=VOCAB, tp_group=group, temperature=temperature)
        torch.testing.assert_close(entropies, reference.entropy(student, temperature=temperature), **TOLERANCE)


def ties(group):
    """bfloat16 logits tie at the k-th place in most rows; the ids must be those of one rank, bit for bit."""
    vocab = 4096
    x = logits(200, vocab, 6, scale=2.0).bfloat16()
    for k in (100, 500):
        expected_ids, expected_values = reference.topk(x, k)
        kth = x.gather(1, expected_ids[:, -1:])
        boundary = (x == kth).sum(-1) > (expected_values == kth).sum(-1)  # equal values on both sides of the cut
        assert boundary.double().mean() > 0.5, "the case does not test ties"
        ids, values = vocab_parallel_topk(shard(x, vocab), k, vocab_size=vocab, tp_group=group)
        same_on_all_ranks(ids)
        assert (ids == expected_ids).all() and (values == expected_values).all() and values.dtype == torch.float32
    equal = torch.zeros(3, VOCAB)
    ids, _ = vocab_parallel_topk(shard(equal, PADDED), 13, vocab_size=VOCAB, tp_group=group)
    assert (ids == torch.arange(13)).all()


def masked_and_extreme(group):
    """A slice without one possible token, a slice of padding alone, +-1e4: what one process computes."""
    student, teacher = logits(6, VOCAB, 7), logits(6, VOCAB, 8)
    first = slice(0, PADDED // dist.get_world_size())
    student[0, first], teacher[0, first] = -torch.inf, -torch.inf
    student[1, 0], student[2, VOCAB - 1], teacher[2, 3] = 1e4, -1e4, 1e4
    for beta in (0.0, 0.5, 1.0):
        for padded in (PADDED, 4 * VOCAB):  # the second leaves ranks without a true column
            x, whole = shard(student, padded).requires_grad_(), student.clone().requires_grad_()
            ids, _ = vocab_parallel_topk(x, 5, vocab_size=VOCAB, tp_group=group)
            assert (ids == reference.topk(student, 5)[0]).all()
            y = shard(teacher, padded)
            s, t = (bucket_logprobs(z, ids, vocab_size=VOCAB, tp_group=group) for z in (x, y))
            alone = [bucket_logprobs(z, ids, vocab_size=VOCAB, tp_group=None) for z in (whole, teacher)]
            loss, expected = divergence(s, t, beta=beta, normalised=True), divergence(*alone, beta=beta, normalised=True)
            torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-12)
            grad, expected_grad = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(expected.sum(), whole)[0]
            assert expected_grad.isfinite().all()
            torch.testing.assert_close(whole_of(grad, VOCAB), expected_grad, rtol=1e-13, atol=1e-12)
            loss = full_divergence(x, y, beta=beta, vocab_size=VOCAB, tp_group=group)
            expected = full_divergence(whole, teacher, beta=beta, vocab_size=VOCAB, tp_group=None)
            torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-12)
            grad, expected_grad = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(expected.sum(), whole)[0]
            torch.testing.assert_close(whole_of(grad, VOCAB), expected_grad, rtol=1e-13, atol=1e-12)


def no_tokens(group):
    x = torch.zeros(0, PADDED // dist.get_world_size(), requires_grad=True)
    ids, _ = vocab_parallel_topk(x, 3, vocab_size=VOCAB, tp_group=group)
    s = bucket_logprobs(x, ids, vocab_size=VOCAB, tp_group=group)
    divergence(s, s.detach(), beta=0.5, normalised=True).sum().backward()
    full_divergence(x, x.detach(), beta=0.5, vocab_size=VOCAB, tp_group=group).sum().backward()


def global_normalisation(group):
    """Questions split over ranks, and a rank that holds no informative question: the figures of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    raw, sizes = [0.0, 0.25, 0.5, 0.3307, 0.0], [4, 3, 5, 2, 6]
    weight = torch.tensor([w for w, n in zip(raw, sizes, strict=True) for _ in range(n)], dtype=torch.float64)
    size = torch.tensor([n for n in sizes for _ in range(n)])
    lens = torch.arange(1, 21) % 7 + 1
    mask = torch.arange(20) % 3 != 0
    losses = logits(1, int(lens.sum()), 9)[0].abs().float()
    uninformative_first = torch.argsort((weight > 0).int(), stable=True)  # with contiguous dealing, rank 0 has nothing to learn from
    for order in (torch.arange(20), uninformative_first):
        mine = order[rank * 20 // world : (rank + 1) * 20 // world]
        if order is uninformative_first and rank == 0:
            assert (weight[mine] == 0).all()
        for aggregation in ("sequence_mean", "token_mean"):
            alone = global_normaliser(weight, size, mask, lens)
            shared = global_normaliser(weight[mine], size[mine], mask[mine], lens[mine], dp_group=group)
            for name in ("mean_weight", "num_questions", "num_samples", "num_tokens"):
                torch.testing.assert_close(getattr(shared, name), getattr(alone, name), rtol=1e-14, atol=0)
            informative = [w for w in raw if w > 0]
            torch.testing.assert_close(shared.mean_weight, sum(informative) / len(informative), rtol=1e-14, atol=0)
            tokens = losses.split(lens.tolist())
            local = torch.cat([tokens[i] for i in mine.tolist()])
            weights = token_weights(weight[mine], mask[mine], lens[mine], normaliser=shared, aggregation=aggregation)
            loss, _, _ = megatron_loss(local, weights)
            total = reduce_metrics({"loss": loss}, {}, group=group)["loss"]
            wbar = list(normalise({str(j): w for j, w in enumerate(raw)}).values())
            question = [j for j, n in enumerate(sizes) for _ in range(n)]
            expected = 0.0
            for i in mask.nonzero()[:, 0].tolist():
                share = 20 * len(tokens[i]) if aggregation == "sequence_mean" else int((lens * mask).sum())
                expected += wbar[question[i]] * tokens[i].double().sum().item() / share
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    nobody = global_normaliser(weight[:2] * 0, size[:2], mask[:2], lens[:2], dp_group=group)
    assert nobody.mean_weight == 0.0 and nobody.num_questions == 0.0
    # Ranks of unequal size, one empty.
    mine = torch.arange(20)[: 0 if rank == 0 else None][max(rank - 1, 0) :: max(world - 1, 1)]
    uneven = global_normaliser(weight[mine], size[mine], mask[mine], lens[mine], dp_group=group)
    torch.testing.assert_close(uneven.mean_weight, alone.mean_weight, rtol=1e-14, atol=0)
    assert (uneven.num_samples, uneven.num_tokens) == (20.0, alone.num_tokens)
    metrics = reduce_metrics({"kl": float(rank), "count": 1}, {"kl": 2.0}, group=group)
    assert metrics == {"kl": sum(range(world)) / (2 * world), "count": float(world)}


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    group = dist.new_group(list(range(dist.get_world_size())))
    for case in (buckets_and_divergence, full_and_scalars, ties, masked_and_extreme, no_tokens, global_normalisation):
        case(group)
        if dist.get_rank() == 0:
            print(f"passed {case.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
