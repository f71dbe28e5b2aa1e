"""The readout and the fused loss on 1, 2 and 4 gloo ranks.

Proves: values and gradients equal the unsharded float64 twin to 1e-12 over supports, tails, betas,
k, temperatures, padded columns and masks, at TP = 1, 2 and 4; outputs are bitwise equal on all
ranks, ids do not depend on TP under bfloat16 ties; at most two collectives forward, none backward,
bytes and saved state within their formulas, no tensor as wide as the vocabulary at TP >= 2; fused
equals unfused, main_grad, chunking, shared weights, records, bfloat16 operands. Does not prove:
NCCL, CUDA, speed, or anything of Megatron.
"""

from __future__ import annotations

import pytest

from tests.launch import torchrun

CASES = (
    "every_support",
    "every_divergence",
    "full_support",
    "golden_vectors",
    "ties",
    "masked_and_extreme",
    "no_tokens",
    "bytes_on_the_wire",
    "fused_equals_unfused",
    "fused_rules",
    "fused_bfloat16",
)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_ops(nproc):
    output = torchrun("tests/distributed/ops_cases.py", nproc, timeout=1500)
    for case in CASES:
        assert f"passed {case}" in output
