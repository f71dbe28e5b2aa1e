"""Proves the shape of the house: a file imports only from lower floors or its own folder, without
cycles; floor 0 and the command line import without torch; nothing refers to a path outside the
repository. Imports inside functions count; strings are not followed.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Lowest first; a package imports from lower floors and from itself alone.
FLOORS = (
    ("types", "preemption"),
    ("rewards",),
    ("config", "ops"),
    ("models", "algo"),
    ("weights", "data"),
    ("batch", "engine"),
    ("loss", "weight_sync", "evaluation", "cluster"),
    ("actor",),
    ("convert", "trainer"),
    ("train",),
    ("commands",),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The command line reads the rows of the recipes, the planner the tables of the models: no torch.
LIGHT = (
    "types",
    "preemption",
    "config.schema",
    "config.load",
    "config.validate",
    "algo.recipes",
    "rewards.reward_pool",
    "models.registry",
    "models.flops",
    "commands.parser",
    "cli",
)
FOREIGN = re.compile(r"(?<![\w./])/work/|\.\./shared|CONTRACTS\.md")


def modules() -> dict[str, Path]:
    """Dotted name below megasd ("algo.context") -> file. Package __init__ files take the package's
    name; the root's is left out.
    """
    found = {}
    for path in (ROOT / "megasd").rglob("*.py"):
        parts = path.relative_to(ROOT / "megasd").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The megasd modules that a file imports anywhere, as their longest known dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.removeprefix("megasd.") for name in names if name.startswith("megasd.")}
    return {next((n for n in (name, name.rpartition(".")[0]) if n in known), "") for name in below} - {""}


def test_imports_go_down():
    known = modules()
    wrong = []
    for name, path in known.items():
        top = name.split(".")[0]
        assert top in FLOOR, f"megasd/{top} stands on no floor; give it one in {Path(__file__).name}"
        for target in imports(path, known):
            other = target.split(".")[0]
            if top != other and FLOOR[other] >= FLOOR[top]:
                wrong.append(f"{name} (floor {FLOOR[top]}) imports {target} (floor {FLOOR[other]})")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_cycles():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_floor_0_and_the_command_line_import_without_torch():
    code = (
        f"import sys, {', '.join(f'megasd.{name}' for name in LIGHT)}; print(*sorted({{n.split('.')[0] for n"
        " in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "megatron", "transformers", "sglang", "tensorboard", "aiohttp", "omegaconf"}
    assert not heavy & set(done.stdout.split())


def test_help_answers_at_once():
    """Aim: 0.5 s. Asserted at 2 s, for a busy machine."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "megasd.cli", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        taken.append(time.perf_counter() - start)
        assert done.returncode == 0 and "train" in done.stdout
    print(f"megasd --help: {min(taken):.2f} s, best of 3")
    assert min(taken) < 2.0


def test_nothing_refers_outside_the_repository():
    suffixes = {".py", ".yaml", ".yml", ".md", ".toml", ".sh", ".txt", ".cfg", ".json", ".slurm", ""}
    found = []
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [
            f
            for f in folders
            if not f.startswith(".")
            and f not in ("runs", "build", "__pycache__")
            and not f.endswith(".egg-info")
        ]
        for path in (Path(directory) / file for file in files):
            if (
                path.suffix in suffixes
                and path != Path(__file__).resolve()
                and path.stat().st_size < 1_000_000
            ):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                found += [
                    f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
                    for i, line in enumerate(lines, 1)
                    if FOREIGN.search(line)
                ]
    assert not found, "\n".join(found)


def public_definitions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """("loss.credit.rlsd", its node) of every public class, function and method of the package."""
    found = []

    def collect(name: str, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if node.name.startswith("_"):
                    continue
                found.append((f"{name}.{node.name}", node))
                if isinstance(node, ast.ClassDef):
                    collect(f"{name}.{node.name}", node.body)

    for name, path in modules().items():
        collect(name, ast.parse(path.read_text(), str(path)).body)
    return found


def test_public_names_have_docstrings():
    found = public_definitions()
    without = [name for name, node in found if ast.get_docstring(node) is None]
    print(f"docstrings: {1 - len(without) / len(found):.1%} of {len(found)} public names")
    assert len(without) <= 0.1 * len(found), "\n".join(without)


def test_public_functions_are_annotated():
    missing = []
    for name, node in public_definitions():
        if isinstance(node, ast.ClassDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
        bare = [one.arg for one in given if one.annotation is None and one.arg not in ("self", "cls")]
        missing += [f"{name}({', '.join(bare)})"] if bare or node.returns is None else []
    assert not missing, "\n".join(missing)


def test_the_root_holds_five_files():
    assert len(list((ROOT / "megasd").glob("*.py"))) <= 5


def test_words():
    """Words of an earlier dialect, which a newcomer stumbles over: CONTRIBUTING.md has the standard ones."""
    pattern = re.compile(r"\b(left half|told to leave|LeftHalf|figures|anew)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "megasd").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
