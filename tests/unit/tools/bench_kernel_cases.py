"""Cases of test_bench_kernel.py that need two ranks; run under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

# the tools import each other as scripts do
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from bench_cases import CASES, Setting, make_inputs
from bench_meters import RingBytes
from bench_rivals import CopyToRanks, GatherColumns

TOKENS, VOCAB, K, WIDTH = 16, 256, 10, 8


def known_collectives(rank, group):
    """Bytes received per rank, n = 2: all_reduce 2 (n-1)/n, all_gather (n-1)/n of the output,
    reduce_scatter (n-1)/n of the input.
    """
    words = torch.zeros(1000)
    calls = {
        "all_reduce": (lambda: dist.all_reduce(words, group=group), 4000),
        "all_reduce, group by place": (lambda: dist.all_reduce(words, dist.ReduceOp.MAX, group), 4000),
        "all_gather_into_tensor": (
            lambda: dist.all_gather_into_tensor(torch.zeros(20, dtype=torch.int64), torch.zeros(10).long()),
            80,
        ),
        "all_gather": (
            lambda: dist.all_gather([torch.zeros(5), torch.zeros(5)], torch.zeros(5), group=group),
            20,
        ),
        "reduce_scatter": (lambda: dist.reduce_scatter(torch.zeros(5), [torch.zeros(5), torch.zeros(5)]), 20),
        "broadcast": (lambda: dist.broadcast(words, src=0), 4000),
    }
    total = 0
    with RingBytes() as meter:
        for name, (call, expected) in calls.items():
            call()
            total += expected
            assert meter.received["forward"] == total, (name, meter.received)
        meter.phase = "backward"
        dist.all_reduce(words.double())
    assert meter.received == {"forward": total, "backward": 8000}
    dist.all_reduce(words)
    assert meter.received["backward"] == 8000, "still counting after the end"


def gather_and_its_gradient(rank, group):
    """Columns in the order of the ranks; the gradient is the rank's own slice, not summed; the
    hidden gradient is summed.
    """
    whole = torch.arange(24.0).view(3, 8)
    mine = slice(rank * 4, rank * 4 + 4)
    local = whole[:, mine].clone().requires_grad_()
    with RingBytes() as meter:
        gathered = GatherColumns.apply(local, group)
        meter.phase = "backward"
        (gathered * whole).sum().backward()
    assert torch.equal(gathered, whole) and torch.equal(local.grad, whole[:, mine])
    assert meter.received == {"forward": 48, "backward": 0}
    hidden = torch.ones(3, 2, requires_grad=True)
    (CopyToRanks.apply(hidden, group) * (rank + 1)).sum().backward()
    assert torch.equal(hidden.grad, torch.full((3, 2), 3.0))


def cases_equal_one_rank(rank, group):
    """Inputs, loss and gradients of each case with tensor parallelism are this rank's part of those
    on one rank.
    """
    cpu = torch.device("cpu")
    alone, split = (Setting(TOKENS, VOCAB, WIDTH, K, tp, "float32", "cpu", chunk_tokens=4) for tp in (1, 2))
    part = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    for name, case in CASES.items():
        if case.one_rank or case.source == "e":
            continue
        results = []
        for setting, of_rank, tp_group in ((alone, 0, None), (split, rank, group)):
            job = case.make(make_inputs(setting, case.level, of_rank, cpu, tp_group))
            job.before()
            loss = job.forward()
            results.append((loss, torch.autograd.grad(loss, job.leaves)))
        (loss, grads), (split_loss, split_grads) = results
        expected = (grads[0][:, part],) if case.level == "logits" else (grads[0], grads[1][part])
        torch.testing.assert_close(split_loss, loss, rtol=1e-3, atol=0)
        for a, b in zip(split_grads, expected, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm(), name


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    group = dist.new_group([0, 1])
    for case in (known_collectives, gather_and_its_gradient, cases_equal_one_rank):
        case(dist.get_rank(), group)
        if dist.get_rank() == 0:
            print(f"passed {case.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
