"""Proves: the speed figures of a step from its metrics, by hand-made numbers. Does not prove a GPU's peak."""

from __future__ import annotations

import pytest

from megasd.cluster.planner.hardware import GPU_KINDS
from megasd.config.schema import ActorConfig
from megasd.trainer import throughput
from megasd.trainer.throughput import DEVICE_NAMES, peak_of, speed

STEP = {
    "train/batch_tokens": 6000.0,
    "train/student_tflops": 300.0,
    "train/teacher_tflops": 100.0,
    "train/recompute_tflops": 100.0,
    "seconds/teach": 1.0,
    "seconds/train": 4.0,
    "seconds/rollout": 7.0,
}


def test_figures() -> None:
    found = speed(STEP, 12.0, 8, 40e12)
    assert found == pytest.approx({
        "speed/tokens_per_second": 500.0, "speed/tokens_per_second_per_gpu": 62.5,
        "speed/model_tflops_per_gpu": 10.0, "speed/mfu": 0.25, "speed/hfu": 0.3125,
    })  # fmt: skip
    assert set(speed(STEP, 12.0, 8, None)) == {name for name in found if "fu" not in name}
    without = {
        name: value for name, value in STEP.items() if "teacher" not in name and "recompute" not in name
    }
    assert speed(without, 12.0, 8, 40e12)["speed/mfu"] == pytest.approx(300 / 5 / 8 / 40)
    assert speed({}, 12.0, 8, 40e12) == {} == speed({"train/student_tflops": 1.0}, 1.0, 1, None)


def test_a_peak_is_known_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(DEVICE_NAMES.values()) <= set(GPU_KINDS)
    for name, want in (
        ("NVIDIA H200", GPU_KINDS["h200-141g"].bf16),
        ("NVIDIA H100 PCIe", None),
        (None, None),
    ):
        monkeypatch.setattr(throughput, "_device_name", lambda name=name: name)
        assert peak_of(ActorConfig()) == want
    monkeypatch.setattr(throughput, "_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_of(ActorConfig(fp8="hybrid")) == GPU_KINDS["h100-80g"].fp8
    assert peak_of(ActorConfig(dtype="float32")) is None
