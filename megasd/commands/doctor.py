"""`megasd doctor`: what on this machine would stop a run. A line for each check, with the fix.

    megasd doctor
    # {"checks": [{"name", "status", "detail", "fix"}]}
    megasd doctor run.yaml rollout.engine.port=30000 --json

Statuses: ok; warn, a run works and something is lost; fail, it would not work. Exit code 0 without
a fail, else 1. Takes at most 15 s. Nothing is changed, no value of an environment variable is
shown, and no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megasd.commands.parser import SubCommands, add_items, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.read_config import read_config
from megasd.config.load import split_items
from megasd.config.schema import Config
from megasd.config.validate import validate
from megasd.types import UserError

if TYPE_CHECKING:
    from megasd.cluster.doctor.report import Check, CheckResult


@dataclass(frozen=True)
class Options:
    """The options of `megasd doctor`."""

    # YAML files and key=value; [] = check the machine alone
    items: list[str]
    # print one JSON object instead of lines
    json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(items=args.items, json=args.json)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine",
        description=(
            "Versions and conflicts, GPUs, links, FP8, NCCL, shared memory, ports, disk, SGLang, clock: a"
            " line each, with the fix."
        ),
        epilog="Exit codes: 0 no check failed, 1 some did.",
    )
    add_items(parser)
    parser.add_argument(
        "--json", action="store_true", help='{"checks": [{"name", "status", "detail", "fix"}]}'
    )
    start_with(parser, lambda args: run(Options.from_args(args)), more="items")


def run(options: Options) -> int:
    """Check, print, and return the exit code: 1 when some check failed."""
    quiet_libraries()
    from megasd.cluster.doctor.checks import checks
    from megasd.cluster.doctor.report import Machine, run_checks

    config, files, of_config = check_config(options.items)
    about: dict[str, Check] = {"config": lambda machine: of_config} if options.items else {}
    findings = run_checks(about | checks(), Machine(config=config, files=files))
    if options.json:
        print(json.dumps({"checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(lines(findings)))
    return int(any(finding.status == "fail" for finding in findings))


def check_config(items: list[str]) -> tuple[Config | None, list[str], list[CheckResult]]:
    """Return the config (None when it cannot be read), its YAML files, and what was found.

    A config that cannot run is a finding: the machine is checked all the same.
    """
    from megasd.cluster.doctor.report import fail, ok

    if not items:
        return None, [], []
    files, overrides = split_items(items)
    fix = "megasd train with the same arguments and --dry-run says it again until it is right"
    try:
        config = read_config(items)
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
        # Not as rank 0, which refuses a run.dir that holds a run: the run may be resumed.
        validate(config, rank=1)
    except UserError as error:
        return config, files, [fail("config", str(error), fix)]
    given = f" with {len(overrides)} overrides" if overrides else ""
    return config, files, [ok("config", f"{' '.join(files)}{given}: can run")]


def lines(findings: list[CheckResult]) -> list[str]:
    """The report for a reader: a line for each finding, with its fix."""
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
