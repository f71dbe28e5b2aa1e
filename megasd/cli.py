"""The command line: parse, dispatch, exit codes. Each sub-command is a module of commands/.

megasd train CONFIG.yaml... [key=value ...] [--dry-run]
megasd convert SOURCE TARGET [--dtype DTYPE] [--check] ...
megasd recipes [--json]
megasd data check FILE [--against FILE] [--model DIR] [--json] ...
megasd analyze rollouts|guidance|coverage ...
megasd eval SOURCE --data FILE --verifier NAME --out DIR ...
megasd plan CONFIG.yaml... [key=value ...] [--gpus N] [--gpu KIND] [--json]
megasd launch slurm|nemo-run CONFIG.yaml... [key=value ...] [--dry-run]
megasd serve CONFIG.yaml... [key=value ...]
megasd doctor [CONFIG.yaml...] [--json]

Exit codes: 0 done, 1 errors in the data (data check) or a failed check (doctor), 2 refused (one
line on stderr), 85 preempted and saved (run it again with run.resume=auto), 130 interrupted. Any
other code is a crash with its traceback.
"""

from __future__ import annotations

import os
import sys

from megasd import __version__
from megasd.commands import (
    analyze,
    convert,
    data_check,
    doctor,
    evaluate,
    launch,
    plan,
    recipes,
    serve,
    train,
)
from megasd.commands.parser import REFUSED, Parser
from megasd.config.schema import ConfigError
from megasd.types import UserError

# in the order of `megasd --help`
COMMANDS = (train, convert, data_check, analyze, evaluate, plan, launch, serve, doctor, recipes)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="megasd", description="Post-train language models by self-distillation.")
    parser.add_argument("--version", action="version", version=f"megasd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command of `argv` (None: of sys.argv) and return the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    for item in rest:
        if item.startswith("-") or args.more is None:
            parser.error(f"unrecognized argument {item}")
    if args.more is not None:
        # Positionals that stand behind an option.
        getattr(args, args.more).extend(rest)
    try:
        return args.start(args)
    except UserError as error:
        # Every rank of a machine refuses the same config, and one of them says so. Any other error
        # may be one rank's own.
        if not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megasd: {_rank_prefix()}{error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        # The agent of torchrun speaks for the ranks that it started.
        if "RANK" not in os.environ:
            print("megasd: interrupted", file=sys.stderr, flush=True)
        return train.INTERRUPTED


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


if __name__ == "__main__":
    sys.exit(main())
