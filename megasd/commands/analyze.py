"""`megasd analyze`: the measurements of Kim et al. (arXiv 2603.24472), a sub-command for each.

Tables are CSV and markdown, plots are PNG where matplotlib is installed. Samples are kept, so that
every number can be computed again without the model.
"""

from __future__ import annotations

from megasd.commands import analyze_coverage, analyze_guidance, analyze_rollouts
from megasd.commands.parser import Parser, SubCommands


def add_parser(commands: SubCommands) -> None:
    """Add `megasd analyze rollouts|guidance|coverage` to the command line."""
    parser = commands.add_parser(
        "analyze",
        help="measure length, words of doubt, and what guidance does to them",
        description=(
            "The measurements of Kim et al. (arXiv 2603.24472): why self-distillation sometimes costs"
            " reasoning."
        ),
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    for kind in (analyze_rollouts, analyze_guidance, analyze_coverage):
        kind.add_parser(kinds)
