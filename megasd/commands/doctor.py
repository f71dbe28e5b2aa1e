"""`megasd doctor`: what of this machine, and of a config if one is given, would stop a run. A line
each, with the fix.

    megasd doctor
    # {"checks": [{"name", "status", "detail", "fix"}]}
    megasd doctor run.yaml rollout.engine.port=30000 --json

Statuses: ok; warn, a run works and something is lost; fail, it would not work. Exit code 0 without
a fail, else 1. Takes at most 15 s. Nothing is changed, no value of an environment variable is
shown, and no GPU is used.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
from collections import Counter
from dataclasses import asdict

from megasd.algo.recipes import RECIPES
from megasd.cluster.doctor.report import Check, CheckResult, Machine, fail, ok, run_checks
from megasd.config.load import load_config
from megasd.config.schema import Config
from megasd.config.validate import validate
from megasd.types import UserError

# Name of a check -> module of this package and its function. Imported one by one, so that a missing
# package costs one line.
CHECKS = {
    "python": ("packages", "check_python"),
    "packages": ("packages", "check_packages"),
    "torch": ("gpus", "check_torch"),
    "gpu": ("gpus", "check_gpus"),
    "links": ("gpus", "check_links"),
    "fp8": ("gpus", "check_fp8"),
    "nccl": ("gpus", "check_nccl"),
    "cpu": ("host", "check_cpu"),
    "memory": ("host", "check_memory"),
    "shared memory": ("host", "check_shared_memory"),
    "limits": ("host", "check_limits"),
    "ports": ("host", "check_ports"),
    "host name": ("host", "check_host_name"),
    "proxy": ("engines", "check_proxy"),
    "disk": ("storage", "check_disk"),
    "sglang": ("engines", "check_sglang"),
    "engines": ("engines", "check_urls"),
    "sandbox": ("host", "check_sandbox"),
    "clock": ("host", "check_clock"),
}


def checks(skip: tuple[str, ...] = ()) -> dict[str, Check]:
    """The checks, to be run."""

    def check(module: str, function: str, machine: Machine) -> CheckResult | list[CheckResult]:
        return getattr(importlib.import_module(f"megasd.cluster.doctor.{module}"), function)(machine)

    return {name: functools.partial(check, *where) for name, where in CHECKS.items() if name not in skip}


def run(args: argparse.Namespace, items: list[str]) -> int:
    """Check, print, and return the exit code: 1 when some check failed."""
    config, files, said = read_config(items)
    about: dict[str, Check] = {"config": lambda machine: said} if items else {}
    findings = run_checks(about | checks(), Machine(config=config, files=files))
    if args.json:
        print(json.dumps({"checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(lines(findings)))
    return int(any(finding.status == "fail" for finding in findings))


def read_config(items: list[str]) -> tuple[Config | None, list[str], list[CheckResult]]:
    """(config or None, its YAML files, what is wrong with it). One that cannot run is a finding;
    the machine is checked all the same.
    """
    if not items:
        return None, [], []
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    files = [item for item in items if item not in overrides]
    fix = "megasd train with the same arguments and --dry-run says it again until it is right"
    try:
        config = load_config(files, overrides, RECIPES)
    except ModuleNotFoundError as error:
        return (
            None,
            files,
            [
                fail(
                    "config",
                    f"cannot be read: {error}",
                    f"pip install {error.name} (make install puts everything in)",
                )
            ],
        )
    except UserError as error:
        return None, files, [fail("config", str(error), fix)]
    try:
        # not rank 0: run.dir may hold the run that is to be resumed
        validate(config, rank=1)
    except UserError as error:
        return config, files, [fail("config", str(error), fix)]
    given = f" with {len(overrides)} overrides" if overrides else ""
    return config, files, [ok("config", f"{' '.join(files)}{given}: can run")]


def lines(findings: list[CheckResult]) -> list[str]:
    """The report for a reader: a line each, a fix below it."""
    width = min(32, max(len(finding.name) for finding in findings))
    colour = {"ok": "32", "warn": "33", "fail": "31"} if sys.stdout.isatty() else {}
    shown = []
    for finding in findings:
        status = f"{finding.status:<4}"
        if colour:
            status = f"\x1b[{colour[finding.status]}m{status}\x1b[0m"
        shown.append(f"{status}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            shown[-1] += f"; fix: {finding.fix}"
    counts = Counter(finding.status for finding in findings)
    return [*shown, f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"]
