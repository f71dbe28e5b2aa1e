"""tools/bench_sync.py and tools/push_cost.py: the record that --quick writes, what its headline
takes of the rows, and the costs by hand.

Does not prove any speed, nor that a push succeeds (benchmarks/, tests/integration/test_push.py),
nor any bandwidth of push_cost.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT

# the tools import each other as scripts do
sys.path.insert(0, str(ROOT / "tools"))

import push_cost
from bench_sync import headline, line, main, model_config, parse, ranks_of, write_random
from bench_sync_rank import FLOORS, Floor, change, middle, phases
from push_cost import EFFICIENCY, FIXED, HBM, IB, NVLINK, PCIE, REQUEST, Layout, Received

from megasd.models import registry
from megasd.weights.gather_plan import make_gather_plan
from megasd.weights.hf_files import read_hf_config


def row(transport: str, ratio: float, **more: object) -> dict:
    seconds = {
        "seconds": ratio / 2,
        "spread": [ratio / 2, ratio],
        "bytes": 100,
        "ratio_to_copy_and_write": ratio,
    }
    phase = {
        "phases": dict.fromkeys(("begin", "gather", "send", "commit"), 0.1),
        "floor": dict.fromkeys(FLOORS, 0.2),
    }
    other = {
        "layout": "TP1",
        "engine_tp": 1,
        "bucket_mib": 256,
        "peak_bytes": 5,
        "verified_seconds": 1.0,
        "plans_made": 1,
        "verified": True,
    }
    return {"transport": transport} | seconds | phase | other | more


def test_the_headline_is_each_transports_worst_layout():
    rows = [
        row("disk", 1.0),
        row("disk", 2.0, layout="PP2"),
        row("disk", 9.0, bucket_mib=16),
        row("group", 3.0),
    ]
    assert headline(rows) == [
        {"transport": "disk", "seconds": 1.0, "bytes": 100, "ratio_to_copy_and_write": 2.0, "verified": True},
        {
            "transport": "group",
            "seconds": 1.5,
            "bytes": 100,
            "ratio_to_copy_and_write": 3.0,
            "verified": True,
        },
    ]
    rows += [
        row("disk", 1.0, verified=False, error="gone"),
        {"transport": "colocated", "layout": "TP2", "verified": False, "error": "exit 1"},
    ]
    found = {entry["transport"]: entry for entry in headline(rows)}
    # one bad row is enough
    assert [entry["verified"] for entry in found.values()] == [False, True, False]
    assert found["colocated"]["seconds"] is None and found["disk"]["seconds"] == 1.0
    assert (
        "NO: gone" in line(rows[4]) and "FAILED: exit 1" in line(rows[5]) and line(rows[0]).endswith("1, yes")
    )


def test_records_in_benchmarks_have_the_promised_form():
    for path in (ROOT / "benchmarks").glob("sync_*.json"):
        record = json.loads(path.read_text())
        assert {"transports", "rows", "commit", "machine", "command"} <= set(record), path
        for entry in record["transports"]:
            assert (
                set(entry) == {"transport", "seconds", "bytes", "ratio_to_copy_and_write", "verified"}
                and entry["verified"]
            ), (
                path,
                entry,
            )
        assert all(one["plans_made"] == 1 for one in record["rows"]), path


def test_the_floor_moves_the_models_bytes(tmp_path: Path):
    hf = model_config(64, 2, 128)
    model = write_random(tmp_path / "model", hf)
    assert set(registry.param_table(hf).expected_tensors()) == set(Floor(model, tmp_path, tmp_path).source)
    assert set(Floor(model, tmp_path, tmp_path).seconds()) == set(FLOORS)
    assert (
        not list(tmp_path.glob("floor*"))
        and read_hf_config(model)["dtype" if "dtype" in read_hf_config(model) else "torch_dtype"]
    )


def test_every_weight_changes_each_time():
    class Actor:
        weights = {"a": torch.tensor([1.0, -0.02, 3e-5]).bfloat16()}

        def params(self) -> dict[str, torch.Tensor]:
            return self.weights

    seen = []
    for number in range(9):
        seen.append(Actor.weights["a"].clone())
        change(Actor(), number)
        assert all((Actor.weights["a"] != before).all() for before in seen)
    assert 0.5 < Actor.weights["a"][0] < 2


def test_small_things():
    assert [ranks_of(name) for name in ("TP1", "TP2", "PP2", "TP2xPP2")] == [1, 2, 2, 4]
    assert middle([{"a": 1.0, "b": 1.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0}
    assert phases({"sync/seconds": 3.0, "sync/seconds_send": 1.0, "sync/bytes": 9.0}) == {"send": 1.0}
    assert parse(["--quick"]).bucket_mib == [24] and parse(["--quick", "--layouts", "TP2"]).layouts == ["TP2"]


@pytest.mark.parametrize(
    "wrong", [["--repeats", "0"], ["--hidden", "100"], ["--layers", "3"], ["--transports", "pigeon"]]
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        main(wrong)
    assert refused.value.code == 2 and "error" in capsys.readouterr().err


# ---- push_cost.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "own", "same", "other"),
    [("1x1@8", 8, 0, 0), ("2x1@8", 4, 4, 0), ("4x2@8", 1, 7, 0), ("4x2@16", 1, 3, 4)],
)
def test_bytes_come_from_where_the_layout_puts_them(text: str, own: int, same: int, other: int):
    """In eighths of the model; a data-parallel copy on 16 GPUs puts the second pipeline stage on
    the second node.
    """
    hf = json.loads((push_cost.CONFIGS / "Qwen3-8B.json").read_text())
    plan = make_gather_plan(
        registry.param_table(hf), list(push_cost.holdings(hf, Layout.parse(text))), bucket_bytes=256 << 20
    )
    found = push_cost.received(plan)
    assert plan.nbytes == 2 * 8_190_735_360
    # bytes of weights that are not cut: their first holder sends them
    norms = 2 * 36 * (2 * 4096 + 2 * 128) + 2 * 4096
    # of the vocabulary: shards travel whole
    padding = found.total - plan.nbytes
    assert 0 <= padding <= 2 * (2 * 4096) * 128 * 4
    for share, wanted in zip(
        (found.own, found.same_node, found.other_nodes), (own, same, other), strict=True
    ):
        # embedding and output layer differ from an eighth
        assert abs(share - plan.nbytes * wanted / 8) <= norms + padding + 2e6


def test_a_cost_by_hand():
    """1 GB in 4 buckets: half of it already here, a quarter from this node, a quarter from another;
    engines of TP 2 fill the node.
    """
    bytes_ = Received(500_000_000, 250_000_000, 250_000_000)
    gather = push_cost.gather_seconds(bytes_)
    assert gather == pytest.approx((1e9 / (3.35e12 / 2) + 0.25e9 / 450e9 + 0.25e9 / 50e9) / 0.75)
    assert (HBM, NVLINK, IB, EFFICIENCY) == (3.35e12, 450e9, 50e9, 0.75)
    ipc = push_cost.ipc_seconds(1_000_000_000, engine_tp=2, engines=4)
    # 4 engines read 1 GB each, half a GB of it on rank 0's own GPU
    assert ipc == pytest.approx(3.5e9 / 450e9 / 0.75)
    # nothing leaves the GPU
    assert push_cost.ipc_seconds(1_000_000_000, 1, 1) == pytest.approx(1e9 / (HBM / 2) / EFFICIENCY)
    assert push_cost.push_seconds(gather, ipc, 4) == pytest.approx(FIXED + 4 * REQUEST + ipc + gather / 4)
    write, read = push_cost.disk_seconds(1_000_000_000, 2, 2e9, 5e9)
    assert (write, read) == pytest.approx((1e9 / (0.75 * PCIE) + 0.5, 0.2 + 0.5e9 / (0.75 * PCIE)))


def test_the_table_is_the_readmes():
    """The README shows what the tool prints now."""
    rows = [
        push_cost.row(model, Layout.parse(actor), engine_tp, 512)
        for model, (actors, engine_tp) in push_cost.DEFAULT.items()
        for actor in actors
    ]
    assert push_cost.table(rows) in (ROOT / "benchmarks" / "README.md").read_text()
