"""Memory of the fused loss on a CPU: peak of live tensor bytes during forward and backward, from
the profiler's allocation events.

Proves: the peak is the chunk's, not the tokens': 4N tokens need within 5 percent of what N need; a
larger budget is used; O(K) is saved. Does not prove: resident memory or anything on a GPU
(tools/bench_kernel.py and tests/gpu measure those).
"""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megasd.loss.divergence import divergence
from megasd.ops.fused_linear_loss import TeacherHead, chunk_tokens, fused_linear_loss
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec

VOCAB, WIDTH = 8192, 16


def peak_bytes(tokens: int, support: str, memory: int) -> int:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(tokens, WIDTH, generator=g, requires_grad=True),
        torch.randn(VOCAB, WIDTH, generator=g, requires_grad=True),
    )
    teacher = TeacherHead(torch.randn(tokens, WIDTH, generator=g), weight.detach())
    weight.main_grad = torch.zeros(VOCAB, WIDTH)

    def loss_fn(readout: LogProbs, chunk: slice) -> tuple[torch.Tensor, dict]:
        if readout.divergence_T is not None:
            return readout.divergence_T, {}
        return divergence(readout.student_logq_TB, readout.teacher_logq_TB, beta=0.5, normalised=True), {}

    def step() -> None:
        spec = LogProbsSpec(VOCAB, support, 32)
        loss, _ = fused_linear_loss(
            hidden, weight, None, spec, loss_fn, teacher=teacher, tp_group=None, memory_bytes=memory
        )
        torch.autograd.grad(loss, hidden)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "support", ["student", *(pytest.param(s, marks=pytest.mark.nightly) for s in ("union", "full"))]
)
def test_peak_does_not_depend_on_the_tokens(support):
    budget = 8 << 20
    small, large = peak_bytes(512, support, budget), peak_bytes(2048, support, budget)
    print(
        f"{support}: {small / 2**20:.1f} MiB for 512 tokens, {large / 2**20:.1f} MiB for 2048; budget"
        f" {budget / 2**20:.0f}"
    )
    assert large <= 1.05 * small
    assert peak_bytes(2048, support, 4 * budget) > 2 * small


def test_chunks_fit_the_budget():
    weight = torch.zeros(1000, 8)
    head = TeacherHead(torch.zeros(1, 8), weight)
    # a token at least
    assert chunk_tokens(1, weight, head) == 1
    assert chunk_tokens(8000 * 50, weight, head) == 50
    # whole multiples of 128
    assert chunk_tokens(8000 * 300, weight, head) == 256
    assert chunk_tokens(4000 * 300, weight, None) == 256
    # logits are float32 all the same
    assert chunk_tokens(4000 * 300, weight.bfloat16(), None) == 256
