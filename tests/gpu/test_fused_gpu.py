"""The fused loss on CUDA: bfloat16 GEMMs with float32 logits, Triton kernels, main_grad.

It runs on one device and without Megatron.

Proves, where a GPU is: loss and gradients equal the float64 twin on the CPU from the same operands;
a step costs at most 1.35 of its GEMMs; 32k tokens at the TP=8 shard of an 8B head (h 4096, 19072
columns) need at most 1.5 GB above weights, hidden states and main_grad. Does not prove NCCL.
test_kernels_gpu.py tests the kernels on their own.
"""

from __future__ import annotations

import pytest
import torch

from megasd.loss.divergence import divergence
from megasd.ops.fused_linear_loss import TeacherHead, fused_linear_loss, fused_linear_teacher_record
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec
from tests import reference

SUPPORTS = ("student", "teacher", "union", "full", "record")


def loss_function(support: str):
    def loss_fn(logprobs: LogProbs, tokens: slice) -> tuple[torch.Tensor, dict]:
        value = logprobs.divergence_T
        if value is None:
            value = divergence(logprobs.student_logq_TB, logprobs.teacher_logq_TB, beta=0.5, normalised=True)
        return value - 0.1 * logprobs.logp_T, {}

    return loss_fn


def operands(tokens: int, width: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device="cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    hidden, weight = draw(tokens, width), draw(columns, width) * (3.0 / width**0.5)
    teacher = hidden + 0.1 * draw(tokens, width)
    targets = torch.randint(columns, (tokens,), generator=g, device="cuda")
    return hidden.to(dtype), weight.to(dtype), teacher.to(dtype), targets


def twin(hidden, weight, teacher, targets, support, k):
    """Loss and gradients in float64 on the CPU."""
    h, w = hidden.double().cpu().requires_grad_(), weight.double().cpu().requires_grad_()
    s, t = h @ w.t(), teacher.double().cpu() @ w.detach().t()
    if support == "full":
        value = reference.full_divergence(s, t, beta=0.5)
    else:
        ids = [reference.topk(x.detach(), k)[0] for x in (s, t)]
        rows = {"student": ids[0], "union": [reference.union(a, b) for a, b in zip(*ids, strict=True)]}.get(
            support, ids[1]
        )
        pairs = [
            [reference.bucket_logprobs(x[i : i + 1], chosen[None]) for x in (s, t)]
            for i, chosen in enumerate(rows)
        ]
        value = torch.cat([reference.divergence(a, b, beta=0.5) for a, b in pairs])
    loss = (value - 0.1 * reference.sampled_logp(s, targets.cpu())).sum()
    loss.backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_float64_twin(dtype, support, main_grad):
    torch.backends.cuda.matmul.allow_tf32 = False
    k, columns = 50, 3000
    hidden, weight, teacher_hidden, targets = operands(200, 128, columns, dtype)
    expected = twin(hidden, weight, teacher_hidden, targets, support, k)
    teacher = TeacherHead(teacher_hidden, weight.detach())
    # a few chunks
    call = dict(tp_group=None, memory_bytes=64 * columns * 10)
    if support == "record":
        teacher = fused_linear_teacher_record(
            teacher_hidden, weight, k, vocab_size=columns, temperature=1.0, **call
        )
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if main_grad:
        w.main_grad = torch.ones(w.shape, device="cuda")
    loss, _ = fused_linear_loss(
        x, w, targets, LogProbsSpec(columns, support, k), loss_function(support), teacher=teacher, **call
    )
    loss.backward()
    found = (loss, x.grad, w.main_grad - 1 if main_grad else w.grad)
    tolerance = 5e-3 if dtype is torch.bfloat16 else 1e-4
    for name, a, b in zip(("loss", "hidden gradient", "weight gradient"), found, expected, strict=True):
        error = ((a.double().cpu() - b).norm() / b.norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_upstream_gradient_of_two_is_refused():
    """The device-side assertion would end the process's CUDA context, so this runs in a process of
    its own.
    """
    import subprocess
    import sys

    code = (
        "import torch\nfrom tests.gpu.test_fused_gpu import *\nx, w, t, y = operands(8, 32, 64,"
        " torch.bfloat16)\nw.requires_grad_(); w.main_grad = torch.zeros(64, 32, device='cuda')\nloss, _ ="
        " fused_linear_loss(x, w, y, LogProbsSpec(64, 'student', 4), loss_function('student'),"
        " teacher=TeacherHead(t, w.detach()), tp_group=None, memory_bytes=1 << 20)\n(2 * loss).backward();"
        " torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in (done.stderr + done.stdout).lower()


@pytest.mark.parametrize("support", ["student", "full"])
def test_time_and_memory_at_the_size_of_an_8b_head(support):
    from triton.testing import do_bench

    tokens, width, columns = 32768, 4096, 19072
    hidden, weight, teacher_hidden, targets = operands(tokens, width, columns, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.zeros(columns, width, device="cuda")
    teacher, spec = TeacherHead(teacher_hidden, weight.detach()), LogProbsSpec(columns, support, 100)

    def step() -> None:
        loss, _ = fused_linear_loss(
            hidden,
            weight,
            targets,
            spec,
            loss_function(support),
            teacher=teacher,
            tp_group=None,
            memory_bytes=768 << 20,
        )
        torch.autograd.grad(loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    step_ms = do_bench(step, warmup=200, rep=2000, return_mode="median")

    rows = 4096
    logits, narrow = (
        torch.empty(rows, columns, device="cuda"),
        torch.randn(rows, columns, device="cuda").bfloat16(),
    )

    def gemms() -> None:
        for start in range(0, tokens, rows):
            part = hidden.detach()[start : start + rows]
            torch.mm(part, teacher.weight_Vh.t(), out_dtype=torch.float32, out=logits)
            torch.mm(
                teacher_hidden[start : start + rows],
                teacher.weight_Vh.t(),
                out_dtype=torch.float32,
                out=logits,
            )
            torch.mm(narrow, teacher.weight_Vh, out_dtype=torch.float32)
            torch.addmm(weight.main_grad, narrow.t(), part, out_dtype=torch.float32, out=weight.main_grad)

    gemm_ms = do_bench(gemms, warmup=200, rep=2000, return_mode="median")
    print(
        f"{support}: {step_ms:.1f} ms, four GEMMs {gemm_ms:.1f} ms, ratio {step_ms / gemm_ms:.2f}; peak"
        f" {peak / 1e9:.2f} GB above operands"
    )
    assert step_ms <= 1.35 * gemm_ms
    assert peak <= 1.5e9
