"""Proves that docs/metrics.md and the code know the same metrics.

Every metric name that is written out in the code is explained, and every explained name is made
somewhere in the code. Names that are put together at run time (train/<name> of the actor) are
checked on real runs: tests/integration/test_train.py and test_recipes.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megasd.loss.objective import METRIC_WEIGHTS
from megasd.trainer.progress import PHASES, STEP_LINE
from tests.metric_names import documented

PACKAGE = Path(__file__).resolve().parents[3] / "megasd"
GROUPS = ("reward", "rollout", "weight", "teacher", "train", "seconds", "speed", "sync", "eval")
NAME = re.compile(rf"({'|'.join(GROUPS)})/[a-z_]*[a-z]")


def strings() -> tuple[set[str], list[re.Pattern[str]]]:
    """Every string constant of the package, and a pattern for each f-string with a fixed part."""
    constants: set[str] = set()
    patterns: list[re.Pattern[str]] = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.add(node.value)
            elif isinstance(node, ast.keyword) and node.arg:
                constants.add(node.arg)
            elif isinstance(node, ast.JoinedStr):
                fixed = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
                if any(part and re.fullmatch(r"[a-z_/]*_[a-z_/]*", str(part)) for part in fixed):
                    text = "".join("[a-z]+(_[a-z]+)*" if p is None else re.escape(str(p)) for p in fixed)
                    patterns.append(re.compile(text))
    return constants, patterns


def test_every_name_in_the_code_is_explained() -> None:
    constants, _ = strings()
    written = {text for text in constants if NAME.fullmatch(text)}
    written |= {f"train/{name}" for name in METRIC_WEIGHTS} | {f"seconds/{phase}" for phase in PHASES}
    written |= {name for _, name, _ in STEP_LINE}
    assert len(written) > 40
    assert sorted(written - documented()) == []


def test_every_explained_name_is_made_in_the_code() -> None:
    constants, patterns = strings()
    names = {name for name in documented() if NAME.fullmatch(name)}
    assert len(names) > 80

    def is_made(name: str) -> bool:
        rest = name.partition("/")[2]
        return {name, rest} & constants != set() or any(
            p.fullmatch(one) for p in patterns for one in (name, rest)
        )

    assert not {name for name in names if not is_made(name)}
