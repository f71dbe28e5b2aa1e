"""The command line: parse, check everything that can be checked without torch, then import the loop.

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
line on stderr), 85 told to leave, and saved: run it again with run.resume=auto, 130 interrupted;
anything else is a crash with its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megasd.algo.recipes import ABOUT, RECIPES
from megasd.algo.stages import check_stages
from megasd.commands.parser import REFUSED, Parser, build_parser
from megasd.config.describe import outline
from megasd.config.load import load_config, to_yaml
from megasd.config.schema import ConfigError
from megasd.config.validate import default_world_size, validate
from megasd.evaluation.presets import PRESETS
from megasd.preemption import EXIT_PREEMPTED, PREEMPTED_MARKER, PREEMPTION_SIGNALS, PreemptionSignal
from megasd.types import UserError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unrecognized argument {unknown[0]}")
    # a rank that torchrun started leaves it to the agent to say so
    alone = "RANK" not in os.environ
    try:
        if args.command == "eval":
            return _eval(parser, args, rest)
        if args.command == "convert":
            return _convert(parser, args, rest)
        if args.command == "data":
            return _data(parser, args, rest)
        if args.command == "analyze":
            return _analyze(args, rest)
        if args.command == "recipes":
            return _recipes(parser, args.json, rest)
        if args.command in ("plan", "launch", "serve", "doctor"):
            return _machines(args, rest)
        # `rest`: positionals that follow an option
        return _train(args.items + rest, args.dry_run, argv)
    except UserError as error:
        # Every rank of a machine refuses the same config, and one of them says so; any other error
        # may be one rank's own.
        if not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megasd: {_rank_prefix()}{error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        if alone:
            print("megasd: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def _eval(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if args.list_presets:
        for name, preset in PRESETS.items():
            print(
                f"{name:<16}"
                + ", ".join(f"{key} {value}" for key, value in asdict(preset).items() if key != "source")
            )
            print(f"{'':<16}{preset.source}")
        return 0
    _quiet_libraries()
    from megasd.commands import evaluate

    evaluate.run(args)
    return 0


def _convert(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if args.file_mib < 1:
        parser.error("argument --file-mib: give 1 or more")
    _quiet_libraries()
    from megasd.commands import convert

    convert.run(args)
    return 0


def _data(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    for name in ("max_prompt_tokens", "max_row_bytes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: give 1 or more")
    _quiet_libraries()
    from megasd.commands import data_check

    return data_check.run(args)


def _analyze(args: argparse.Namespace, rest: list[str]) -> int:
    signal.signal(signal.SIGTERM, _stop)
    _quiet_libraries()
    from megasd.commands import analyze

    analyze.run(args, rest)
    return 0


def _machines(args: argparse.Namespace, rest: list[str]) -> int:
    """The commands about machines; each module has run(args, items) -> exit code. items: YAML files
    and overrides.
    """
    # `rest`: positionals that follow an option
    items = args.items + rest
    _quiet_libraries()
    if args.command == "plan":
        from megasd.commands import plan as module
    elif args.command == "launch":
        from megasd.commands import launch as module
    elif args.command == "serve":
        from megasd.commands import serve as module
    else:
        from megasd.commands import doctor as module
    return module.run(args, items)


def _recipes(parser: Parser, as_json: bool, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if as_json:
        rows = {
            name: {"paper": paper, "about": about, "row": asdict(RECIPES[name])}
            for name, (paper, about) in ABOUT.items()
        }
        print(json.dumps(rows, indent=2))
        return 0
    for name, (paper, about) in ABOUT.items():
        print(f"{name:<12}{paper:<24}{about}")
    return 0


def _train(items: list[str], dry_run: bool, argv: list[str]) -> int:
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    config = load_config([item for item in items if item not in overrides], overrides, RECIPES)
    joined = _torchrun_world_size()
    world_size = joined or default_world_size(config)
    check_stages(config, world_size)
    validate(config, world_size, rank=int(os.environ.get("RANK", "0")))
    if dry_run:
        print(to_yaml(config) + "\n".join(f"# {line}" for line in outline(config, world_size)))
        return 0
    if joined is None and world_size > 1:
        return _start_ranks(argv, world_size, Path(config.run.dir) / PREEMPTED_MARKER)

    stop = PreemptionSignal()
    stop.install()
    _quiet_libraries()
    try:
        from megasd import train

        return train.main(config, stop)
    except SystemExit as error:
        # while it started
        if error.code == EXIT_PREEMPTED and os.environ.get("RANK", "0") == "0":
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            (Path(config.run.dir) / PREEMPTED_MARKER).write_text('{"step": null}\n')
        raise


def _torchrun_world_size() -> int | None:
    """The world size under torchrun, else None. A WORLD_SIZE without a RANK comes from somewhere else."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(
                f"environment: {name}={os.environ[name]!r} is not a number; start with torchrun, or unset it"
            )
    return int(os.environ["WORLD_SIZE"])


def _quiet_libraries() -> None:
    """Before the libraries are imported: keep what they say about themselves off the screen.

    Megatron without TransformerEngine and Apex warns in every module that it will use torch
    instead, and torch that Megatron calls old names. Neither is news to the user nor in his hands.
    Our own warnings, and those of libraries not named here, are shown as ever. `python -W` and
    PYTHONWARNINGS, or these variables, bring them back.
    """
    if not sys.warnoptions:
        for library in ("megatron", "torch", "transformers"):
            warnings.filterwarnings("ignore", module=rf"{library}\b")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _start_ranks(argv: list[str], world_size: int, marker: Path) -> int:
    """Run this same command on `world_size` ranks of this machine under torchrun's agent; returns
    the exit code of the first to fail.

    The agent passes signals on to the ranks, and gives them ten minutes to save; `marker` says that
    they did.
    """
    import logging

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _hold_signals_while_ranks_start()
    # of the agent in this process: a rank tells of its own failure, and the agent's report buries
    # it
    logging.disable(logging.CRITICAL)
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    options = ["--standalone", f"--nproc-per-node={world_size}", signals, "-m", "megasd.cli", *argv]
    try:
        run.run(run.parse_args(options))
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
    """A signal that meets torch's agent while it starts the ranks waits until it has them all, and
    is passed on then.

    The agent's handler raises wherever it is, and ranks that it was about to note would be left
    behind without anybody to end them.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    start, tell = LocalElasticAgent._start_workers, api._terminate_process_handler
    starting, told = [], []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if starting:
            told.append(number)
        else:
            tell(number, frame)

    def start_workers(*args: Any) -> dict[int, Any]:
        starting.append(True)
        try:
            ranks = start(*args)
        finally:
            starting.clear()
        if told:
            tell(told[0], None)
        return ranks

    # The agent installs the handler by this name, at each start.
    api._terminate_process_handler = on_signal
    LocalElasticAgent._start_workers = start_workers


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, so that a started engine is closed; torchrun sends it to the ranks
    that outlive a failed one.
    """
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
