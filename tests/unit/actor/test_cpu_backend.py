"""The CPU compatibility code notices a changed Megatron, and acts only where there is no CUDA device.

Does not prove that Megatron's numbers are right on a CPU: tests/distributed/test_golden.py does.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import utils

from megasd.actor import cpu_backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")
def test_install_is_idempotent_and_patches_the_device() -> None:
    assert cpu_backend.install_cpu_backend() and cpu_backend.install_cpu_backend()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert utils.get_default_causal_mask(4).device.type == "cpu"


def test_a_missing_literal_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="megatron-core changed"):
        cpu_backend._swap_literals("megatron.core.utils", "divide", {"cuda": "cpu"})


def test_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "_installed", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    with pytest.raises(RuntimeError, match="0.99.0"):
        cpu_backend.install_cpu_backend()
