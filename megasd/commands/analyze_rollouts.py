"""`megasd analyze rollouts`: score, length and epistemic markers of kept rollouts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megasd.commands.parser import SubCommands, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.sigterm import unwind_on_sigterm
from megasd.types import UserError


@dataclass(frozen=True)
class Options:
    """The options of `megasd analyze rollouts`."""

    # run directories, or single rollout files
    sources: list[Path]
    # directory of the tables and plots
    out: Path

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed. UserError for sources that need --out."""
        sources = [Path(source) for source in args.sources]
        if args.out is not None:
            return cls(sources, Path(args.out))
        if len(sources) > 1 or sources[0].is_file():
            raise UserError(
                "--out: give a directory for the tables; only for one run directory it has a default,"
                " RUN_DIR/analysis"
            )
        return cls(sources, sources[0] / "analysis")


def add_parser(commands: SubCommands) -> None:
    """Add `megasd analyze rollouts` to the command line."""
    parser = commands.add_parser(
        "rollouts",
        help="score, length and epistemic markers of kept rollouts",
        description=(
            "Tables (CSV, markdown) and plots (where matplotlib is installed) of what a run sampled, by step"
            " and by verdict."
        ),
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RUN_DIR|FILE.jsonl", help="a run's directory, or single rollout files"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where tables and plots go (default, for one run: RUN_DIR/analysis)"
    )
    start_with(parser, lambda args: run(Options.from_args(args)), more="sources")


def run(options: Options) -> int:
    """Measure the rollouts, write the tables and plots, and return 0. UserError without samples."""
    unwind_on_sigterm()
    quiet_libraries()
    from megasd.evaluation.analysis.output import output_directory
    from megasd.evaluation.analysis.rollouts import read_responses
    from megasd.evaluation.analysis.rollouts_report import write_rollouts

    rows = read_responses(options.sources)
    if not rows:
        raise UserError(f"{options.sources[0]}: its rollout files hold no samples")
    write_rollouts(output_directory(options.out), rows)
    return 0
