"""evaluate.py, eval_run.py without a model, rollout records and the printed table, on groups small
enough to check by hand.

Proves: every figure on 5 questions x 16 samples with ties, unreadable answers and failed verifiers
equals values computed by hand (the arithmetic stands beside them); the golden values of pass@k and
best@k; intervals where they can be known; what `megasd eval` refuses, and that --recompute gives
the figures again, and other ones under another verifier. Does not prove: sampling
(tests/integration/test_eval.py).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megasd.cli import build_parser, main
from megasd.commands.evaluate import decoding_of
from megasd.config.schema import RewardConfig
from megasd.data.rollout_log import load_groups, rollout_path, save_groups
from megasd.evaluation.estimators import (
    default_ks,
    drawn_best_at_k,
    drawn_maj_at_k,
    draws,
    expected_best_at_k,
    interval,
    maj_at_k,
    majority,
    mean_at_k,
    metrics_with_intervals,
    pass_at_k,
    per_question,
    summarise,
)
from megasd.evaluation.presets import PRESETS
from megasd.trainer.progress import ProgressPrinter, _TerminalScreen, result_table, step_line
from megasd.types import Group, Prompt, Sample, UserError, Verdict


def group(name: str, *answers: tuple[str, Verdict]) -> Group:
    samples = [
        Sample(name, i, [1], [2, 3], [-0.5, -0.25], text, "stop", 4, verdict)
        for i, (text, verdict) in enumerate(answers)
    ]
    return Group(Prompt(name, [{"role": "user", "content": "?"}], "7", "7"), samples)


R, W, T = Verdict.RIGHT, Verdict.WRONG, Verdict.TIMEOUT
GROUPS = [
    group("a", ("7", R), ("8", W), ("7", R), ("9", W)),
    group("b", ("1", W), ("7", R), ("2", W), ("?", T)),
    group("c", ("?", T)),
]


def test_mean_and_majority() -> None:
    # c could not be scored at all
    assert mean_at_k(GROUPS) == pytest.approx((2 / 4 + 1 / 3) / 2)
    # a: 7 wins; b: a tie, the first seen wins and is wrong
    assert maj_at_k(GROUPS, str.strip) == 0.5
    assert summarise(GROUPS, str.strip) == {
        "mean_at_k": mean_at_k(GROUPS),
        "maj_at_k": 0.5,
        "pass_at_k": 1.0,
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


def test_report_on_a_terminal_and_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {
        "reward/pass_rate": 0.25,
        "weight/informative_questions": 3.0,
        "train/divergence": 0.5,
        "seconds/rollout": 1.0,
    }
    assert step_line(metrics) == "pass 25.0% | informative 3 | div 0.5000 | s: rollout 1.00"
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        report = ProgressPrinter(12)
        assert isinstance(report._screen, _TerminalScreen) == terminal
        report.step(0, metrics)
        report.close()
        assert "step  1/12 pass 25.0%" in capsys.readouterr().out
    table = result_table(
        {"mean_at_k": 0.25, "maj_at_k": 0.5}, {"mean_at_k": 0.5, "maj_at_k": 0.45}, 4
    ).splitlines()
    assert table[1].split() == ["mean@4", "25.0%", "50.0%", "+25.0"] and table[2].split() == [
        "maj@4",
        "50.0%",
        "45.0%",
        "-5.0",
    ]


# ---- 5 questions x 16 samples, the right answer is 7 ----

E = Verdict.ERROR


def sixteen(name: str, *runs: tuple[str, int, Verdict]) -> Group:
    """(answer, how many, verdict) in the order they were sampled; "" = no readable answer."""
    samples = [
        (f"\\boxed{{{answer}}}" if answer else "I do not know", verdict)
        for answer, count, verdict in runs
        for _ in range(count)
    ]
    assert len(samples) == 16
    return group(name, *samples)


FIVE = [
    # n 16, c 3. Votes: 8 five times, 9 four, 7 three; the four without an answer do not vote
    sixteen("q1", ("7", 3, R), ("8", 5, W), ("9", 4, W), ("", 4, W)),
    # n 16, c 6. A tie of 7 and 8, six each; 7 was seen first
    sixteen("q2", ("7", 6, R), ("8", 6, W), ("", 4, W)),
    # n 16, c 5. A tie of 8 and 7, five each; 8 was seen first. Six without an answer would outvote both
    sixteen("q3", ("8", 5, W), ("7", 5, R), ("", 6, W)),
    # n 12, c 4: four checks failed, and their answers do not vote: 8 would have 3 + 4
    sixteen("q4", ("8", 2, T), ("7", 4, R), ("8", 3, W), ("5", 3, W), ("8", 2, E), ("", 2, W)),
    # n 3, c 2: thirteen checks failed
    sixteen("q5", ("1", 13, T), ("9", 1, W), ("7", 2, R)),
]


def boxed(text: str) -> str | None:
    return text[7:-1] if text.startswith("\\boxed") else None


@pytest.fixture(scope="module")
def found() -> dict:
    return metrics_with_intervals(FIVE, boxed, ks=[1, 2, 4, 16], num_samples=16, seed=0)


def test_mean_and_exact_majority_by_hand(found):
    values = per_question(FIVE, boxed, [4], 16)
    assert values["mean@16"] == pytest.approx(
        {"q1": 3 / 16, "q2": 6 / 16, "q3": 5 / 16, "q4": 4 / 12, "q5": 2 / 3}
    )
    assert values["maj@16"] == {"q1": 0.0, "q2": 1.0, "q3": 0.0, "q4": 1.0, "q5": 1.0}
    # (3/16 + 6/16 + 5/16 + 4/12 + 2/3) / 5 = (0.875 + 1) / 5
    assert found["mean@16"]["value"] == pytest.approx(0.375, abs=1e-12) and found["mean@16"]["questions"] == 5
    assert found["maj@16"]["value"] == pytest.approx(0.6, abs=1e-12)
    summary = summarise(FIVE, boxed)
    assert summary == pytest.approx(
        {"mean_at_k": 0.375, "maj_at_k": 0.6, "pass_at_k": 1.0, "questions": 5.0, "unscored_samples": 17.0}
    )


def test_unbiased_pass_at_k_by_hand(found):
    values = per_question(FIVE, boxed, [4, 16], 16)
    # 1 - C(n-c, 4) / C(n, 4): 1 - 715/1820, 1 - 210/1820, 1 - 330/1820, 1 - C(8,4)/C(12,4) = 1 -
    # 70/495; q5 has 3 samples
    assert values["pass@4"] == pytest.approx(
        {"q1": 0.607142857, "q2": 0.884615385, "q3": 0.818681319, "q4": 0.858585859}, abs=1e-9
    )
    # (0.607142857 + 0.884615385 + 0.818681319 + 0.858585859) / 4 = 3.169025420 / 4
    assert found["pass@4"]["value"] == pytest.approx(0.792256355, abs=1e-9)
    assert (found["pass@4"]["questions"], found["pass@4"]["left_out"]) == (4, ["q5"])
    # is mean@n
    assert found["pass@1"]["value"] == pytest.approx(0.375, abs=1e-12)
    # 1 - C(n-c, 2) / C(n, 2): 1 - 78/120, 1 - 45/120, 1 - 55/120, 1 - 28/66, 1 - 0/3; the sum .35 +
    # .625 + .541666667 + .575757576 + 1
    assert found["pass@2"]["value"] == pytest.approx(3.092424242 / 5, abs=1e-9)
    assert found["pass@16"]["value"] == 1.0 and found["pass@16"]["left_out"] == ["q4", "q5"]


def test_variants_with_replacement_by_hand(found):
    # 1 - (1 - c/n)^4: 1 - (13/16)^4, 1 - (10/16)^4, 1 - (11/16)^4, 1 - (8/12)^4, 1 - (1/3)^4
    #                = .564193726, .847412109, .776596069, .802469136, .987654321; the sum is 3.978325361
    assert found["best@4/expected"]["value"] == pytest.approx(3.978325361 / 5, abs=1e-9)
    # the draws are 1000 a question: a standard error of sqrt(p (1-p) / 1000 / 5) < .0075 on the
    # mean, and 4 of them
    assert found["best@4/mean"]["value"] == pytest.approx(found["best@4/expected"]["value"], abs=0.03)
    assert (
        found["best@4/mean"]["value"]
        == metrics_with_intervals(FIVE, boxed, ks=[4], num_samples=16, seed=9)["best@4/mean"]["value"]
    )  # fixed draws
    assert "best@1/mean" not in found and found["best@16/mean"]["questions"] == 5
    # maj@2: the first drawn wins whenever two differ, so its expectation is c / n: a tie goes to
    # the first seen in the draw
    assert found["maj@2/mean"]["value"] == pytest.approx(0.375, abs=0.03)
    # in the drawn vote those without an answer have a candidate
    assert drawn_maj_at_k([None, None, "7"], [0.0, 0.0, 1.0], 16) < 0.2
    assert majority([None, None, "7"], [0.0, 0.0, 1.0]) == 1.0 and majority([None, None], [0.0, 0.0]) == 0.0


def test_golden_values():
    assert pass_at_k(16, 3, 4) == pytest.approx(0.607143, abs=5e-7)
    assert expected_best_at_k([1.0] + [0.0] * 15, 4) == pytest.approx(0.227524, abs=5e-7)
    assert pass_at_k(16, 1, 4) == pytest.approx(0.25, abs=5e-7)
    assert (
        expected_best_at_k([1.0] + [0.0] * 15, 16) == pytest.approx(0.644, abs=5e-4)
        and pass_at_k(16, 1, 16) == 1.0
    )
    assert drawn_best_at_k([1.0] + [0.0] * 15, 4) == pytest.approx(0.227524, abs=0.04)
    # graded scores: sorted 0, .5, 1 of n = 3, k = 2: 0 * 1/9 + .5 * 3/9 + 1 * 5/9
    assert expected_best_at_k([1.0, 0.0, 0.5], 2) == pytest.approx(13 / 18)
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 4, 1) == 1.0 and pass_at_k(4, 2, 3) == 1.0
    for n, k in ((3, 4), (3, 0)):
        with pytest.raises(ValueError, match="needs"):
            pass_at_k(n, 1, k)
    assert default_ks(16) == [1, 2, 4, 8, 16] and default_ks(12) == [1, 2, 4, 8, 12] and default_ks(1) == [1]
    assert len(draws(16, 4)) == 1000 and len(draws(16, 4)[0]) == 4


def test_intervals_where_they_can_be_known(found):
    assert (
        interval([0.5] * 7, seed=1) == (0.5, 0.5)
        and interval([], seed=1) == (None, None)
        and interval([0.25], seed=1) == (0.25, 0.25)
    )
    # two questions: a resample's mean is 0, .5 or 1 with chances 1/4, 1/2, 1/4, so both tails of
    # 2.5 % lie outside the middle
    assert interval([0.0, 1.0], seed=3) == (0.0, 1.0)
    # 400 questions, half of them right: 1.96 sqrt(.25 / 400) = .049
    low, high = interval([0.0, 1.0] * 200, seed=3)
    assert low == pytest.approx(0.451, abs=0.008) and high == pytest.approx(0.549, abs=0.008)
    assert interval([0.0, 1.0] * 200, seed=3) == (low, high)
    assert found["pass@16"]["low"] == found["pass@16"]["high"] == 1.0
    assert found["mean@16"]["low"] < 0.375 < found["mean@16"]["high"]


def test_a_question_without_any_score_is_said_not_counted():
    nothing = sixteen("q6", ("7", 16, T))
    with_it = metrics_with_intervals([*FIVE, nothing], boxed, ks=[1], num_samples=16)
    assert with_it["mean@16"]["value"] == pytest.approx(0.375) and with_it["mean@16"]["left_out"] == ["q6"]
    alone = metrics_with_intervals([nothing], boxed, ks=[1], num_samples=16)
    assert alone["maj@16"] == {"value": None, "low": None, "high": None, "questions": 0, "left_out": ["q6"]}
    # programs do not vote
    assert "maj@16" not in metrics_with_intervals(FIVE, None, ks=[1], num_samples=16)


# ---- the command, without a model ----


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """An evaluation as it is kept: FIVE, scored by math."""
    save_groups(tmp_path / "kept" / "samples.jsonl", FIVE)
    settings = {
        "source": "model",
        "verifier": asdict(RewardConfig(verifier="math")),
        "num_samples": 16,
        "seed": 0,
        "decoding": {},
    }
    (tmp_path / "kept" / "eval.json").write_text(json.dumps(settings))
    return tmp_path / "kept"


def test_kept_samples_give_the_figures_again(kept, capsys):
    before = (kept / "samples.jsonl").read_bytes()
    assert main(["eval", "--recompute", str(kept)]) == 0
    out = capsys.readouterr().out
    result = json.loads((kept / "metrics.json").read_text())
    assert (kept / "samples.jsonl").read_bytes() == before
    assert result["metrics"]["mean@16"]["value"] == pytest.approx(0.375) and result["metrics"]["maj@16"][
        "value"
    ] == pytest.approx(0.6)
    assert result["metrics"]["pass@4"]["value"] == pytest.approx(0.792256355, abs=1e-9)
    assert (
        result["verdicts"] == {"right": 20, "wrong": 43, "timeout": 15, "error": 2}
        and result["no_answer"] == 16
    )
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("mean@16")).split()[1] == "37.50%"
    assert any(line.startswith("1 of 5 questions are left out of pass@4, pass@8") for line in lines)
    assert any(line.startswith("2 of 5 questions are left out of pass@16") for line in lines)
    assert "80 samples: 20 right, 43 wrong, 2 error, 15 timeout; 16 without an answer, 0 cut off" in out

    assert main(["eval", "--recompute", str(kept), "--k", "1,3", "--out", str(kept.parent / "other")]) == 0
    other = json.loads((kept.parent / "other" / "metrics.json").read_text())
    assert [name for name in other["metrics"] if name.startswith("pass")] == ["pass@1", "pass@3"]


def test_kept_samples_are_scored_by_another_verifier(kept):
    assert (
        main(
            [
                "eval",
                "--recompute",
                str(kept),
                "--verifier",
                "exact_match",
                "--out",
                str(kept.parent / "exact"),
            ]
        )
        == 0
    )
    result = json.loads((kept.parent / "exact" / "metrics.json").read_text())
    assert result["verdicts"] == {"wrong": 80} and result["metrics"]["mean@16"] == {
        "value": 0.0, "low": 0.0, "high": 0.0, "questions": 5, "left_out": [],
    }  # fmt: skip
    assert result["verifier"]["verifier"] == "exact_match"
    # the first evaluation is as it was
    assert main(["eval", "--recompute", str(kept)]) == 0
    assert json.loads((kept / "metrics.json").read_text())["verdicts"]["right"] == 20


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no SOURCE"),
        (["model"], "--data is missing"),
        (["model", "--data", "x.jsonl", "--verifier", "math", "--out", "o"], "x.jsonl: no such"),
        (["model", "--data", "{data}", "--verifier", "math", "--out", "o"], "model: not found"),
        (["http://localhost:1", "--data", "{data}", "--verifier", "math", "--out", "o"], "give --model DIR"),
        (["model", "--data", "{data}", "--verifier", "maths", "--out", "o"], "invalid choice: 'maths'"),
        (
            ["model", "--data", "{data}", "--verifier", "tool_use", "--out", "o"],
            'row data-0: "answer" is no tool call',
        ),
        (
            ["model", "--data", "{data}", "--verifier", "math", "--out", "o", "--top-p", "1.5"],
            "--top-p within",
        ),
        (
            ["model", "--data", "{data}", "--verifier", "math", "--out", "o", "--preset", "qwen"],
            "invalid choice: 'qwen'",
        ),
        (
            ["model", "--data", "{data}", "--verifier", "math", "--out", "o", "--num-samples", "0"],
            "'0' is no whole number",
        ),
        (["model", "--data", "{data}", "--verifier", "math", "--out", "{kept}"], "holds an evaluation"),
        (["--recompute", "nowhere"], "nowhere/samples.jsonl is missing"),
        (["--recompute", "{kept}", "--k", "4,17"], "must lie between 1 and the 16 samples"),
        (["--recompute", "{kept}", "--k", "four"], "no list of numbers"),
        (["http://localhost:1", "--harness", "lm-eval", "--tasks", "gsm8k"], "--harness reads a directory"),
        (["model", "--harness", "lm-eval"], "give --tasks"),
        (["model", "--bogus"], "unrecognized argument --bogus"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(kept, tmp_path, capsys, arguments, said):
    (tmp_path / "data.jsonl").write_text('{"prompt": "7=", "answer": "7"}\n')
    arguments = [a.format(data=tmp_path / "data.jsonl", kept=kept) for a in arguments]
    try:
        code = main(["eval", *arguments])
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and said in lines[0], lines


def test_a_dry_run_says_what_it_would_do_and_touches_nothing(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "7=", "answer": "7"}\n' * 1)
    url = ["http://127.0.0.1:9", "--model", str(tmp_path), "--data", str(tmp_path / "data.jsonl")]
    options = [
        "--verifier",
        "math",
        "--preset",
        "qwen3-no-think",
        "--top-k",
        "5",
        "--out",
        str(tmp_path / "o"),
        "--dry-run",
    ]
    assert main(["eval", *url, *options]) == 0
    out = capsys.readouterr().out
    assert "1 questions x 16 samples = 16" in out
    # an option wins over its preset
    assert "temperature 0.7, top_p 0.8, top_k 5, max_response_tokens 38912, thinking False" in out
    assert not (tmp_path / "o").exists()


def test_presets_say_where_they_come_from(capsys):
    assert main(["eval", "--list-presets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and preset.source in out for name, preset in PRESETS.items())
    assert all(
        p.temperature >= 0 and 0 < p.top_p <= 1 and (p.top_k == -1 or p.top_k > 0) and len(p.source) > 10
        for p in PRESETS.values()
    )


def test_the_harness_is_named_where_it_is_not_installed(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    command = [
        "eval",
        str(tmp_path),
        "--harness",
        "lm-eval",
        "--tasks",
        "gsm8k,arc",
        "--limit",
        "3",
        "--harness-args",
        "--batch_size 4",
    ]
    assert main([*command, "--dry-run"]) == 0
    assert (
        f"-m lm_eval --model hf --model_args pretrained={tmp_path} --tasks gsm8k,arc"
        in capsys.readouterr().out
    )
    code = (
        "import sys; sys.modules['lm_eval'] = None; from megasd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 2 and "--harness lm-eval: not installed here; pip install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_commands_of_the_documents_parse():
    page = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"
    lines = re.findall(r"^megasd (eval .*)$", page.read_text(), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        args, rest = build_parser().parse_known_args(shlex.split(line))
        assert rest == [] and (args.recompute or decoding_of(args))
