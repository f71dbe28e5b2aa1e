"""`megasd recipes`: the methods, and their papers."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from megasd.algo.recipes import CATALOGUE
from megasd.commands.parser import SubCommands, start_with


@dataclass(frozen=True)
class Options:
    """The options of `megasd recipes`."""

    # print one JSON object instead of a table
    json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(json=args.json)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd recipes` to the command line."""
    parser = commands.add_parser(
        "recipes", help="list the methods", description="The values of algorithm.recipe, and their papers."
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: name -> paper, about, and every key of the row"
    )
    start_with(parser, lambda args: run(Options.from_args(args)))


def run(options: Options) -> int:
    """Print the recipes; returns 0."""
    if options.json:
        rows = {
            name: {"paper": recipe.paper, "about": recipe.about, "row": asdict(recipe.row)}
            for name, recipe in CATALOGUE.items()
        }
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(table()))
    return 0


def table() -> list[str]:
    """A line for each recipe: its name, its paper, and what it does."""
    names, papers = max(map(len, CATALOGUE)), max(len(recipe.paper) for recipe in CATALOGUE.values())
    return [
        f"{name:<{names + 2}}{recipe.paper:<{papers + 2}}{recipe.about}" for name, recipe in CATALOGUE.items()
    ]
