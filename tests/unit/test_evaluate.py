"""mean@k, maj@k, rollout records and the printed table, on groups small enough to check by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasd.data.rollouts import load_groups, rollout_path, save_groups
from megasd.evaluate import maj_at_k, mean_at_k, summarise
from megasd.report import Report, result_table, step_line
from megasd.types import Group, Prompt, Sample, UserError, Verdict


def group(name: str, *answers: tuple[str, Verdict]) -> Group:
    samples = [Sample(name, i, [1], [2, 3], [-0.5, -0.25], text, "stop", 4, verdict) for i, (text, verdict) in enumerate(answers)]
    return Group(Prompt(name, [{"role": "user", "content": "?"}], "7", "7"), samples)


R, W, T = Verdict.RIGHT, Verdict.WRONG, Verdict.TIMEOUT
GROUPS = [group("a", ("7", R), ("8", W), ("7", R), ("9", W)), group("b", ("1", W), ("7", R), ("2", W), ("?", T)), group("c", ("?", T))]


def test_mean_and_majority() -> None:
    assert mean_at_k(GROUPS) == pytest.approx((2 / 4 + 1 / 3) / 2)  # c could not be scored at all
    assert maj_at_k(GROUPS, str.strip) == 0.5  # a: 7 wins; b: a tie, the first seen wins and is wrong
    assert summarise(GROUPS, str.strip) == {
        "mean_at_k": mean_at_k(GROUPS),
        "maj_at_k": 0.5,
        "questions": 3.0,
        "unscored_samples": 2.0,
    }


def test_rollouts_come_back_as_they_were(tmp_path: Path) -> None:
    path = rollout_path(tmp_path, 3)
    save_groups(path, GROUPS)
    assert load_groups(path) == GROUPS and [p.name for p in tmp_path.iterdir()] == ["step-000003.jsonl"]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"step-000003.jsonl:10: not a rollout row"):
        load_groups(path)
    with pytest.raises(UserError, match="no such rollout file"):
        load_groups(tmp_path / "none.jsonl")


def test_report_on_a_terminal_and_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"reward/pass_rate": 0.25, "weight/informative_questions": 3.0, "train/divergence": 0.5, "seconds/rollout": 1.0}
    assert step_line(metrics) == "pass 25.0% | informative 3 | div 0.5000 | s: rollout 1.00"
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        report = Report(12)
        assert (report.progress is not None) == terminal
        report.step(0, metrics)
        report.close()
        assert "step  1/12 pass 25.0%" in capsys.readouterr().out
    table = result_table({"mean_at_k": 0.25, "maj_at_k": 0.5}, {"mean_at_k": 0.5, "maj_at_k": 0.45}, 4).splitlines()
    assert table[1].split() == ["mean@4", "25.0%", "50.0%", "+25.0"] and table[2].split() == ["maj@4", "50.0%", "45.0%", "-5.0"]
