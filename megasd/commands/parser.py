"""What the parsers of all sub-commands share. Imports nothing heavy: `megasd --help` is quick.

A sub-command is one module of this folder with `add_parser(commands)`, which ends in
`start_with(parser, run)`. cli.py parses and calls `args.start(args)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeAlias

REFUSED = 2


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        self.exit(REFUSED, f"megasd: {message}; see {self.prog} --help\n")


# The object on which a sub-command calls add_parser.
SubCommands: TypeAlias = "argparse._SubParsersAction[Parser]"


def start_with(
    parser: Parser, start: Callable[[argparse.Namespace], int], *, more: str | None = None
) -> None:
    """Tell cli.py what to do with the parsed arguments: `start` runs the command; exit code.

    more: the attribute (a list) that also takes positionals which stand behind an option. Without
    it such positionals are refused.
    """
    parser.set_defaults(start=start, more=more)


def add_items(parser: Parser) -> None:
    """The positionals of a command that reads a config: YAML files and key=value."""
    parser.add_argument("items", nargs="*", metavar="CONFIG.yaml|key=value", help="as of train")


def positive(text: str) -> int:
    """argparse's type of counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)
