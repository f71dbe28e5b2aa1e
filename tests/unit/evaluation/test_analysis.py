"""Proves, without an engine: marker counts as the paper's code makes them; which tokens a marker
lies on, whatever the tokenizer cuts; the KL of two distributions against hand values and against
transformers' logits in float64; tables of kept rollouts against hand counts, through the command
line; the choice of questions and what each guidance setting shows; coverage sweeps that `megasd
train --dry-run` takes. Does not prove: sampling, top log-probs of an engine
(tests/integration/test_analyze.py), the look of the plots.
"""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megasd.cli import main
from megasd.config.schema import DEFAULT_TEMPLATE
from megasd.data.prompts import load_prompts
from megasd.data.rollout_log import rollout_path, save_groups
from megasd.evaluation.analysis import guidance, tables
from megasd.evaluation.analysis.coverage import nested, parse_sizes
from megasd.evaluation.analysis.divergence import Tally, top_k_kl
from megasd.evaluation.analysis.markers import (
    MARKERS,
    marker_spans,
    marker_tokens,
    substring_counts,
    token_spans,
    word_counts,
)
from megasd.types import Group, Prompt, Sample, UserError, Verdict
from tests.launch import ROOT
from tests.unit.fake_model import write_inputs


def sample(
    index: int, text: str, verdict: Verdict = Verdict.WRONG, *, tokens: int = 3, finish: str = "stop"
) -> Sample:
    return Sample("q", index, [1], list(range(tokens)), [-0.5] * tokens, text, finish, 0, verdict)


def group(*samples: Sample, name: str = "q", solution: str | None = None) -> Group:
    prompt = Prompt(name, [{"role": "user", "content": "7+8="}], "15", solution)
    for one in samples:
        one.prompt_id = name
    return Group(prompt, list(samples))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- markers -------------------------------------------------------------------------------------


def test_substrings_count_as_the_paper_does_and_words_stand_beside_them():
    text = "Wait, wait. It is UNLIKELY, so let me check; checking... maybe. Hmmm, seemingly it seems."
    substrings, words = substring_counts(text), word_counts(text)
    assert substrings == {m: text.lower().count(m) for m in MARKERS}
    assert (
        substrings["wait"],
        substrings["likely"],
        substrings["check"],
        substrings["hmm"],
        substrings["seems"],
    ) == (2, 1, 2, 1, 1)
    assert (words["wait"], words["likely"], words["check"], words["hmm"], words["seems"], words["maybe"]) == (
        2,
        0,
        1,
        0,
        1,
        1,
    )


def test_a_letter_that_grows_in_lower_case_moves_no_offset():
    text = "İİ Wait"
    assert len(text.lower()) != len(text)
    assert [text[a:b] for a, b in marker_spans(text, "wait")] == ["Wait"]


def test_spans_of_tokens_are_those_of_any_cut_of_the_bytes():
    """A byte-level tokenizer cuts where it likes, inside characters too: the text is whole and
    every character belongs to its tokens.
    """
    random.seed(0)
    text = "Wait… été 数学 🙂🙂 hmm\ufffd, unlikely — maybe"
    data = text.encode()
    for _ in range(200):
        cuts = [0, *sorted(random.sample(range(1, len(data)), random.randrange(1, len(data)))), len(data)]
        pieces = [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        found, spans = token_spans(
            list(range(len(pieces))),
            lambda ids, p=pieces: b"".join(p[i] for i in ids).decode(errors="replace"),
        )
        assert found == text
        for (start, end), a, b in zip(spans, cuts, cuts[1:], strict=False):
            own = (len(data[:a].decode(errors="ignore")), len(data[:b].decode(errors="ignore")))
            assert start <= own[0] and own[1] <= end


def test_a_marker_lies_on_every_token_that_writes_a_part_of_it():
    pieces = ["", " al", "tern", "atively", ",", " un", "likely", " Wa", "it", " so", "<end>"]

    # as sentencepiece does: the first token's space is stripped; <end> is special
    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids if pieces[i] != "<end>").removeprefix(" ")

    found = marker_tokens(list(range(len(pieces))), decode)
    assert {m: places for m, places in found.items() if places} == {
        "alternatively": [1, 2, 3],
        "likely": [6],
        "wait": [7, 8],
    }


# ---- KL ------------------------------------------------------------------------------------------


def test_top_k_kl_by_hand():
    ln = math.log
    # buckets of 1/4 on either side
    assert top_k_kl({1: ln(0.5), 2: ln(0.25)}, {1: ln(0.25), 2: ln(0.5)}) == pytest.approx(0.25 * ln(2))
    # Token 2 is known to the teacher alone: it goes to the bucket, where the student has 3/4 and
    # the teacher 1/2.
    assert top_k_kl({1: ln(0.5), 2: ln(0.25)}, {1: ln(0.25), 3: ln(0.5)}) == pytest.approx(
        0.5 * ln(2) + 0.5 * ln(0.5 / 0.75)
    )
    assert top_k_kl({1: ln(0.5)}, {1: ln(0.5)}) == 0.0
    # the teacher's bucket is empty
    assert top_k_kl({1: 0.0}, {1: ln(0.5)}) == pytest.approx(ln(2))


def test_top_k_kl_never_exceeds_the_whole_and_is_it_when_k_is_the_vocabulary():
    random.seed(1)
    for _ in range(50):
        sides = []
        for _ in range(2):
            weights = [random.expovariate(1) ** 3 + 1e-6 for _ in range(30)]
            sides.append([w / sum(weights) for w in weights])
        t, s = sides
        full = sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))

        def top(side: list[float], k: int) -> dict[int, float]:
            return {i: math.log(side[i]) for i in sorted(range(30), key=lambda i: -side[i])[:k]}

        values = [top_k_kl(top(t, k), top(s, k)) for k in (1, 5, 20, 30)]
        assert all(value <= full + 1e-12 for value in values) and values[-1] == pytest.approx(full, abs=1e-9)


def test_full_kl_is_that_of_the_models_logits_in_both_directions(monkeypatch):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megasd.evaluation.analysis import divergence

    monkeypatch.setattr(divergence, "CHUNK", 3)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, initializer_range=0.3)).float().eval()
    question, guided, response = [3, 4], [[3, 4, 5, 6, 7], [9]], [10, 11, 12, 13, 14, 15, 49]
    found = divergence.full_kl(model, question, guided, response)
    twin = model.double()

    def log_probs(prompt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(
                twin(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1], dim=-1
            )

    s = log_probs(question)
    for prompt, (forward, reverse) in zip(guided, found, strict=True):
        t = log_probs(prompt)
        assert torch.allclose(
            torch.tensor(forward, dtype=torch.float64), (t.exp() * (t - s)).sum(-1), atol=1e-5
        )
        assert torch.allclose(
            torch.tensor(reverse, dtype=torch.float64), (s.exp() * (s - t)).sum(-1), atol=1e-5
        )
        assert len(forward) == len(response) and min(forward) > 1e-3


def test_tally_sets_marker_tokens_against_the_mean():
    tally = Tally()
    # a token of two markers counts once among any
    tally.add([0.5, 0.1, 0.1, 0.1], {"wait": [0], "likely": [0, 1]})
    tally.add([0.0, 0.4], {"wait": [1]})
    rows = {row["marker"]: row for row in tally.rows(setting="solution")}
    assert rows["all"] == {
        "setting": "solution",
        "marker": "all",
        "tokens": 6,
        "kl": pytest.approx(0.2),
        "ratio_to_mean": pytest.approx(1),
    }
    assert (rows["wait"]["tokens"], rows["wait"]["kl"]) == (2, pytest.approx(0.45))
    assert rows["wait"]["ratio_to_mean"] == pytest.approx(2.25)
    assert (rows["any"]["tokens"], rows["any"]["kl"]) == (3, pytest.approx(1 / 3))
    assert (rows["others"]["tokens"], rows["others"]["kl"]) == (3, pytest.approx(0.2 / 3))
    assert (rows["hmm"]["tokens"], rows["hmm"]["kl"], rows["hmm"]["ratio_to_mean"]) == (0, None, None)


# ---- rollouts ------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    steps = [
        [
            group(
                sample(0, "wait, unlikely", Verdict.RIGHT, tokens=10),
                sample(1, "no", tokens=20, finish="length"),
                name="a",
            ),
            group(sample(0, "Check", Verdict.ERROR, tokens=6), name="b"),
        ],
        [group(sample(0, "maybe maybe", tokens=2), sample(1, "15", Verdict.RIGHT, tokens=4), name="a")],
    ]
    for step, groups in zip((0, 10), steps, strict=True):
        save_groups(rollout_path(tmp_path / "run" / "rollouts", step), groups)
    save_groups(tmp_path / "run" / "rollouts" / "eval-step-000010.jsonl", [group(sample(0, "wait"))])
    return tmp_path / "run"


def test_rollout_tables_are_the_hand_counts(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["analyze", "rollouts", str(run_dir)]) == 0
    out = run_dir / "analysis"
    first, second = rows_of(out / "by_step.csv")
    assert (first["step"], first["samples"], first["not_judged"], first["score"]) == ("0", "3", "1", "0.5")
    assert (float(first["tokens"]), first["tokens_right"], first["tokens_wrong"], first["truncated"]) == (
        12.0,
        "10.0",
        "20.0",
        "1",
    )
    assert (float(first["epistemic"]), float(first["epistemic_words"])) == (
        pytest.approx(1.0),
        pytest.approx(2 / 3),
    )
    assert float(first["epistemic_per_1000_tokens"]) == pytest.approx(3000 / 36)
    assert (second["step"], second["score"], float(second["epistemic"])) == ("10", "0.5", 1.0)
    verdicts = {row["verdict"]: row for row in rows_of(out / "by_verdict.csv")}
    # the evaluation's file is none of the run's steps
    assert list(verdicts) == ["all", "right", "wrong", "error"]
    assert (verdicts["wrong"]["samples"], float(verdicts["wrong"]["epistemic"])) == ("2", 1.0)
    marked = {(row["step"], row["verdict"], row["marker"]): row for row in rows_of(out / "markers.csv")}
    assert (marked["0", "right", "likely"]["substrings"], marked["0", "right", "likely"]["words"]) == (
        "1",
        "0",
    )
    assert (
        marked["all", "all", "maybe"]["substrings"],
        float(marked["all", "all", "maybe"]["substrings_per_response"]),
    ) == ("2", 0.4)
    said = capsys.readouterr().out
    assert "5 responses" in said and "| " + str(run_dir) in (out / "summary.md").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == (["by_step.png", "markers.png"] if tables.can_plot() else [])
    assert tables.can_plot() or tables.NO_PLOTS in said


def test_rollouts_of_single_files_and_of_several_runs(run_dir: Path, tmp_path: Path):
    files = [str(run_dir / "rollouts" / name) for name in ("eval-step-000010.jsonl", "step-000000.jsonl")]
    assert main(["analyze", "rollouts", *files, "--out", str(tmp_path / "out")]) == 0
    found = [
        (row["source"], row["step"], row["samples"]) for row in rows_of(tmp_path / "out" / "by_step.csv")
    ]
    assert found == [(files[0], "10", "1"), (files[1], "0", "3")]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["rollouts", "absent"], "absent: no such file or directory"),
        (["rollouts", "."], "holds no step-*.jsonl"),
        (["rollouts", "bad.jsonl"], "--out: give a directory"),
        (["rollouts", "bad.jsonl", "--out", "out"], "bad.jsonl:1: not a rollout row"),
        (["rollouts", "empty.jsonl", "--out", "out"], "empty.jsonl: its rollout files hold no samples"),
        (["rollouts", "bad.jsonl", "--out", "bad.jsonl"], "bad.jsonl"),
        (["rollouts"], "the following arguments are required"),
        (["guidance", "http://127.0.0.1:1", "--data", "d", "--out", "o"], "also give --model DIR"),
        (["guidance", "model", "--data", "d", "--out", "o", "--model", "m"], "--model: goes with a URL"),
        (["guidance", "model", "--data", "d", "--out", "o", "--min-accuracy", ".6"], "--min-accuracy 0.6"),
        (["guidance", "model", "--data", "d", "--out", "o", "--top-k", "0"], "--top-k 0: give 1 or more"),
        (
            ["guidance", "model", "--data", "d", "--out", "o", "rollout.temprature=1"],
            "rollout.temprature: unknown key",
        ),
        (["guidance", "absent", "--data", "d", "--out", "o"], "absent/config.json: no such file"),
        (["coverage", "absent.yaml", "--out", "o"], "absent.yaml: no such file"),
        (["coverage", "run.steps=1", "--out", "o"], "put the key into a file"),
    ],
)
def test_what_cannot_be_analysed_is_refused_in_one_line(args, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("{}\n")
    Path("empty.jsonl").write_text("")
    try:
        code = main(["analyze", *args])
    except SystemExit as exit_:
        code = exit_.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("megasd: ") and expected in lines[0], lines


def test_a_long_table_is_thinned_out_and_says_so():
    text = tables.markdown(
        [{"step": i, "score": None if i else 0.123456} for i in range(1000)], limit=10
    ).splitlines()
    assert (
        text[2] == "| 0 | 0.1235 |"
        and text[11] == "| 999 | - |"
        and text[-1] == "10 of 1000 rows; the CSV holds all of them."
    )


def test_plots_are_png_files(tmp_path: Path):
    pytest.importorskip("matplotlib")
    tables.plot_lines(tmp_path / "lines.png", [("score", {"run": ([0, 1], [0.5, None])})], x_label="step")
    tables.plot_bars(
        tmp_path / "bars.png", [("score", {"a": [0.5, None], "b": [1.0, 0.1]})], ["none", "solution"]
    )
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("lines.png", "bars.png"))


# ---- guidance ------------------------------------------------------------------------------------


def test_questions_are_chosen_by_the_accuracy_of_what_could_be_judged():
    def of(right: int, wrong: int, failed: int = 0) -> Group:
        verdicts = [Verdict.RIGHT] * right + [Verdict.WRONG] * wrong + [Verdict.TIMEOUT] * failed
        return group(*(sample(i, "", verdict) for i, verdict in enumerate(verdicts)))

    groups = [of(0, 8), of(1, 7), of(4, 4), of(5, 3), of(8, 0), of(1, 1, 6), of(0, 0, 8)]
    assert guidance.within(groups, 0.125, 0.5) == [groups[1], groups[2], groups[5]]


def test_each_setting_shows_its_own_text():
    right = "<think>7+8... wait, 15</think>It is 15."
    asked = group(
        sample(0, "14"),
        sample(1, right, Verdict.RIGHT),
        sample(2, "15", Verdict.RIGHT),
        solution="by heart: 15",
    )
    demonstrated = guidance.demonstration(asked)
    assert (demonstrated.text, demonstrated.index) == (right, 1)
    under_solution = group(sample(0, "<think>copy</think>15", Verdict.WRONG), sample(1, "15", Verdict.RIGHT))
    shown = {
        setting: guidance.shown_text(setting, demonstrated, under_solution) for setting in guidance.GUIDED
    }
    assert shown == {
        "solution": right,
        "solution_without_thinking": "It is 15.",
        "regenerated": "<think>copy</think>15",
    }
    messages = guidance.guided_messages(asked, shown["solution"], template=DEFAULT_TEMPLATE)
    assert messages[-1]["content"] == DEFAULT_TEMPLATE.replace("{prompt}", "7+8=").replace(
        "{solution}", right
    )
    with pytest.raises(ValueError):
        guidance.shown_text("none", demonstrated, None)


def test_the_rows_own_solution_stands_in_where_none_was_sampled():
    assert guidance.demonstration(group(sample(0, "14"), solution="by heart: 15")) == guidance.Demonstration(
        "by heart: 15", None
    )
    assert guidance.demonstration(group(sample(0, "14"))) is None
    with pytest.raises(UserError, match="row 'q': nothing is left of its solution"):
        guidance.demonstration(group(sample(0, "14"), solution="<think>15</think>"))


def test_guidance_table_has_the_papers_columns():
    samples = {
        "none": [group(sample(0, "Wait. Unlikely", Verdict.RIGHT, tokens=4), sample(1, "hm", tokens=2))],
        "solution": [group()],
    }
    none, solution = guidance.guidance_table(samples)
    assert (
        none["setting"],
        none["questions"],
        none["samples"],
        none["score"],
        none["tokens"],
        none["epistemic"],
    ) == (
        "none",
        1,
        2,
        0.5,
        3,
        1,
    )
    assert (none["wait"], none["likely"], none["hmm"], none["epistemic_words"]) == (0.5, 0.5, 0, 0.5)
    assert (solution["score"], solution["tokens"], solution["epistemic"], solution["wait"]) == (
        None,
        None,
        None,
        None,
    )


# ---- coverage ------------------------------------------------------------------------------------


def test_subsets_are_nested_and_come_from_the_seed():
    prompts = [Prompt(f"q{i}", [{"role": "user", "content": str(i)}], str(i)) for i in range(20)]
    found = nested(prompts, [1, 8, 20], seed=1, source="rows.jsonl")
    assert [len(subset) for subset in found.values()] == [1, 8, 20]
    assert (
        found[1] == found[8][:1]
        and found[8] == found[20][:8]
        and sorted(p.id for p in found[20]) == sorted(p.id for p in prompts)
    )
    assert (
        found
        == nested(prompts, [1, 8, 20], seed=1, source="rows.jsonl")
        != nested(prompts, [1, 8, 20], seed=2, source="rows.jsonl")
    )
    with pytest.raises(UserError, match="--sizes: 21 is more than the 20 rows of rows.jsonl"):
        nested(prompts, [1, 21], seed=1, source="rows.jsonl")
    assert parse_sizes("64, 1,8") == [1, 8, 64]
    for text in ("", "1,1", "0", "1,-2", "a"):
        with pytest.raises(UserError, match="--sizes"):
            parse_sizes(text)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A config of 16 questions x 4 samples in microbatches of 32 with 4 minibatches, on 30 rows."""
    rows = [
        {
            "id": f"s{i}",
            "prompt": f"{i}+1=",
            "answer": str(i + 1),
            **({"solution": f"it is {i + 1}"} if i % 2 else {}),
        }
        for i in range(30)
    ]
    inputs = dict(item.split("=", 1) for item in write_inputs(tmp_path))
    Path(inputs["data.train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base.yaml").write_text(
        f"model: {{path: {inputs['model.path']}}}\ndata: {{train: {inputs['data.train']}}}\nrun: {{dir:"
        f" {inputs['run.dir']}}}\nalgorithm: {{recipe: grpo, minibatches: 4}}\nrollout: {{num_prompts: 16,"
        " num_samples: 4}\nactor: {micro_batch_size: 32}\n"
    )
    return tmp_path


def test_a_sweeps_files_are_what_train_takes(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(
            [
                "analyze",
                "coverage",
                str(sweep / "base.yaml"),
                "--sizes",
                "2,8,30",
                "--out",
                str(sweep / "cov"),
            ]
        )
        == 0
    )
    commands = capsys.readouterr().out.splitlines()
    assert commands == [
        f"megasd train {sweep}/base.yaml {sweep}/cov/coverage-{size}.yaml" for size in (2, 8, 30)
    ]
    everything = {prompt.id: prompt for prompt in load_prompts(sweep / "train.jsonl")}
    before: list[Prompt] = []
    for size, command in zip((2, 8, 30), commands, strict=True):
        rows = load_prompts(sweep / "cov" / f"coverage-{size}.jsonl")
        assert (
            len(rows) == size
            and rows[: len(before)] == before
            and all(everything[row.id] == row for row in rows)
        )
        before = rows
        assert main([*command.split()[1:], "--dry-run"]) == 0
        plan = capsys.readouterr().out
        asked = min(size, 16)
        assert f"num_prompts: {asked}\n" in plan and f"step         {asked * 4} samples" in plan
        assert f"dir: {sweep}/cov/run-{size}\n" in plan and f"minibatches: {min(4, asked)}\n" in plan
    small = (sweep / "cov" / "coverage-30.yaml").read_text()
    # an overlay holds what its size asks for, no more
    assert "num_prompts" not in small and "micro_batch_size" not in small


def test_a_size_that_the_ranks_cannot_share_is_refused(sweep: Path, capsys: pytest.CaptureFixture[str]):
    (sweep / "ranks.yaml").write_text("run: {num_processes: 8}\n")
    files = [str(sweep / "base.yaml"), str(sweep / "ranks.yaml")]
    assert main(["analyze", "coverage", *files, "--sizes", "1", "--out", str(sweep / "cov")]) == 2
    assert (
        "1 questions make 4 samples a step, which 8 data-parallel ranks cannot share"
        in capsys.readouterr().err
    )


def test_the_command_imports_without_torch():
    code = (
        "import sys, megasd.commands.analyze, megasd.evaluation.analysis.study;"
        " print(*sorted({n.split('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "matplotlib", "sglang"} & set(done.stdout.split())
