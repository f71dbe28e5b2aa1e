"""`megasd eval` with a real SGLang server on the quickstart model, on the CPU.

Proves: a Megatron checkpoint is converted for the while and served by an engine of its own; through
the command, by URL, that engine's weights stay and it gives every sample of every question, with
figures that equal those of the kept samples; temperature 0 gives the same answers each time;
--recompute needs no model. Does not prove: CUDA, --deterministic (SGLang ignores sampling seeds on
a CPU), presets' numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasd.cli import build_parser, main
from megasd.commands.evaluate import Options
from megasd.commands.model_directory import model_directory
from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.data.chat import Chat
from megasd.data.rollout_log import load_groups
from megasd.engine.sampler import make_sampler
from megasd.evaluation.engine_for import ServedWeights
from megasd.evaluation.sampling import SampleSeeds, open_eval_engine
from tools.make_quickstart import main as make_quickstart

QUESTIONS, SAMPLES = 6, 4


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    make_quickstart([str(folder)])
    return folder


@pytest.fixture(scope="module")
def url(quickstart: Path, tmp_path_factory: pytest.TempPathFactory):
    """The one server of this file, started as `megasd eval CHECKPOINT` starts it on a Megatron checkpoint."""
    checkpoint, out = tmp_path_factory.mktemp("run") / "step-000001", tmp_path_factory.mktemp("server")
    assert main(["convert", str(quickstart / "model"), str(checkpoint)]) == 0
    line = ["eval", str(checkpoint), "--data", "-", "--verifier", "exact_match", "--out", str(out)]
    args = build_parser().parse_args([*line, "--seed", "5", "--max-total-tokens", "4096"])
    chosen = Options.from_args(args)
    with model_directory(str(checkpoint), None) as model:
        assert model != checkpoint and (model / "model.safetensors").is_file()
        with open_eval_engine(chosen.engine, model, Chat(model), chosen.decoding, out) as engine:
            assert (out / "engine.log").is_file()
            yield engine.pool.engines[0].url
    assert not model.exists()


def load_rows(quickstart: Path):
    from megasd.data.prompts import load_prompts

    return load_prompts(quickstart / "eval.jsonl")


def options(quickstart: Path, out: Path, *more: str) -> list[str]:
    common = [
        "--data",
        str(quickstart / "eval.jsonl"),
        "--verifier",
        "exact_match",
        "--limit",
        str(QUESTIONS),
    ]
    return [*common, "--num-samples", str(SAMPLES), "--max-response-tokens", "8", "--out", str(out), *more]


def texts(out: Path) -> list[list[str]]:
    return [[sample.text for sample in group.samples] for group in load_groups(out / "samples.jsonl")]


def test_an_engine_by_url_gives_figures_that_its_samples_give_again(quickstart, url, tmp_path, capsys):
    model = ["--model", str(quickstart / "model")]
    assert main(["eval", url, *model, *options(quickstart, tmp_path / "a", "--seed", "3")]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "metrics.json").read_text())
    groups = load_groups(tmp_path / "a" / "samples.jsonl")
    assert [group.prompt.id for group in groups] == [row.id for row in load_rows(quickstart)[:QUESTIONS]]
    assert all([s.index for s in group.samples] == list(range(SAMPLES)) for group in groups)
    assert all(0 < len(s.response_ids) <= 8 and s.version == 0 for group in groups for s in group.samples)
    right = sum(s.text.strip() == group.prompt.answer for group in groups for s in group.samples)
    assert result["verdicts"].get("right", 0) == right and result["samples"] == QUESTIONS * SAMPLES
    assert result["metrics"]["mean@4"]["value"] == pytest.approx(right / QUESTIONS / SAMPLES)
    assert result["decoding"]["temperature"] == 1.0 and result["seed"] == 3
    assert "mean@4" in said and "95% interval" in said

    assert main(["eval", "--recompute", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"] == result["metrics"]

    # an answer that every sample gives is right under another key: re-scored without the model
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"]["answer"] = groups[0].samples[0].text.strip() or "x"
    (tmp_path / "a" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "--recompute", str(tmp_path / "a"), "--verifier", "exact_match"]) == 0
    again = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert again["verdicts"]["right"] == sum(
        row["text"].strip() == rows[0]["prompt"]["answer"] for row in rows
    )


def test_greedy_answers_are_the_same_each_time(quickstart, url, tmp_path):
    for name in ("a", "b"):
        command = [
            "eval",
            url,
            "--model",
            str(quickstart / "model"),
            "--preset",
            "greedy",
            *options(quickstart, tmp_path / name),
        ]
        assert main(command) == 0
    assert texts(tmp_path / "a") == texts(tmp_path / "b")
    # and those of a question are one
    assert all(len(set(answers)) == 1 for answers in texts(tmp_path / "a"))
    # it holds an evaluation
    assert (
        main(["eval", url, "--model", str(quickstart / "model"), *options(quickstart, tmp_path / "a")]) == 2
    )


def test_every_sample_may_ask_for_a_seed_of_its_own(quickstart, url, tmp_path):
    """SGLang takes the list of parameters on a CPU too, and ignores the seeds."""
    chat, prompts = Chat(quickstart / "model"), load_rows(quickstart)[:3]
    config = RolloutConfig(engine=EngineConfig(urls=[url]))
    seeds: list[int] = []

    of_seed = SampleSeeds(5)

    def params_of(batch_ids, params):
        found = of_seed(batch_ids, params)
        seeds.extend(params["sampling_seed"] for params in found)
        return found

    with make_sampler(
        config, model_path=str(quickstart / "model"), device="cpu", dtype="float32", run_dir=tmp_path, seed=5,
        stop_token_ids=chat.eos_token_ids, vocab_size=chat.vocab_size, make_target=ServedWeights,
        params_of=params_of,
    ) as engine:  # fmt: skip
        ids = [chat.encode_prompt(prompt.messages) for prompt in prompts]
        groups = engine.generate(
            prompts,
            ids,
            chat.decode,
            step=0,
            num_samples=4,
            temperature=1.0,
            top_p=1.0,
            max_response_tokens=4,
        )
    assert [len(group.samples) for group in groups] == [4] * 3
    assert len(seeds) == len(set(seeds)) == 12
