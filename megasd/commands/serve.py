"""`megasd serve`: rollout engines on this machine, for a run on others."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megasd.commands.parser import SubCommands, add_items, positive, start_with
from megasd.commands.read_config import read_config


@dataclass(frozen=True)
class Options:
    """The options of `megasd serve`."""

    # YAML files and key=value
    items: list[str]
    # address to bind
    host: str
    # number of engines; None = as many as the GPUs of this machine hold
    engines: int | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(items=args.items, host=args.host, engines=args.engines)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd serve` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="rollout engines on this machine, for a run on others",
        description=(
            "Start as many engines as this machine's GPUs hold, announce them in run.dir/engines for the run"
            " that waits for them (rollout.engine.served), and close them when that run ends."
        ),
    )
    add_items(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to bind; other than loopback needs MEGASD_ENGINE_KEY",
    )
    parser.add_argument(
        "--engines",
        type=positive,
        metavar="N",
        help="engines (default: GPUs here / rollout.engine.tensor_parallel_size)",
    )
    start_with(parser, lambda args: run(Options.from_args(args)), more="items")


def run(options: Options) -> int:
    """Serve until the run ends; 0 then or after a signal, 1 when the run gave no sign of life.

    Raises UserError for a config that cannot be served.
    """
    import asyncio
    from pathlib import Path

    from megasd.config.validate import validate_values
    from megasd.config.validate_parallel import default_world_size
    from megasd.engine.serve import make_engines, serve

    config = read_config(options.items)
    validate_values(config, default_world_size(config))
    engines = make_engines(config, host=options.host, count=options.engines)
    return asyncio.run(serve(engines, Path(config.run.dir) / "engines"))
