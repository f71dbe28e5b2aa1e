"""Proves: every recipe has a row, a paper, a file in configs/algo that loads and passes validation,
and stands in `megasd recipes`.

Does not prove what the losses are (tests/distributed/test_methods.py) nor that they run
(tests/integration/test_recipes.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megasd.algo.recipes import CATALOGUE, RECIPES
from megasd.algo.stages import check_stages
from megasd.algo.teacher_context import check_template
from megasd.config.load import load_config
from megasd.config.schema import DEFAULT_TEMPLATE
from megasd.config.validate import validate

ROOT = Path(__file__).resolve().parents[3]
NAMES = list(CATALOGUE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What validation looks at of a model and its rows."""
    directory = tmp_path_factory.mktemp("model")
    sizes = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
    }
    config = {"model_type": "qwen3", "max_position_embeddings": 65536, **sizes}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "rows.jsonl"):
        (directory / name).write_text("{}")
    return directory


def test_rows_papers_and_files_name_the_same_methods() -> None:
    assert list(RECIPES) == NAMES and len(NAMES) >= 29
    assert {path.stem for path in (ROOT / "configs" / "algo").glob("*.yaml")} == set(NAMES)
    assert all(row.recipe == name for name, row in RECIPES.items())
    papers = [recipe.paper for recipe in CATALOGUE.values()]
    assert all(re.fullmatch(r"\d{4}\.\d{5}|-|Thinking Machines 2025", paper) for paper in papers)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_a_recipe_passes_validation(name: str, model: Path, tmp_path: Path) -> None:
    given = [f"model.path={model}", f"data.train={model}/rows.jsonl", f"run.dir={tmp_path}/run"]
    row = RECIPES[name]
    if row.teacher is not None and row.teacher.weights == "separate":
        given.append(f"algorithm.teacher.model_path={model}")
    config = load_config([str(ROOT / "configs" / "algo" / f"{name}.yaml")], given, RECIPES)
    assert config.algorithm.recipe == name
    check_stages(config, 1)
    validate(config, 1)


def test_the_engines_ratio_is_where_a_paper_has_it() -> None:
    """pi_old / mu, cut at 2: SC-SDPO's arms (2605.27765, Tables 3-4) and methods whose own texts
    have such a ratio.
    """
    papers = {name: row for name, row in RECIPES.items() if CATALOGUE[name].paper != "-"}
    assert {name for name, row in papers.items() if row.tis_clip is not None} == {
        "grpo", "sdpo", "sc_sdpo", "sdpo_paced", "srpo", "drift", "sdft", "tml_opd", "uni_opd",
    }  # fmt: skip
    plain = replace(RECIPES["grpo"], recipe="dapo", aggregation="token_mean", tis_clip=None)
    assert (
        replace(RECIPES["dapo"], policy_gradient=replace(RECIPES["dapo"].policy_gradient, dual_clip=None))
        == plain
    )


@pytest.mark.parametrize("name", ["opsd", "egrsd", "cl_egrsd", "atesd", "sdft", "rlsd"])
def test_a_teacher_that_reads_a_row_is_told_what_to_do_with_it(name: str) -> None:
    """Not SDPO's words: what they show is no other sample of the student's."""
    given = ["model.path=m", "data.train=d"]
    template = load_config(
        [str(ROOT / "configs" / "algo" / f"{name}.yaml")], given, RECIPES
    ).algorithm.teacher.template
    check_template(template)
    assert template != DEFAULT_TEMPLATE and template.index("{prompt}") < template.index("{solution}")


def test_the_command_lists_them() -> None:
    run = [sys.executable, "-m", "megasd.cli", "recipes"]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    found = json.loads(subprocess.run([*run, "--json"], capture_output=True, text=True, check=True).stdout)
    assert list(found) == NAMES and set(found["rlsd"]) == {"paper", "about", "row"}
    assert found["rlsd"]["row"]["policy_gradient"]["credit"]["clip"] == 0.2
