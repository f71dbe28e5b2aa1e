"""Every Triton kernel is compiled ahead of time for Hopper (sm_90), without a GPU, at the shapes of
production.

Proves: the kernels compile for float32 and bfloat16 logits of 151936 columns at TP = 8, 2 and 1 and
k = 100, with no byte of stack, local memory or spills, and with registers within a budget; that
they compile for a true width that no vector load divides (whose masks cost registers: no budget
there) and for one of a single column, which Triton makes a constant. `python -m
tests.unit.ops.test_triton_aot` prints the table. Does not prove: that a kernel runs, is right, or
is fast.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megasd.ops import kernels_triton as passes

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHAPES = {"TP=8": 19072, "TP=2": 76032, "TP=1": 152064}
LOGITS = {"float32": "*fp32", "bfloat16": "*bf16"}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
FULL = [(0.5, None), (0.3, None), (0.0, None), (1.0, None), (0.3, 0.1), (0.0, 0.1), (1.0, 0.1)]

# Registers per thread at most. 80 is what 3 programs of 8 warps on a multiprocessor leave to each:
# the gather pass counts on it.
BUDGET = {"select": 104, "gather": 80, "gradient": 48, "full_sums": 80, "full_gradient": 64}


def kernels(dtype: str) -> list[tuple[str, object, dict]]:
    """(name, kernel, compile-time sizes) of everything the passes launch."""
    sizes = {"gather": passes.gather_sizes(), "full": passes.full_sizes()}
    return [
        ("select", passes._select_kernel, passes.select_sizes(100)),
        ("gather", passes._gather_kernel, sizes["gather"] | {"MARKED": True}),
        ("gather, no ids", passes._gather_kernel, sizes["gather"] | {"MARKED": False}),
        ("gradient", passes._gradient_kernel, passes.gradient_sizes(ITEMSIZE[dtype])),
        *(
            (f"full_sums, {mode}", passes._full_sums_kernel, sizes["full"] | passes.full_modes(*mode))
            for mode in FULL
        ),
        *(
            (f"full_gradient, {mode}", passes._full_gradient_kernel, sizes["full"] | passes.full_modes(*mode))
            for mode in FULL
        ),
    ]


def compile_for_hopper(
    kernel, sizes: dict, dtype: str, num_valid: int, out_dtype: str | None = None
) -> bytes:
    """The cubin, with the types and alignments that a launch on such logits has."""
    options = {"num_warps": sizes["num_warps"]}
    constants = {name: value for name, value in sizes.items() if name != "num_warps"}
    types = {
        "logits_ptr": LOGITS[dtype],
        "student_ptr": LOGITS[dtype],
        "teacher_ptr": LOGITS[dtype],
        "out_ptr": LOGITS[out_dtype or dtype],
    }
    types |= {
        "candidates_ptr": "*i64",
        "list_ptr": "*i32",
        "ids_ptr": "*i32",
        "marks_ptr": "*i32",
        "beta": "fp32",
        "clip": "fp32",
    }
    types |= {"inverse": "fp32", "student_inverse": "fp32", "teacher_inverse": "fp32"}
    names = kernel.arg_names
    if num_valid == 1:
        constants["num_valid"] = 1
    signature = {
        n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32")
        for n in names
    }
    aligned = [
        n
        for n in names
        if n.endswith(("_ptr", "_stride")) or n == "num_columns" or (n == "num_valid" and num_valid % 16 == 0)
    ]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in a cubin; a spill is stack or local memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    assert set(found) == {"REG", "STACK", "SHARED", "LOCAL"}, text
    return found


def rows(folder: Path) -> list[tuple[str, str, str, dict[str, int]]]:
    """(kernel, dtype, shape, usage). Widths are run-time values: the shapes share one binary unless
    alignment tells them apart.
    """
    table = []
    for dtype in LOGITS:
        for shape, num_valid in SHAPES.items():
            for name, kernel, sizes in kernels(dtype):
                table.append(
                    (name, dtype, shape, usage(compile_for_hopper(kernel, sizes, dtype, num_valid), folder))
                )
        for name, kernel, sizes in (kernels(dtype)[i] for i in (0, 1, 3, 4, -1)):
            table.append(
                (name, dtype, "odd", usage(compile_for_hopper(kernel, sizes, dtype, 151937), folder))
            )
            table.append((name, dtype, "one", usage(compile_for_hopper(kernel, sizes, dtype, 1), folder)))
    for name, kernel, sizes in kernels("float32"):
        if "gradient" in name:
            cubin = compile_for_hopper(kernel, sizes, "float32", 19072, out_dtype="bfloat16")
            table.append((name, "float32 -> bfloat16", "TP=8", usage(cubin, folder)))
    return table


# half a minute; the interpreter test runs the same kernels in make test
@pytest.mark.nightly
def test_kernels_compile_for_hopper_without_spills(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    wrong = []
    for name, dtype, shape, used in rows(tmp_path):
        print(
            f"{name:32} {dtype:20} {shape:5} {used['REG']:4} registers, stack {used['STACK']}, local"
            f" {used['LOCAL']}"
        )
        if shape in SHAPES and (used["STACK"] or used["LOCAL"] or used["REG"] > BUDGET[name.split(",")[0]]):
            wrong.append((name, dtype, shape, used))
    assert not wrong, wrong


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, shape, used in rows(Path(folder)):
            print(f"{name:32} {dtype:20} {shape:5} {used}")
