"""Vocabulary-parallel operations and the global normaliser on 2 and 4 gloo ranks.

Proves: at TP = 2 and 4 values and gradients equal the unsharded float64 twin to 1e-12, outputs are bitwise equal on all ranks, ids do not
depend on TP under bfloat16 ties, collectives are as many as the docstrings say and none runs backward; padded columns, slices without a
true or a possible column, questions split over data-parallel ranks. Does not prove: NCCL, CUDA, speed, or anything of Megatron.
"""

from __future__ import annotations

import pytest

from tests.launch import torchrun

CASES = ["buckets_and_divergence", "full_and_scalars", "ties", "masked_and_extreme", "no_tokens", "global_normalisation"]


@pytest.mark.parametrize("nproc", [2, 4])
def test_ops(nproc):
    output = torchrun("tests/distributed/ops_cases.py", nproc, timeout=240)
    for case in CASES:
        assert f"passed {case}" in output
