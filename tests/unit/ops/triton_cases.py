"""Cases of test_kernels_triton.py: the Triton kernels in Triton's interpreter against float64 twins
written from the definitions, and against kernels_torch. TRITON_INTERPRET=1 must be set before this
file is run.
"""

from __future__ import annotations

import math
import os
import time
import warnings

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels_triton.py"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasd.ops import kernels_torch
from megasd.ops import kernels_triton as passes

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16)


def logits_of(
    kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """One kind of rows; the storage is wider than the row, so the stride is not the width."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * 3
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "all_equal":
        x = torch.full_like(x, -1.25)
    elif kind == "up":
        x = x.sort(-1).values
    elif kind == "down":
        x = x.sort(-1, descending=True).values
    elif kind == "masked":
        # some columns at -inf; the last row wholly
        x[torch.rand(x.shape, generator=g) < 0.4] = -INF
        x[-1] = -INF
    elif kind == "few_finite":
        x[:, torch.arange(columns) % 97 != 5] = -INF
        x[-1, ::2] = torch.finfo(torch.float32).min if dtype == torch.float32 else -INF
    elif kind == "huge":
        x = x.sign() * 1e4 + x
    elif kind == "spike":
        x[:, columns // 2] = 80.0
    elif kind == "mass_tie":
        # more ties at the k-th value than there is room for candidates
        x = torch.where(torch.rand(x.shape, generator=g) < 0.5, torch.tensor(2.0), x.clamp(max=1.9))
        x[:, 3] = 7.0
    elif kind == "zeros":
        # -0 and +0 are one value
        x = torch.where(torch.rand(x.shape, generator=g) < 0.5, 0.0, -0.0)
    else:
        assert kind == "random", kind
    wide = torch.full((rows, columns + 5), NAN, dtype=dtype)
    wide[:, :columns] = x.to(dtype)
    return wide[:, :columns]


KINDS = (
    "random",
    "ties",
    "all_equal",
    "up",
    "down",
    "masked",
    "few_finite",
    "huge",
    "spike",
    "mass_tie",
    "zeros",
)


def score64(logits: Tensor, num_valid: int, temperature: float) -> Tensor:
    """The float32 scores, exactly, in float64."""
    return (logits[:, :num_valid].float() * passes._inverse(temperature)).double()


def rest64(score: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum, moment) over the columns that are not chosen ([T, V] bool)."""
    if score.shape[1] == 0:
        zero = score.new_zeros(score.shape[0])
        return zero - INF, zero, zero
    left = score.masked_fill(chosen, -INF)
    top = left.amax(-1)
    shift = left - torch.where(top == -INF, 0.0, top)[:, None]
    weight = shift.exp()
    return top, weight.sum(-1), torch.where(weight > 0, weight * shift, 0.0).sum(-1)


def close(name: str, got: Tensor, want: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def check_rest(name: str, rest, want) -> None:
    assert torch.equal(rest.max_T.double(), want[0]), (name, rest.max_T, want[0])
    close(f"{name} sum", rest.sum_T, want[1], 2e-6)
    bound = 3e-6 * (want[1] + want[2].abs()) + 1e-30
    assert ((rest.moment_T.double() - want[2]).abs() <= bound).all(), (name, rest.moment_T, want[2])


def check_select(name: str, logits: Tensor, k: int, num_valid: int, temperature: float = 1.0) -> None:
    kept = logits.clone()
    values, ids, rest = passes.select(logits, k, num_valid=num_valid, temperature=temperature)
    score = score64(logits, num_valid, temperature)
    want, order = score.sort(dim=-1, descending=True, stable=True)
    assert ids.dtype == torch.int32 and values.dtype == torch.float32
    assert torch.equal(ids.long(), order[:, :k]), name
    assert torch.equal(values.double(), want[:, :k]), name
    check_rest(
        name, rest, rest64(score, torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :k], True))
    )
    assert torch.equal(logits, kept), f"{name}: the logits changed"
    if temperature == 1.0:
        other_values, other_ids, other_rest = kernels_torch.select(
            logits, k, num_valid=num_valid, temperature=temperature
        )
        assert torch.equal(other_ids, ids) and torch.equal(other_values, values), name
        assert torch.equal(other_rest.max_T, rest.max_T), name
        close(name, rest.sum_T, other_rest.sum_T, 4e-6)


# Cases --------------------------------------------------------------------------------------------


@triton.jit
def _pieces_kernel(d_ptr, z_ptr, e_ptr, excess_ptr, log_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e, excess, _ = passes._expm1_negative(tl.load(d_ptr + at))
    tl.store(e_ptr + at, e)
    tl.store(excess_ptr + at, excess)
    tl.store(log_ptr + at, passes._log1p_negative(tl.load(z_ptr + at), True))


def expm1_and_log1p() -> None:
    n = 1 << 18
    d = torch.cat([torch.logspace(-12, 2, n // 2), torch.linspace(1e-6, 2, n // 2)])
    z = -torch.cat([torch.logspace(-12, -0.001, n // 2), torch.linspace(1e-6, 0.9999, n // 2)])
    d[0], z[0] = 0.0, 0.0
    e, excess, log = (torch.empty(n) for _ in range(3))
    _pieces_kernel[(n // 65536,)](d, z, e, excess, log, BLOCK=65536)
    want = torch.expm1(-d.double())
    small = d.double() < 0.05
    series = d.double() ** 2 * sum((-d.double()) ** i / math.factorial(i + 2) for i in range(12))
    wants = {
        "expm1": (e, want),
        "expm1 + d": (excess, torch.where(small, series, want + d.double())),
        "log1p": (log, z.double().log1p()),
    }
    for name, (got, exact) in wants.items():
        assert got[0] == 0
        error = ((got.double() - exact).abs() / exact.abs())[1:].max().item()
        print(f"  {name}: largest relative error {error:.2e}")
        assert error < 3e-7, name


def select_kinds() -> None:
    for dtype in DTYPES:
        for kind in KINDS:
            check_select(f"{kind} {dtype}", logits_of(kind, 2, 5003, dtype), 100, 5000)
    check_select("float16", logits_of("random", 2, 5003, torch.float16), 100, 5003)
    check_select("8 rows on 3 programs", logits_of("random", 8, 700), 5, 700)
    check_select("several tiles", logits_of("random", 1, 14000), 100, 13999)
    check_select("several tiles, up", logits_of("up", 1, 14000, torch.bfloat16), 100, 13999)


def select_every_k() -> None:
    for kind in ("random", "ties", "masked", "mass_tie"):
        logits = logits_of(kind, 2, 37)
        for k in (1, 2, 7, 29, 30):
            check_select(f"{kind} k={k}", logits, k, 30)
    for k in (1, 400, 600):
        check_select(f"k={k}", logits_of("ties", 1, 607), k, 600)
    check_select("one column", logits_of("random", 2, 1), 1, 1)
    check_select("one true column", logits_of("random", 2, 9), 1, 1)
    for k in (0, 31):
        try:
            passes.select(logits_of("random", 2, 37), k, num_valid=30, temperature=1.0)
        except ValueError:
            continue
        raise AssertionError(f"k = {k} was taken")


def select_temperatures() -> None:
    for temperature in (0.5, 0.7, 1.3):
        logits = logits_of("random", 2, 4500)
        check_select(f"temperature {temperature}", logits, 50, 4400, temperature)
        exact = logits[:, :4400].double() / temperature
        assert ((score64(logits, 4400, temperature) - exact).abs() <= 1.5 * 2**-23 * exact.abs()).all()
        check_select(
            f"temperature {temperature} bfloat16",
            logits_of("ties", 2, 4500, torch.bfloat16),
            50,
            4400,
            temperature,
        )


def select_nan() -> None:
    """No hang, no id outside the row, and every row with a NaN shows it."""
    for number in (1, 3, 60, 400, 5000):
        logits = logits_of("random", 2, 5003)
        logits[:, torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:number]] = NAN
        values, ids, rest = passes.select(logits, 50, num_valid=5000, temperature=1.0)
        assert ((ids >= 0) & (ids < 5000)).all() and (ids.sort(-1).values.diff() > 0).all()
        assert (values.isnan().any(-1) | rest.sum_T.isnan()).all()
    logits = logits_of("random", 1, 5003)
    logits[0, 77] = INF
    values, ids, _ = passes.select(logits, 50, num_valid=5000, temperature=1.0)
    assert values[0, 0] == INF and ids[0, 0] == 77


def ids_for(rows: int, num_ids: int, num_valid: int, seed: int = 0) -> Tensor:
    """Distinct local columns in any order, about a third of the places -1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, num_ids), -1, dtype=torch.int32)
    for row in ids:
        here = torch.rand(num_ids, generator=g) < 0.67
        some = torch.randperm(num_valid, generator=g)[: int(here.sum())].to(torch.int32)
        row[here.nonzero()[: len(some), 0]] = some
    return ids


def chosen_mask(ids: Tensor, num_valid: int) -> Tensor:
    return torch.zeros(ids.shape[0], num_valid + 1, dtype=torch.bool).scatter_(
        1, torch.where(ids < 0, num_valid, ids).long(), True
    )[:, :-1]


def gather() -> None:
    for dtype in DTYPES:
        for kind in KINDS:
            for num_valid, num_ids, temperature in ((5000, 100, 1.0), (30, 40, 0.7), (17, 0, 1.3)):
                # 5: programs take a second row, whose marks must not be the first's
                rows = 2 if num_valid == 5000 else 5
                logits, ids = logits_of(kind, rows, num_valid + 3, dtype), ids_for(rows, num_ids, num_valid)
                name = f"{kind} {dtype} {num_valid} {num_ids}"
                values, rest = passes.gather(logits, ids, num_valid=num_valid, temperature=temperature)
                score = score64(logits, num_valid, temperature)
                want = torch.where(ids >= 0, score.gather(1, ids.clamp(min=0).long()), 0.0)
                assert torch.equal(values.double(), want), name
                check_rest(name, rest, rest64(score, chosen_mask(ids, num_valid)))
                if temperature == 1.0:
                    other_values, other_rest = kernels_torch.gather(
                        logits, ids, num_valid=num_valid, temperature=1.0
                    )
                    assert torch.equal(other_values, values) and torch.equal(other_rest.max_T, rest.max_T), (
                        name
                    )
                    close(name, rest.sum_T, other_rest.sum_T, 4e-6)
    wide = logits_of("random", 1, 13001)
    check_rest(
        "several tiles",
        passes.gather(wide, ids_for(1, 300, 13000), num_valid=13000, temperature=1.0)[1],
        rest64(score64(wide, 13000, 1.0), chosen_mask(ids_for(1, 300, 13000), 13000)),
    )
    values, rest = passes.gather(
        logits_of("random", 3, 64), torch.full((3, 4), -1, dtype=torch.int32), num_valid=0, temperature=1.0
    )
    assert (
        (values == 0).all()
        and (rest.max_T == -INF).all()
        and (rest.sum_T == 0).all()
        and (rest.moment_T == 0).all()
    )
    logits = logits_of("random", 2, 64)
    logits[:, 9] = NAN
    assert (
        passes.gather(logits, torch.zeros(2, 0, dtype=torch.int32), num_valid=60, temperature=1.0)[1]
        .sum_T.isnan()
        .all()
    )
    every = torch.arange(60, dtype=torch.int32).expand(2, 60)
    rest = passes.gather(logits_of("random", 2, 64), every, num_valid=60, temperature=1.0)[1]
    assert (rest.max_T == -INF).all() and (rest.sum_T == 0).all()


def check_written(name: str, got: Tensor, want: Tensor, num_valid: int, rtol: float, atol: float) -> None:
    """The interpreter truncates what it stores in bfloat16: one ulp is allowed there."""
    assert (got[:, num_valid:] == 0).all(), f"{name}: padding"
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(got.dtype, 0.0)
    error, bound = (got[:, :num_valid].double() - want).abs(), want.abs() * (rtol + ulp) + atol
    assert (error <= bound).all(), f"{name}: {(error - bound).max()}"


def gradient() -> None:
    for dtype, out_dtype in (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
    ):
        for kind in KINDS:
            for num_valid, num_ids, temperature in ((5000, 60, 1.0), (30, 40, 0.7), (17, 0, 1.3)):
                logits, ids = logits_of(kind, 3, num_valid + 3, dtype), ids_for(3, num_ids, num_valid)
                name = f"{kind} {dtype} {out_dtype} {num_valid}"
                score, chosen = score64(logits, num_valid, temperature), torch.randn(3, num_ids)
                top = rest64(score, chosen_mask(ids, num_valid))[0]
                ref = torch.where(top == -INF, 0.0, top).float()
                scale = torch.tensor([0.3, -2.0, 0.0])
                want = scale.double()[:, None] * (score - ref.double()[:, None]).clamp(max=0).exp()
                want = torch.cat([want, want[:, :1]], 1).scatter(
                    1, torch.where(ids < 0, num_valid, ids).long(), chosen.double()
                )[:, :-1]
                out = (
                    None
                    if out_dtype is None
                    else torch.full((3, num_valid + 11), NAN, dtype=out_dtype)[:, : num_valid + 3]
                )
                kept = logits.clone()
                passes.gradient_(
                    logits, ids, chosen, scale, ref, num_valid=num_valid, temperature=temperature, out=out
                )
                got = logits if out is None else out
                check_written(name, got, want, num_valid, 3e-6, 1e-30 if dtype != torch.float16 else 6e-8)
                assert (got[2, :num_valid][~chosen_mask(ids, num_valid)[2]] == 0).all(), f"{name}: scale 0"
                if out is not None:
                    assert torch.equal(logits, kept), f"{name}: the logits changed"
    logits = logits_of("random", 2, 40)
    nothing = torch.full((2, 3), -1, dtype=torch.int32)
    passes.gradient_(
        logits, nothing, torch.ones(2, 3), torch.ones(2), torch.zeros(2), num_valid=0, temperature=1.0
    )
    assert (logits == 0).all()


def terms64(a: Tensor, b: Tensor, beta: float, clip: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(phi, w, near the clip) from the plain definitions in float64: sums of logarithms, no rearrangement."""
    p, q = a.exp(), b.exp()
    zero = torch.zeros_like(p)

    def xlog(mass: Tensor, log_ratio: Tensor) -> Tensor:
        return torch.where(mass > 0, mass * log_ratio, zero)

    if 0 < beta < 1:
        log_m = torch.logaddexp(b + math.log(beta), a + math.log1p(-beta))
        phi = beta * xlog(q, b - log_m) + (1 - beta) * xlog(p, a - log_m)
        w = (1 - beta) * xlog(p, a - log_m)
    elif beta == 0:
        phi = xlog(q, b - a)
        phi, w = (phi, -q) if clip is not None else (phi + p - q, p - q)
    else:
        phi = xlog(p, a - b)
        phi, w = (phi, phi + p) if clip is not None else (phi + q - p, phi)
    if clip is None:
        return phi, w, torch.zeros_like(phi, dtype=torch.bool)
    # on which side of the clip a summand falls is a matter of rounding
    near = (phi - clip).abs() < 1e-5 * clip + 1e-7
    return phi.clamp(max=clip), torch.where(phi > clip, zero, w), near


def full() -> None:
    options = [(beta, clip) for beta in (0.0, 0.3, 0.5, 0.9, 1.0) for clip in (None, 2e-3)]
    for dtype in DTYPES:
        kinds = (
            ("random", 1.0),
            ("masked", 0.3),
            ("random", 1e-3),
            ("all_equal", 0.5),
            ("huge", 0.5),
            ("one_hot", 0.0),
        )
        for kind, noise in kinds if dtype == torch.float32 else kinds[:2]:
            num_valid, temperature, teacher_temperature = (
                2300,
                1.3 if noise == 1.0 else 1.0,
                0.7 if noise == 1.0 else 1.0,
            )
            student = logits_of("random" if kind == "one_hot" else kind, 3, num_valid + 5, dtype)
            teacher = logits_of("random", 3, num_valid + 9, dtype, seed=1)[:, : num_valid + 5]
            if kind == "one_hot":
                student.fill_(-INF), teacher.fill_(-INF)
                student[:, 4], teacher[:, 4] = 3.0, 1.0
                teacher[1], teacher[1, 5] = -INF, 2.0
                student[2, 7] = 3.0
            else:
                # -inf stays -inf in both
                teacher.mul_(noise).add_(student)
            if kind == "masked":
                student[-1], teacher[-1] = 0.0, 0.0
                # one side alone
                student[0, 3], teacher[0, 6] = -INF, -INF
            norms, logs = [], []
            for logits, t in ((student, temperature), (teacher, teacher_temperature)):
                score = score64(logits, num_valid, t)
                max_T, logsum_T = score.amax(-1), (score - score.amax(-1, keepdim=True)).exp().sum(-1).log()
                norms.append((max_T.float(), logsum_T.float()))
                logs.append(score - max_T.float().double()[:, None] - logsum_T.float().double()[:, None])
            a, b = logs
            p, q = a.exp(), b.exp()
            for beta, clip in options:
                name = f"{kind} {noise} {dtype} beta={beta} clip={clip}"
                common = {"beta": beta, "clip": clip, "num_valid": num_valid, "temperature": temperature}
                common["teacher_temperature"] = teacher_temperature
                phi, w, near = terms64(a, b, beta, clip)
                plogp = torch.where(p > 0, p * a, torch.zeros_like(p))
                sums = passes.full_sums(student, teacher, *norms, **common)
                for i, (part, column) in enumerate(zip(("phi", "w", "plogp"), (phi, w, plogp), strict=True)):
                    want = column.sum(-1)
                    # The KL whose derivative is infinite is only asked to be so, and for no NaN in w.
                    if part == "w" and (phi.isinf().any() or w.isinf().any()):
                        assert not sums[:, 1].isnan().any(), name
                        continue
                    # A float32 log-probability errs by about 1e-7 of itself: so much of w, and of
                    # phi that times its derivative.
                    slack = (
                        0.0
                        if part == "plogp"
                        else 2e-6
                        if part == "w" or clip is not None
                        else 4e-6 * w.abs().sum(-1)
                    )
                    if part == "w":
                        slack = slack + (p * near).sum(-1) * 3
                    error, bound = (
                        (sums[:, i].double() - want).abs(),
                        1e-5 * column.abs().sum(-1) + slack + 1e-12,
                    )
                    same = (sums[:, i].double() == want) | (error <= bound)
                    assert same.all(), f"{name} {part}: {sums[:, i]} for {want}, off by {error} of {bound}"
                assert not (clip is None and (sums[:, 0] < 0).any()), name
                if beta in (0.3, 1.0) or kind == "one_hot":
                    other = kernels_torch.full_sums(student, teacher, *norms, **common)
                    close(f"{name} torch", sums, other, 2e-4, 2e-6)
                upstream, coefficient = torch.tensor([0.7, -1.5, 0.0]), torch.tensor([0.2, 0.0, -3.0])
                out = (
                    torch.full((3, num_valid + 5), NAN, dtype=torch.bfloat16)
                    if dtype == torch.float32 and beta == 0.5
                    else None
                )
                target = student.clone() if out is None else out
                passes.full_gradient_(
                    target if out is None else student,
                    teacher,
                    *norms,
                    upstream,
                    coefficient,
                    out=out,
                    **common,
                )
                if not w.isinf().any():
                    want = upstream.double()[:, None] * w + coefficient.double()[:, None] * p
                    check_gradient(
                        name,
                        target,
                        want,
                        (p + q) * 1e-5 * (1 + (a - b).abs().nan_to_num(posinf=0, nan=0)),
                        num_valid,
                        near,
                    )
    student = logits_of("random", 2, 40)
    norm = (torch.zeros(2), torch.zeros(2))
    common = {"beta": 0.5, "clip": None, "num_valid": 0, "temperature": 1.0, "teacher_temperature": 1.0}
    assert (passes.full_sums(student, student.clone(), norm, norm, **common) == 0).all()
    passes.full_gradient_(student, student.clone(), norm, norm, torch.ones(2), torch.ones(2), **common)
    assert (student == 0).all()
    student[:, 3] = NAN
    assert (
        passes.full_sums(student, torch.zeros(2, 40), norm, norm, **(common | {"num_valid": 40}))
        .isnan()
        .all()
    )


def check_gradient(name: str, got: Tensor, want: Tensor, slack: Tensor, num_valid: int, near: Tensor) -> None:
    assert (got[:, num_valid:] == 0).all(), f"{name}: padding"
    ulp = 2**-7 if got.dtype == torch.bfloat16 else 0.0
    error = (got[:, :num_valid].double() - want).abs()
    good = error <= want.abs() * (1e-5 + ulp) + 3 * slack + 1e-30
    good |= near
    assert good.all(), f"{name}: {error.max()}"


def no_rows_and_errors() -> None:
    empty, ids = torch.zeros(0, 64), torch.zeros(0, 5, dtype=torch.int32)
    none = torch.zeros(0)
    values, chosen, rest = passes.select(empty, 5, num_valid=60, temperature=1.0)
    assert values.shape == chosen.shape == (0, 5) and rest.max_T.shape == (0,)
    assert passes.gather(empty, ids, num_valid=60, temperature=1.0)[0].shape == (0, 5)
    passes.gradient_(empty, ids, torch.zeros(0, 5), none, none, num_valid=60, temperature=1.0)
    common = {"beta": 0.5, "clip": None, "num_valid": 60, "temperature": 1.0, "teacher_temperature": 1.0}
    assert passes.full_sums(empty, empty, (none, none), (none, none), **common).shape == (0, 3)
    passes.full_gradient_(empty, empty, (none, none), (none, none), none, none, **common)
    for bad in (torch.zeros(2, 64, dtype=torch.float64), torch.zeros(64, 2).t()):
        try:
            passes.select(bad, 5, num_valid=60, temperature=1.0)
        except ValueError:
            continue
        raise AssertionError(f"{bad.dtype}, strides {bad.stride()}: taken")


CASES = (
    expm1_and_log1p,
    select_kinds,
    select_every_k,
    select_temperatures,
    select_nan,
    gather,
    gradient,
    full,
    no_rows_and_errors,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    # numpy on infinities that a where drops
    warnings.simplefilter("ignore", RuntimeWarning)
    for case in CASES:
        began = time.perf_counter()
        case()
        print(f"passed {case.__name__} ({time.perf_counter() - began:.1f} s)", flush=True)
