"""`megasd analyze guidance` against one real SGLang server, and everything it writes against
transformers in float64 on the same weights.

The model is the quickstart's, random, with the ten markers as tokens of their own, so that its
noise holds words of doubt; a response is right when its last lone capital is the row's letter,
which noise now and then is.

Proves: a server given by URL is asked as it stands and sent nothing; the four settings hold the
same questions, read the prompts that they should, and are counted as the paper counts; the KL from
the engine's top log-probs with K the vocabulary is the exact one, with a smaller K never above it;
the KL by transformers is the exact one; an analysis is not overwritten unasked. Does not prove:
CUDA, long responses, that a trained model doubts less when it is shown a solution.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from megasd.algo.recipes import RECIPES
from megasd.cli import main
from megasd.config.load import load_config
from megasd.data.chat import Chat
from megasd.data.rollout_log import load_groups
from megasd.engine.sampler import Sampler
from megasd.evaluation.analysis.divergence import top_k_kl
from megasd.evaluation.analysis.guidance import GUIDED, SETTINGS
from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.engine_for import open_guest_engine
from megasd.types import Group, Verdict
from tools import make_quickstart

pytestmark = pytest.mark.nightly

LETTERS, QUESTIONS, SAMPLES, STAMP = "ABCDEFGH", 16, 8, 7
RULES = [
    "reward.verifier=multiple_choice",
    "rollout.max_prompt_tokens=64",
    "rollout.engine.start_timeout=500",
]
ROOM = "rollout.max_response_tokens=40"
TEMPLATE = "algorithm.teacher.template={prompt}({solution})"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with markers as tokens 102 to 111, rows.jsonl."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("analyze")
    make_quickstart.write_tokenizer(root / "model")
    make_quickstart.write_model(root / "model", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    assert tokenizer.add_tokens(list(MARKERS)) == len(MARKERS)
    tokenizer.save_pretrained(root / "model")
    letters = [LETTERS[i % len(LETTERS)] for i in range(QUESTIONS)]
    rows = [
        {"id": f"q{i}", "prompt": f"{i}?", "answer": a, "solution": f"<think>wait</think>{a}"}
        for i, a in enumerate(letters)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def engine(root: Path):
    """A server started as for a directory; then stamped as a run's weights of step 7 would be."""
    own = [f"model.path={root / 'model'}", f"data.train={root / 'rows.jsonl'}", f"run.dir={root}"]
    config = load_config([], [*own, *RULES, ROOM, "rollout.engine.max_total_tokens=8192"], RECIPES)
    with open_guest_engine(config, chat=Chat(root / "model"), out=root) as engine:
        engine.weights.restamp(STAMP)
        yield engine


@pytest.fixture(scope="module")
def analysis(root: Path, engine: Sampler) -> Path:
    """--out of an analysis by URL, of all questions, with K the vocabulary."""
    assert guidance(root, engine, "out", "--num-samples", str(SAMPLES), "--top-k", "999") == 0
    return root / "out"


def guidance(root: Path, engine: Sampler, out: str, *options: str) -> int:
    where = ["--model", str(root / "model"), "--data", str(root / "rows.jsonl"), "--out", str(root / out)]
    bounds = ["--min-accuracy", "0", "--max-accuracy", "1"]
    return main(
        ["analyze", "guidance", engine.pool.engines[0].url, *where, *bounds, *RULES, ROOM, TEMPLATE, *options]
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def samples_of(out: Path) -> dict[str, list[Group]]:
    return {setting: load_groups(out / f"samples-{setting}.jsonl") for setting in SETTINGS}


def test_the_settings_hold_the_same_questions_and_read_the_right_prompts(root: Path, analysis: Path):
    chat, samples = Chat(root / "model"), samples_of(analysis)
    names = [group.prompt.id for group in samples["none"]]
    assert sorted(names) == sorted(f"q{i}" for i in range(QUESTIONS))
    rights = [
        next((s.text for s in group.samples if s.verdict is Verdict.RIGHT), None) for group in samples["none"]
    ]
    assert any(right is None for right in rights) and any(right is not None for right in rights)
    for setting, groups in samples.items():
        assert [group.prompt.id for group in groups] == names
        # nothing was sent
        assert all(
            len(group.samples) == SAMPLES and s.version == STAMP for group in groups for s in group.samples
        )
        for group, right, solved in zip(groups, rights, samples["solution"], strict=True):
            texts = {"solution": group.prompt.solution, "solution_without_thinking": group.prompt.answer}
            if right is not None:
                # noise thinks in no tags
                texts = {"solution": right, "solution_without_thinking": right.strip()}
            texts["regenerated"] = solved.samples[0].text
            question = group.prompt.messages[0]["content"]
            content = question if setting == "none" else f"{question}({texts[setting]})"
            assert group.samples[0].prompt_ids == chat.encode_prompt(
                [{"role": "user", "content": content}]
            ), setting
    record = json.loads((analysis / "analysis.json").read_text())
    assert (
        record["questions"] == names
        and record["left_out"] == {}
        and record["solutions_of_rows"] == rights.count(None)
    )
    assert record["accuracy"] == {group.prompt.id: group.pass_rate for group in samples["none"]}


def test_figures_are_those_of_the_samples_kept(analysis: Path):
    table = {row["setting"]: row for row in rows_of(analysis / "guidance.csv")}
    marked = {(row["setting"], row["marker"]): row for row in rows_of(analysis / "markers.csv")}
    assert list(table) == list(SETTINGS)
    for setting, groups in samples_of(analysis).items():
        texts = [s.text.lower() for group in groups for s in group.samples]
        counts = {marker: sum(text.count(marker) for text in texts) for marker in MARKERS}
        assert min(counts.values()) > 0
        assert {marker: int(marked[setting, marker]["substrings"]) for marker in MARKERS} == counts
        assert float(table[setting]["epistemic"]) == pytest.approx(sum(counts.values()) / len(texts))
        assert all(
            float(table[setting][marker]) == pytest.approx(counts[marker] / len(texts)) for marker in MARKERS
        )
        samples = [s for group in groups for s in group.samples]
        assert float(table[setting]["score"]) == pytest.approx(sum(s.reward for s in samples) / len(samples))
        assert float(table[setting]["tokens"]) == pytest.approx(
            sum(len(s.response_ids) for s in samples) / len(samples)
        )
    assert all(f"| {setting} |" in (analysis / "summary.md").read_text() for setting in SETTINGS)


@pytest.fixture(scope="module")
def twin(root: Path):
    from transformers import AutoModelForCausalLM

    # the server has the other core
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)


def exact_kl(
    twin, student: list[int], teacher: list[int], response: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        s, t = (
            torch.log_softmax(twin(torch.tensor([p + response])).logits[0, len(p) - 1 : -1], -1)
            for p in (student, teacher)
        )
    return (t.exp() * (t - s)).sum(-1), (s.exp() * (s - t)).sum(-1)


def expected_kl(twin, out: Path) -> dict[tuple[str, str], dict[str, tuple[int, float]]]:
    """(setting, divergence) -> "all", "any" and each marker -> (tokens, mean). Here a marker is one
    token, its id 102 and on.
    """
    samples, found = samples_of(out), {}
    for setting in GUIDED:
        values: dict[str, list[torch.Tensor]] = {"KL(T||S)": [], "KL(S||T)": []}
        ids: list[int] = []
        for unguided, guided in zip(samples["none"], samples[setting], strict=True):
            right = next((s.index for s in unguided.samples if s.verdict is Verdict.RIGHT), None)
            for sample in [s for s in unguided.samples if s.index != right][:1]:
                both = exact_kl(twin, sample.prompt_ids, guided.samples[0].prompt_ids, sample.response_ids)
                for name, value in zip(values, both, strict=True):
                    values[name].append(value)
                ids += sample.response_ids
        tokens = torch.tensor(ids)
        masks = {"all": tokens >= 0, "any": (tokens >= 102) & (tokens < 112)}
        masks |= {marker: tokens == 102 + i for i, marker in enumerate(MARKERS)}
        for name, parts in values.items():
            whole = torch.cat(parts)
            found[setting, name] = {
                m: (int(mask.sum()), whole[mask].mean().item() if mask.any() else None)
                for m, mask in masks.items()
            }
    return found


def check_kl(
    out: Path, expected: dict[tuple[str, str], dict[str, tuple[int, float]]], directions: tuple[str, ...]
) -> None:
    found = {(row["setting"], row["divergence"], row["marker"]): row for row in rows_of(out / "kl.csv")}
    assert {key[1] for key in found} == set(directions)
    for (setting, direction), marks in expected.items():
        for marker, (tokens, value) in marks.items() if direction in directions else ():
            row = found.pop((setting, direction, marker))
            assert int(row["tokens"]) == tokens
            assert (
                (row["kl"] == "")
                if value is None
                else math.isclose(float(row["kl"]), value, rel_tol=1e-3, abs_tol=1e-6)
            ), row
            if value is not None:
                assert float(row["ratio_to_mean"]) == pytest.approx(value / marks["all"][1], rel=2e-3)


def test_kl_from_the_engine_is_exact_when_k_is_the_vocabulary(analysis: Path, twin):
    expected = expected_kl(twin, analysis)
    assert (
        expected["solution", "KL(T||S)"]["any"][0] > 20 and expected["solution", "KL(T||S)"]["all"][1] > 1e-4
    )
    check_kl(analysis, expected, ("KL(T||S)",))
    assert rows_of(analysis / "kl.csv")[0]["support"] == "top 128 of both sides and a bucket (lower bound)"


def test_a_smaller_k_is_never_above_the_exact_kl(analysis: Path, engine: Sampler, twin):
    samples = samples_of(analysis)
    sample, guided = samples["none"][0].samples[0], samples["solution"][0].samples[0].prompt_ids
    exact, _ = exact_kl(twin, sample.prompt_ids, guided, sample.response_ids)
    for k in (1, 10, 60):
        student, teacher = engine.top_logprobs(
            [(sample.prompt_ids, sample.response_ids), (guided, sample.response_ids)], k
        )
        assert all(
            k <= len(at_token) <= k + 1 and own in at_token
            for at_token, own in zip(student, sample.response_ids, strict=True)
        )
        values = [top_k_kl(t, s) for t, s in zip(teacher, student, strict=True)]
        assert all(0 <= value <= bound + 1e-6 for value, bound in zip(values, exact.tolist(), strict=True))


def test_kl_by_transformers_is_exact_in_both_directions(root: Path, engine: Sampler, twin):
    server = engine.pool.engines[0]
    # as of a server that no run has stamped
    engine.pool.call(server.applied.stamp("default"))
    try:
        assert (
            guidance(
                root, engine, "full", "--num-samples", "2", "--num-questions", "3", "--kl", "transformers"
            )
            == 0
        )
    finally:
        engine.pool.call(server.applied.stamp(str(STAMP)))
    groups = samples_of(root / "full")["regenerated"]
    assert len(groups) == 3 and {s.version for group in groups for s in group.samples} == {-1}
    check_kl(root / "full", expected_kl(twin, root / "full"), ("KL(T||S)", "KL(S||T)"))


def test_a_question_that_one_setting_has_no_room_for_is_left_out_of_all_and_named(
    root: Path, engine: Sampler
):
    # a long response, shown again, leaves too little; half of the noise ends before
    room = int(0.62 * engine.max_tokens)
    assert (
        guidance(
            root, engine, "long", "--num-samples", "2", "--kl", "none", f"rollout.max_response_tokens={room}"
        )
        == 0
    )
    record, samples = json.loads((root / "long" / "analysis.json").read_text()), samples_of(root / "long")
    assert record["left_out"] and all(
        f"+ {room} response tokens exceed the engine's" in why for why in record["left_out"].values()
    )
    assert all([group.prompt.id for group in groups] == record["questions"] for groups in samples.values())
    assert sorted([*record["questions"], *record["left_out"]]) == sorted(f"q{i}" for i in range(QUESTIONS))
    assert all(name in (root / "long" / "summary.md").read_text() for name in record["left_out"])
    assert record["kl"] is None and not (root / "long" / "kl.csv").exists()


def test_an_analysis_is_replaced_only_when_asked(
    root: Path, analysis: Path, engine: Sampler, capsys: pytest.CaptureFixture[str]
):
    before = (analysis / "analysis.json").read_bytes()
    assert guidance(root, engine, "out") == 2
    assert (
        "already holds an analysis" in capsys.readouterr().err
        and (analysis / "analysis.json").read_bytes() == before
    )
    impossible = ["--min-accuracy", "0.9999", "--max-accuracy", "0.9999"]
    assert guidance(root, engine, "none", "--num-samples", "1", *impossible) == 2
    assert "none of the 16 questions asked has an accuracy within [0.9999, 0.9999]" in capsys.readouterr().err
