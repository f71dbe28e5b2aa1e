"""Proves that metrics.jsonl is strict JSON, flushed line by line, and whole after a crash and a
resume; that TensorBoard gets the same numbers. Does not prove how a metric is reduced over ranks:
values arrive reduced.
"""

from __future__ import annotations

import json

import pytest

from megasd.trainer.metrics import MetricSink, read_metrics


def strict(text: str) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_lines_are_strict_json_and_flushed(tmp_path):
    sink = MetricSink(tmp_path / "new" / "run", tensorboard=False)
    sink.log(0, {"loss/total": 0.5, "count": 3, "flag": True, "lost": float("nan"), "far": float("-inf")})
    # before close: flushed
    (row,) = strict(sink.path.read_text())
    assert row.pop("time") > 1.7e9
    assert row == {"step": 0, "loss/total": 0.5, "count": 3, "flag": 1, "lost": None, "far": None}
    sink.close()
    sink.close()


def test_values_that_float_takes(tmp_path):
    numpy = pytest.importorskip("numpy")
    with MetricSink(tmp_path, tensorboard=False) as sink:
        sink.log(1, {"a": numpy.float32(0.25), "b": numpy.int64(7)})
        with pytest.raises((TypeError, ValueError)):
            sink.log(2, {"a": "high"})
        with pytest.raises(ValueError, match="'step' is reserved"):
            sink.log(2, {"step": 1.0})
    # a refused line leaves nothing behind
    (row,) = read_metrics(sink.path)
    assert (row["a"], row["b"]) == (0.25, 7)


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with MetricSink(tmp_path, tensorboard=False) as sink:
        for step in range(5):
            sink.log(step, {"x": step})
    with sink.path.open("a") as file:
        file.write('{"step": 5, "x"')
    with MetricSink(tmp_path, tensorboard=False, first_step=3) as sink:
        sink.log(3, {"x": 30})
    assert [(row["step"], row["x"]) for row in strict(sink.path.read_text())] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_fresh_run_starts_empty(tmp_path):
    MetricSink(tmp_path, tensorboard=False).log(0, {"x": 1})
    MetricSink(tmp_path, tensorboard=False)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_broken_middle_line_is_not_dropped_silently(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnot json\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON line"):
        MetricSink(tmp_path, tensorboard=False, first_step=1)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with MetricSink(tmp_path, tensorboard=True) as sink:
        sink.log(0, {"loss/total": 0.5})
        sink.log(1, {"loss/total": 0.25})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/total")
    assert [(event.step, event.value) for event in events] == [(0, 0.5), (1, 0.25)]
