"""The reducer of loss/normalise.py on 1, 2, 4 and 8 gloo ranks: one batch, every split of it,
against one process.

Proves: over DP 1, 2, 4, CP 1, 2, microbatches 1, 2, 4 and five ways to deal the samples (questions
split over ranks, a rank that learns nothing, a rank without samples), in every aggregation and with
every normaliser of question weights, by masks of tokens, the loss, the metrics, the normaliser and
the exact sum of the per-token gradients have the same bits as in one process, in float64 and for
float32 losses; the plain sums that gradients go through agree to 1e-12 and 1e-6; nothing
informative gives 0 and finite gradients; one all-reduce for the normalisers and one for the
metrics. Does not prove: Megatron's own reduction (test_golden.py) or equal per-token losses of a
real model in different layouts.
"""

from __future__ import annotations

import pytest

from tests.launch import torchrun

# Ranks -> deals of every layout: 18 settings (aggregation, normaliser, dtype, data, term), 30 on
# one and two ranks, x 3 microbatch counts.
SPLITS = {1: [3], 2: [5, 3], 4: [5, 5], 8: [5]}


# DP 4 x CP 2 is slow on two cores
@pytest.mark.parametrize("nproc", [1, 2, 4, pytest.param(8, marks=pytest.mark.nightly)])
def test_every_split(nproc):
    output = torchrun("tests/distributed/reduce_cases.py", nproc, timeout=1500)
    assert f"passed every_split {(30 if nproc <= 2 else 18) * 3 * sum(SPLITS[nproc])}\n" in output
    assert f"passed nothing_informative {20 * sum(SPLITS[nproc])}\n" in output
    assert f"passed not_finite {len(SPLITS[nproc])}\n" in output
