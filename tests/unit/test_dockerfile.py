"""The images as text: hadolint, pins, users, secrets. No image is built here: that takes a registry
of base images, and GPUs to run on.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL
    )
}


def tool(name: str) -> str:
    """A tool of the `test` extra."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing: pip install -e '.[test]'"
    return found


@pytest.mark.parametrize(
    "command", [["hadolint", "--failure-threshold", "info", "Dockerfile"], ["shellcheck", "docker/smoke.sh"]]
)
def test_linters(command: list[str]):
    done = subprocess.run([tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_targets():
    assert {"trainer", "engine", "colocated", "cpu", "smoke"} <= set(STAGES)
    assert STAGES["colocated"][0] == "trainer" and "/opt/engine/bin/python" in STAGES["colocated"][1]
    assert "hadolint ignore" not in TEXT


def test_bases_are_pinned_by_tag_and_digest():
    for name in ("CUDA_IMAGE", "PYTHON_IMAGE"):
        (value,) = re.findall(rf"^ARG {name}=(\S+)$", TEXT, re.MULTILINE)
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", value), value


def test_every_image_runs_as_an_ordinary_user():
    for name in ("trainer", "engine", "cpu"):
        users = re.findall(r"^USER (\S+)", STAGES[name][1], re.MULTILINE)
        assert users == ["10001:10001"], name
        assert "org.opencontainers.image.licenses" in STAGES[name][1]
    for name in ("colocated", "smoke"):
        # that of the stage below
        assert "USER" not in STAGES[name][1]


def test_no_secret_reaches_a_layer():
    for line in TEXT.splitlines():
        if re.match(r"(ARG|ENV|COPY|LABEL)\b", line):
            assert not re.search(r"TOKEN|SECRET|PASSW|_KEY|pip\.conf|\.netrc", line, re.IGNORECASE), line
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    # nothing comes in but what is named
    assert "*" in ignored
    copied = {
        path.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE)
        for path in line.split()[:-1]
    }
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    for path in copied - {"--chown=megasd:megasd"}:
        assert (ROOT / path).exists(), path
        assert any(
            path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/") for name in allowed
        ), path


def test_versions_agree_with_pyproject():
    pins = runpy.run_path(str(ROOT / "docker/pins.py"))["pins"]
    assert set(PROJECT["dependencies"]) < set(pins("trainer", PROJECT))
    assert any(pin.startswith("sglang==") for pin in pins("engine", PROJECT))
    # SGLang brings its own
    assert not any(pin.startswith(("torch", "transformers")) for pin in pins("engine", PROJECT))
    (version,) = re.findall(r"^ARG TE_VERSION=(\S+)$", TEXT, re.MULTILINE)
    assert Requirement(PROJECT["optional-dependencies"]["te"][0]).specifier.contains(version)
    for line in re.findall(r"pip install (.*)", TEXT):
        assert "apex" not in line or "git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}" in line
    assert re.search(r"^ARG APEX_COMMIT=[0-9a-f]{40}$", TEXT, re.MULTILINE)


def test_the_readme_of_the_images_names_every_target():
    head = TEXT.split("ARG CUDA_IMAGE")[0]
    assert all(f"--target {name} " in head for name in ("trainer", "engine", "colocated", "cpu", "smoke"))
