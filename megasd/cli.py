"""The command line: parse, check everything that can be checked without torch, then import the loop.

megasd train CONFIG.yaml... [key=value ...] [--dry-run]
megasd convert SOURCE TARGET [--dtype DTYPE] [--check] ...

Exit codes: 0 done, 2 refused (one line on stderr), 130 interrupted; anything else is a crash with its traceback.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

from megasd import __version__
from megasd.algo.recipes import RECIPES
from megasd.config import Config, ConfigError, load_config, samples_per_step, to_yaml
from megasd.types import UserError
from megasd.validate import data_parallel_size, default_world_size, needs_engine, sequence_multiple, validate

REFUSED = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"megasd: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    parser = Parser(prog="megasd", description="Post-train language models by self-distillation.")
    parser.add_argument("--version", action="version", version=f"megasd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train. Starts its own ranks, or joins those that torchrun started.",
        epilog="Every key is in megasd/config.py. Later files and then overrides win; key=null switches an optional term off.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("items", nargs="*", metavar="CONFIG.yaml|key=value", help="YAML files, and overrides such as optimizer.lr=1e-6")
    train.add_argument("--dry-run", action="store_true", help="check, print the resolved config and the plan, and stop")
    add_convert(commands)
    return parser


def add_convert(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd convert`."""
    convert = commands.add_parser(
        "convert",
        help="convert weights between Hugging Face and Megatron",
        description="Hugging Face directory -> Megatron checkpoint (torch_dist), or back: a run's <run.dir>/checkpoints/step-<n>, or one "
        "made here. SOURCE says which. Reads and writes a block at a time; stopped anywhere, the same command goes on.",
        epilog="There is no --tp, --pp or --ep: a torch_dist checkpoint holds whole tensors, and Megatron cuts them when it loads, for "
        "any TP, PP, EP and virtual PP. To train from a checkpoint, convert it to Hugging Face and give that as model.path.",
    )
    convert.add_argument("source", metavar="SOURCE", help="directory to read")
    convert.add_argument("target", metavar="TARGET", help="directory to make; appears when whole")
    convert.add_argument("--to", choices=("megatron", "hf"), help="refuse a SOURCE that is not of the other kind")
    convert.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="of what is written (default: keep)"
    )
    convert.add_argument("--check", action="store_true", help="read the target back, compare every byte, then logits if the model fits")
    convert.add_argument("--teacher", action="store_true", help="a run's checkpoint: the teacher's moving average, not the model")
    convert.add_argument("--hf", metavar="DIR", help="config.json and tokenizer of a Megatron SOURCE that does not lead to them")
    convert.add_argument("--file-mib", type=int, default=2048, metavar="N", help="size of the files written, about (MiB, default 2048)")
    convert.add_argument("--overwrite", action="store_true", help="replace TARGET, and drop another conversion's partial files")
    convert.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity")
    convert.add_argument("--allow-pickle", action="store_true", help="take pytorch_model.bin, with torch's weights_only; safetensors else")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unrecognized argument {unknown[0]}")
    alone = "RANK" not in os.environ  # a rank that torchrun started leaves it to the agent to say so
    try:
        if args.command == "convert":
            return _convert(parser, args, rest)
        return _train(args.items + rest, args.dry_run, argv)  # `rest`: positionals that follow an option
    except UserError as error:
        # Every rank of a machine refuses the same config, and one of them says so; any other error may be one rank's own.
        if not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megasd: {_rank_prefix()}{error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        if alone:
            print("megasd: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def _convert(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if args.file_mib < 1:
        parser.error("argument --file-mib: give 1 or more")
    _quiet_libraries()
    from megasd import conversion

    conversion.run(args)
    return 0


def _train(items: list[str], dry_run: bool, argv: list[str]) -> int:
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    config = load_config([item for item in items if item not in overrides], overrides, RECIPES)
    joined = _torchrun_world_size()
    world_size = joined or default_world_size(config)
    validate(config, world_size, rank=int(os.environ.get("RANK", "0")))
    if dry_run:
        print(to_yaml(config) + "\n".join(f"# {line}" for line in plan(config, world_size)))
        return 0
    if joined is None and world_size > 1:
        return _start_ranks(argv, world_size)

    signal.signal(signal.SIGTERM, _stop)
    _quiet_libraries()
    from megasd import train

    train.main(config)
    return 0


def plan(config: Config, world_size: int) -> list[str]:
    """What the run will do, in lines for a reader."""
    actor, rollout, run, engine = config.actor, config.rollout, config.run, config.rollout.engine
    data_parallel = data_parallel_size(config, world_size)
    samples = samples_per_step(config)
    tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    local = samples // data_parallel
    if not needs_engine(config):
        where = f"none (replays {rollout.replay_dir})" if rollout.replay_dir else "none"
    elif engine.urls:
        where = f"SGLang at {', '.join(engine.urls)}"
    else:
        dtype = actor.dtype if engine.dtype == "auto" else engine.dtype
        port = engine.port or "a free port"
        where = f"SGLang started on {engine.host}, {port}; TP {engine.tensor_parallel_size}, {dtype}, {engine.max_total_tokens} KV tokens"
    lines = [
        f"ranks        {world_size} = TP {actor.tensor_model_parallel_size} x PP {actor.pipeline_model_parallel_size} x "
        f"CP {actor.context_parallel_size} x DP {data_parallel} (experts: EP {actor.expert_model_parallel_size})",
        f"step         {samples} samples, at most {samples * tokens} tokens of prompt and response",
        f"rank         {local} samples a step = {local // actor.micro_batch_size} microbatches of {actor.micro_batch_size}; "
        f"sequences padded to {sequence_multiple(config)}",
        f"run          {run.steps} steps, {run.steps * samples} samples; resume: {run.resume}",
        f"algorithm    {config.algorithm.recipe}: {_terms(config)}",
        f"engine       {where}",
    ]
    teacher = config.algorithm.teacher
    if teacher:
        longest = tokens + rollout.max_response_tokens
        about = f"; a sequence of about {longest} tokens at most" if teacher.context == "first_success" else ""
        lines.append(f"teacher      {teacher.weights} weights, reads {teacher.context}{about}")
    every = f"every {config.evaluation.every} steps, " if config.evaluation.every else ""
    lines.append(f"evaluation   {f'{every}before and after, {config.data.eval}' if config.data.eval else 'none'}")
    files = ["config.yaml", "metrics.jsonl", "summary.json"]
    files += ["tensorboard/"] if run.tensorboard else []
    files += ["rollouts/"] if needs_engine(config) else []
    files += ["checkpoints/"] if config.checkpoint.every or config.checkpoint.save_at_end else []
    files += ["hf/"] if run.export else []
    return [*lines, f"writes       {run.dir}: {', '.join(files)}"]


def _terms(config: Config) -> str:
    algorithm = config.algorithm
    names = [f"{n} x {t.coefficient}" for n in ("distill", "policy_gradient", "nll") if (t := getattr(algorithm, n))]
    return f"{' + '.join(names)}; question weight {algorithm.question_weight}, {algorithm.aggregation}"


def _torchrun_world_size() -> int | None:
    """The world size under torchrun, else None. A WORLD_SIZE without a RANK comes from somewhere else."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(f"environment: {name}={os.environ[name]!r} is not a number; start with torchrun, or unset it")
    return int(os.environ["WORLD_SIZE"])


def _quiet_libraries() -> None:
    """Before the libraries are imported: keep what they say about themselves off the screen.

    Megatron without TransformerEngine and Apex warns in every module that it will use torch instead, and torch that Megatron calls old
    names. Neither is news to the user nor in his hands. Our own warnings, and those of libraries not named here, are shown as ever.
    `python -W` and PYTHONWARNINGS, or these variables, bring them back.
    """
    if not sys.warnoptions:
        for library in ("megatron", "torch", "transformers"):
            warnings.filterwarnings("ignore", module=rf"{library}\b")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _start_ranks(argv: list[str], world_size: int) -> int:
    """Run this same command on `world_size` ranks of this machine under torchrun's agent; returns the exit code of the first to fail."""
    import logging

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # of the agent in this process: a rank tells of its own failure, and the agent's report buries it
    options = ["--standalone", f"--nproc-per-node={world_size}", "-m", "megasd.cli", *argv]
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as error:
        if any(failure.exitcode == REFUSED for failure in error.failures.values()):
            return REFUSED
        rank, failure = error.get_first_failure()
        print(f"megasd: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:
        print("megasd: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, so that a started engine is closed; torchrun sends it to the ranks that outlive a failed one."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
