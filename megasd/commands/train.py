"""`megasd train`: check the config, then join or start ranks, or train in this process.

Everything that can be checked without torch is checked before torch is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megasd.algo.stages import check_stages
from megasd.commands.parser import REFUSED, SubCommands, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.read_config import read_config
from megasd.config.describe import outline
from megasd.config.load import to_yaml
from megasd.config.validate import validate
from megasd.config.validate_parallel import default_world_size
from megasd.preemption import EXIT_PREEMPTED, PREEMPTED_MARKER, PREEMPTION_SIGNALS, PreemptionSignal
from megasd.types import UserError

# exit code after Ctrl-C
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """The options of `megasd train`."""

    # YAML files and key=value
    items: list[str]
    # print the resolved config and the plan, and stop
    dry_run: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(items=args.items, dry_run=args.dry_run)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd train` to the command line."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train. Starts its own ranks, or joins those that torchrun started.",
        epilog=(
            "Every key is in megasd/config/schema.py. Later files and then overrides win; key=null switches"
            " an optional term off."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml|key=value",
        help="YAML files, and overrides such as optimizer.lr=1e-6",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the resolved config and the plan, and stop"
    )
    start_with(parser, lambda args: run(Options.from_args(args)), more="items")


def run(options: Options) -> int:
    """Train, and return the exit code. Raises UserError for what cannot run."""
    config = read_config(options.items)
    joined = _torchrun_world_size()
    world_size = joined or default_world_size(config)
    check_stages(config, world_size)
    validate(config, world_size, rank=int(os.environ.get("RANK", "0")))
    if options.dry_run:
        print(to_yaml(config) + "\n".join(f"# {line}" for line in outline(config, world_size)))
        return 0
    marker = Path(config.run.dir) / PREEMPTED_MARKER
    if joined is None and world_size > 1:
        return _start_ranks(options, world_size, marker)

    stop = PreemptionSignal()
    stop.install()
    quiet_libraries()
    try:
        from megasd import train

        return train.main(config, stop)
    except SystemExit as error:
        # A signal that comes while training starts: nothing is saved, and the run may go on later.
        if error.code == EXIT_PREEMPTED and os.environ.get("RANK", "0") == "0":
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text('{"step": null}\n')
        raise


def _torchrun_world_size() -> int | None:
    """The world size under torchrun, else None.

    A WORLD_SIZE without a RANK was not set by torchrun. UserError for values that are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(
                f"environment: {name}={os.environ[name]!r} is not a number; start with torchrun, or unset it"
            )
    return int(os.environ["WORLD_SIZE"])


def _start_ranks(options: Options, world_size: int, marker: Path) -> int:
    """Run `megasd train` on `world_size` ranks of this machine under torchrun's agent.

    Returns the exit code of the first rank that failed. The agent passes signals on to the ranks
    and gives them ten minutes to save. The file `marker` says that they did save.
    """
    import logging

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _hold_signals_while_ranks_start()
    # Silences the agent in this process: a rank tells of its own failure, and the report of the
    # agent would bury that.
    logging.disable(logging.CRITICAL)
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    agent = ["--standalone", f"--nproc-per-node={world_size}", signals]
    try:
        torchrun.run(torchrun.parse_args([*agent, "-m", "megasd.cli", "train", *options.items]))
    except ChildFailedError as error:
        if any(failure.exitcode == REFUSED for failure in error.failures.values()):
            return REFUSED
        rank, failure = error.get_first_failure()
        print(f"megasd: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        if error.sigval in PREEMPTION_SIGNALS and marker.is_file():
            return EXIT_PREEMPTED
        print("megasd: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _hold_signals_while_ranks_start() -> None:
    """Make a signal wait that meets torch's agent while it starts the ranks.

    The handler of the agent raises wherever the agent is. A rank that the agent was about to note
    would then be left behind, with nobody to end it. So the signal is passed on when the agent has
    noted all ranks.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    start, pass_on = LocalElasticAgent._start_workers, api._terminate_process_handler
    starting: list[bool] = []
    held: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if starting:
            held.append(number)
        else:
            pass_on(number, frame)

    def start_workers(*args: Any) -> dict[int, Any]:
        starting.append(True)
        try:
            ranks = start(*args)
        finally:
            starting.clear()
        if held:
            pass_on(held[0], None)
        return ranks

    # The agent installs the handler by this name, at each start.
    setattr(api, "_terminate_process_handler", on_signal)  # noqa: B010  a private name of torch
    setattr(LocalElasticAgent, "_start_workers", start_workers)  # noqa: B010
