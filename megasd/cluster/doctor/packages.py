"""Checks of Python and packages: what is installed, what pyproject.toml pins, and what conflicts.

Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megasd
from megasd.cluster.doctor.report import CheckResult, Machine, fail, ok, warn

# Reasons of pins that the version alone does not tell.
REASONS = {
    "antlr4-python3-runtime": r"another one changes math-verify's verdict on \boxed{10\%}",
    "psutil": "Megatron's checkpoints hang without it",
    "leptonai": "a newer one breaks the import of nemo-run",
    "transformer-engine": "the range that megatron-core 0.16.1 asks for",
}
# Extras that a run may use. Their packages are checked if they are installed.
OPTIONAL = ("te", "launch", "eval")
# The name at the start of a requirement.
NAME = re.compile(r"[\w.-]+")
APEX = "git+https://github.com/NVIDIA/apex.git"


def check_python(machine: Machine) -> CheckResult:
    """Check the interpreter's version against Requires-Python."""
    version = platform.python_version()
    wanted = next(iter(_metadata("Requires-Python")), ">=3.11")
    detail = f"{version} at {sys.executable} (asked: {wanted}; tests run on 3.11)"
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return fail(
            "python", detail, "make the environment again with Python 3.11: make PYTHON=python3.11 install"
        )
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    if free_threaded:
        return warn(
            "python",
            f"{detail}, without the GIL, which nobody has tried",
            "use an ordinary build of Python 3.11",
        )
    return ok("python", detail)


def declared(root: Path | None = None) -> tuple[dict[str, Requirement], dict[str, Requirement], bool]:
    """Return (required packages, packages of the OPTIONAL extras, whether metadata is stale).

    Packages are keyed by canonical name. In a checkout they are read from pyproject.toml, because
    an editable installation's metadata does not follow changes; else from that metadata.
    """
    installed = [Requirement(text) for text in _metadata("Requires-Dist")]
    path = (root or Path(megasd.__file__).parents[1]) / "pyproject.toml"
    project = tomllib.loads(path.read_text()).get("project", {}) if path.is_file() else {}
    if project.get("name") != "megasd":
        extras = [
            (extra, requirement)
            for requirement in installed
            for extra in OPTIONAL
            if _wanted(requirement, extra)
        ]
        return _by_name([r for r in installed if _wanted(r)]), _by_name([r for _, r in extras]), False
    required = [Requirement(text) for text in project["dependencies"]]
    optional = [
        Requirement(text) for extra in OPTIONAL for text in project["optional-dependencies"].get(extra, [])
    ]
    stale = {_text(r) for r in installed if r.marker is None} != {
        _text(r) for r in required if r.marker is None
    }
    return _by_name([r for r in required if _wanted(r)]), _by_name(optional), stale


@dataclass(frozen=True)
class Installed:
    """A distribution on the path. name: canonical. requires: requirements of its metadata."""

    name: str
    version: str
    summary: str
    requires: tuple[str, ...]


def scan_packages(machine: Machine) -> list[Installed]:
    """Every distribution on the path, in the order in which Python looks."""
    found = []
    for dist in importlib.metadata.distributions(path=machine.packages or sys.path):
        # A half-removed package has no metadata; importlib_metadata raises, Python returns none.
        try:
            data = dist.metadata
        except FileNotFoundError:
            continue
        if "Name" in data:
            summary = data["Summary"] if "Summary" in data else ""
            requires = tuple(dist.requires or ())
            found.append(Installed(canonicalize_name(data["Name"]), data["Version"], summary, requires))
    return found


def check_packages(machine: Machine) -> list[CheckResult]:
    """Check required packages and installed optional ones against their pins; then conflicts."""
    dists = scan_packages(machine)
    required, optional, stale = declared()
    have: dict[str, list[str]] = {}
    for dist in dists:
        have.setdefault(dist.name, []).append(dist.version)
    found = [_against_pin(name, requirement, have.get(name, [])) for name, requirement in required.items()]
    found += [
        _against_pin(name, requirement, have[name]) for name, requirement in optional.items() if name in have
    ]
    if stale:
        fix = "pip install --no-deps --editable . in the checkout (make install does it)"
        found.append(
            warn("package megasd", "its installed metadata names other requirements than pyproject.toml", fix)
        )
    return found + conflicts(dists, required | optional, machine.environment)


def _against_pin(name: str, requirement: Requirement, versions: list[str]) -> CheckResult:
    line, wanted = f"package {name}", str(requirement.specifier) or "any version"
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    reason = f" ({REASONS[name]})" if name in REASONS else ""
    if not versions:
        return fail(line, f"not installed, asked: {wanted}{reason}", fix)
    if len(set(versions)) > 1:
        both = " and ".join(dict.fromkeys(versions))
        return fail(
            line,
            f"{both} are both on the path; Python takes the first",
            f"pip uninstall {name} until none is left, then {fix}",
        )
    if not requirement.specifier.contains(versions[0], prereleases=True):
        return fail(line, f"{versions[0]} is installed, asked: {wanted}{reason}", fix)
    return ok(line, f"{versions[0]} (asked: {wanted})")


def conflicts(
    dists: list[Installed], watched: dict[str, Requirement], environment: Mapping[str, str]
) -> list[CheckResult]:
    """Find installed packages that require other versions of the `watched` packages.

    Also found are an apex that is not NVIDIA's, and packages that PYTHONPATH hides.
    """
    have: dict[str, str] = {}
    for dist in dists:
        have.setdefault(dist.name, dist.version)
    found = [finding for dist in dists if dist.name == "apex" for finding in [judge_apex(dist)]]
    for dist in dists:
        # SGLang has a check of its own (engines.py).
        if dist.name in ("sglang", "megasd"):
            continue
        for text in dist.requires:
            match = NAME.match(text)
            name = canonicalize_name(match[0]) if match else ""
            if name not in watched or name not in have:
                continue
            requirement = Requirement(text)
            if _wanted(requirement) and not requirement.specifier.contains(have[name], prereleases=True):
                detail = (
                    f"{dist.name} {dist.version} asks for {name}{requirement.specifier}, installed is"
                    f" {have[name]}"
                )
                fix = (
                    f"pip uninstall {dist.name}, or give it an environment of its own; megasd pins"
                    f" {watched[name]}"
                )
                found.append(warn(f"conflict {dist.name}", detail, fix))
    found += _hidden_packages(environment)
    return found or [ok("conflicts", "no installed package asks for other versions of those above")]


def judge_apex(dist: Installed) -> CheckResult:
    """Tell NVIDIA's apex, built from git, from PyPI's apex, a web toolkit of 2013."""
    if "yramid" in dist.summary or dist.version.startswith("0.9"):
        detail = f"{dist.version} is PyPI's Pyramid toolkit, not NVIDIA's apex; Megatron would import it"
        return fail(
            "apex",
            detail,
            f"pip uninstall apex (Megatron does without), or build NVIDIA's: {APEX} (see Dockerfile)",
        )
    if importlib.util.find_spec("amp_C") is None:
        detail = f"NVIDIA's {dist.version} without its CUDA extensions (no module amp_C)"
        return warn(
            "apex",
            detail,
            f"build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 from {APEX} (see Dockerfile), or uninstall it",
        )
    return ok("apex", f"NVIDIA's {dist.version} with its CUDA extensions")


def _hidden_packages(environment: Mapping[str, str]) -> list[CheckResult]:
    """Find directories on PYTHONPATH whose packages hide those of the environment."""
    found = []
    for folder in filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)):
        hidden = [
            name
            for name in ("torch", "transformers", "megatron", "numpy", "sglang")
            if (Path(folder) / name).is_dir()
        ]
        if hidden:
            detail = f"PYTHONPATH has {folder}, whose {', '.join(hidden)} hides the environment's"
            found.append(warn("conflict PYTHONPATH", detail, "unset PYTHONPATH"))
    return found


def _wanted(requirement: Requirement, extra: str = "") -> bool:
    """Whether the requirement holds here; with `extra`, whether it is one of that extra alone."""
    if requirement.marker is None:
        return not extra
    applies = requirement.marker.evaluate({"extra": extra})
    return applies and (not extra or not requirement.marker.evaluate({"extra": ""}))


def _metadata(field: str) -> list[str]:
    """The lines of a field of megasd's own metadata; [] if megasd is not installed."""
    try:
        return importlib.metadata.metadata("megasd").get_all(field) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _by_name(requirements: list[Requirement]) -> dict[str, Requirement]:
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _text(requirement: Requirement) -> str:
    return f"{canonicalize_name(requirement.name)}{requirement.specifier}"
