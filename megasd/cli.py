"""The command line: parse, check everything that can be checked without torch, then import the loop.

megasd train CONFIG.yaml... [key=value ...] [--dry-run]
megasd convert SOURCE TARGET [--dtype DTYPE] [--check] ...
megasd recipes [--json]
megasd data check FILE [--against FILE] [--model DIR] [--json] ...
megasd analyze rollouts|guidance|coverage ...
megasd eval SOURCE --data FILE --verifier NAME --out DIR ...

Exit codes: 0 done, 1 errors in the data (data check), 2 refused (one line on stderr), 130 interrupted; anything else is a crash with its
traceback.
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
from types import FrameType
from typing import NoReturn, get_args, get_type_hints

from megasd import __version__
from megasd.algo.recipes import ABOUT, RECIPES
from megasd.algo.schedule import check_stages
from megasd.config import Config, ConfigError, DataConfig, RewardConfig, samples_per_step
from megasd.load_config import load_config, to_yaml
from megasd.presets import PRESETS
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
    add_data(commands)
    add_analyze(commands)
    add_eval(commands)
    recipes = commands.add_parser("recipes", help="list the methods", description="The values of algorithm.recipe, and their papers.")
    recipes.add_argument("--json", action="store_true", help="one JSON object: name -> paper, about, and every key of the row")
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


def add_data(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd data check`."""
    data = commands.add_parser("data", help="check a data file", description="Work on data files.")
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND", parser_class=Parser)
    check = kinds.add_parser(
        "check",
        help="name every bad row",
        description="Read every row as a run would, and name each bad one by file and line: rows that cannot be read, damaged text, ids "
        "and prompts that occur twice, prompts of the held-out file, prompts that are too long, answers that no verifier can read. Then "
        "lengths, and a few prompts as student and teacher read them.",
        epilog="Exit codes: 0 no errors, 1 errors, 2 unusable arguments. What is an error and what a warning: megasd/data/check.py.",
    )
    mappings = get_args(get_type_hints(DataConfig)["mapping"])
    check.add_argument("file", metavar="FILE", help="JSONL, parquet or Arrow file, or a directory of them")
    check.add_argument("--against", metavar="EVALFILE", help="held-out file, none of whose questions may be in FILE")
    check.add_argument("--model", metavar="DIR", help="Hugging Face directory: count its tokens, show its chat template")
    check.add_argument("--mapping", choices=mappings, default="auto", help="as data.mapping (default: auto)")
    check.add_argument("--against-mapping", choices=mappings, help="of EVALFILE (default: that of FILE)")
    check.add_argument("--verifier", choices=get_args(get_type_hints(RewardConfig)["verifier"]), help="as reward.verifier (default: any)")
    check.add_argument("--max-prompt-tokens", type=int, metavar="N", help="as rollout.max_prompt_tokens (with --model; default 1024)")
    check.add_argument("--max-row-bytes", type=int, default=DataConfig().max_row_bytes, metavar="N", help="as data.max_row_bytes")
    check.add_argument("--recipe", choices=list(RECIPES), metavar="NAME", help="whose teacher is shown, and whether rows need a solution")
    check.add_argument("--show", type=int, default=2, metavar="N", help="rows shown as they are read (default 2)")
    check.add_argument("--json", action="store_true", help='the last line of stdout is {"errors": [{"line", "kind", "message"}], ...}')


def add_analyze(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd analyze`."""
    analyze = commands.add_parser(
        "analyze",
        help="measure length, words of doubt, and what guidance does to them",
        description="The measurements of Kim et al. (arXiv 2603.24472): why self-distillation sometimes costs reasoning.",
    )
    kinds = analyze.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    rollouts = kinds.add_parser(
        "rollouts",
        help="score, length and epistemic markers of kept rollouts",
        description="Tables (CSV, markdown) and plots (where matplotlib is installed) of what a run sampled, by step and by verdict.",
    )
    rollouts.add_argument("sources", nargs="+", metavar="RUN_DIR|FILE.jsonl", help="a run's directory, or single rollout files")
    rollouts.add_argument("--out", metavar="DIR", help="where tables and plots go (default, for one run: RUN_DIR/analysis)")
    guidance = kinds.add_parser(
        "guidance",
        help="what a live model writes with and without a solution before it",
        description="Four settings: the question, with a correct rollout, with that rollout less its thinking, with a response written "
        "under it. Score, length and markers of each; and the KL between the model that reads the solution and the one that does not.",
        epilog="Sampling, verifier and template are keys of megasd/config.py: rollout.*, reward.*, algorithm.teacher.template, run.seed.",
    )
    guidance.add_argument("source", metavar="SOURCE", help="Hugging Face directory to start a server on, or URL of a running one")
    guidance.add_argument("items", nargs="*", metavar="CONFIG.yaml|key=value", help="as of train, such as reward.verifier=exact_match")
    guidance.add_argument("--data", required=True, metavar="FILE", help="rows, as data.train")
    guidance.add_argument("--out", required=True, metavar="DIR", help="where tables, plots and samples go")
    guidance.add_argument("--model", metavar="DIR", help="of a URL: Hugging Face directory of what it serves; nothing is sent there")
    guidance.add_argument("--num-samples", type=int, default=8, metavar="N", help="samples a question and setting (default 8)")
    guidance.add_argument("--num-questions", type=int, default=100, metavar="N", help="questions compared, at most (default 100)")
    guidance.add_argument("--min-accuracy", type=float, default=0.125, metavar="P", help="of a question, unguided (default 0.125)")
    guidance.add_argument("--max-accuracy", type=float, default=0.5, metavar="P", help="likewise (default 0.5)")
    guidance.add_argument(
        "--kl",
        choices=("transformers", "engine", "none"),
        help="transformers: exact, from the directory's weights (default of a directory); engine: a lower bound from top log-probs "
        "(default of a URL)",
    )
    guidance.add_argument("--top-k", type=int, default=100, metavar="K", help="log-probs a token asked for by --kl engine (default 100)")
    guidance.add_argument("--kl-samples", type=int, default=1, metavar="N", help="unguided responses a question it is taken on (default 1)")
    guidance.add_argument("--overwrite", action="store_true", help="replace an analysis in --out")
    coverage = kinds.add_parser(
        "coverage",
        help="configs of one run on 1, 8, 64 ... questions",
        description="Nested subsets of data.train and a YAML for each, checked as train checks it; prints the commands.",
    )
    coverage.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="the run, as of train; the sizes go on top of it")
    coverage.add_argument("--sizes", default="1,8,64,128,512", metavar="N,N,...", help="questions (default 1,8,64,128,512)")
    coverage.add_argument("--out", required=True, metavar="DIR", help="where rows, YAMLs and the runs go")
    coverage.add_argument("--seed", type=int, metavar="N", help="of the choice of questions (default: run.seed)")


def add_eval(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd eval`."""
    evaluate = commands.add_parser(
        "eval",
        help="measure a model on held-out questions",
        description="Sample answers, score them, keep them, and print mean@k, unbiased pass@k and maj@k with 95%% intervals over "
        "questions. SOURCE: a Hugging Face directory, a Megatron checkpoint of a run, or the URL of a running SGLang server, whose weights "
        "stay.",
        epilog="What each figure is: megasd/evaluate.py. What is reproducible: megasd/eval_run.py.",
    )
    evaluate.add_argument("source", nargs="?", metavar="SOURCE", help="directory, or http://host:port with --model")
    evaluate.add_argument("--data", metavar="FILE", help="questions, as data.eval")
    evaluate.add_argument("--mapping", metavar="NAME", help="as data.mapping (default: auto)")
    evaluate.add_argument("--verifier", choices=get_args(get_type_hints(RewardConfig)["verifier"]), help="as reward.verifier")
    evaluate.add_argument("--out", metavar="DIR", help="where samples and figures go")
    evaluate.add_argument("--num-samples", type=positive, default=16, metavar="N", help="samples a question (default 16)")
    evaluate.add_argument("--k", metavar="K,K,...", help="k of pass@k and of the drawn figures (default 1,2,4,... to N)")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")
    evaluate.add_argument("--preset", choices=list(PRESETS), help="decoding of a paper (--list-presets); the options below win over it")
    evaluate.add_argument("--list-presets", action="store_true", help="print the presets and stop")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="0 = greedy (default 1)")
    evaluate.add_argument("--top-p", type=float, metavar="P", help="(default 1)")
    evaluate.add_argument("--top-k", type=int, metavar="K", help="-1 = off (default)")
    evaluate.add_argument("--max-response-tokens", type=positive, metavar="N", help="(default: 8192, or the model's room)")
    evaluate.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="as model.enable_thinking (default: the template's)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="of the engine and of the intervals (default 0)")
    evaluate.add_argument("--deterministic", action="store_true", help="a sampling seed for each sample (GPU engines)")
    evaluate.add_argument("--model", metavar="DIR", help="of a URL: Hugging Face directory of what it serves; nothing is sent there")
    evaluate.add_argument("--tensor-parallel-size", type=positive, default=1, metavar="N", help="of a started engine (default 1)")
    evaluate.add_argument("--max-total-tokens", type=positive, default=65536, metavar="N", help="KV pool of a started engine (tokens)")
    evaluate.add_argument("--max-concurrency", type=positive, default=256, metavar="N", help="requests in flight (default 256)")
    evaluate.add_argument("--verifier-workers", type=positive, metavar="N", help="as reward.workers")
    evaluate.add_argument("--verifier-timeout", type=float, metavar="SECONDS", help="as reward.timeout")
    evaluate.add_argument("--rubric-threshold", type=float, metavar="S", help="as reward.rubric_threshold")
    evaluate.add_argument("--recompute", metavar="DIR", help="figures of a kept evaluation, without a model; --verifier scores it anew")
    evaluate.add_argument("--overwrite", action="store_true", help="replace the evaluation in --out")
    evaluate.add_argument("--dry-run", action="store_true", help="check the data, print the plan, and stop")
    evaluate.add_argument("--harness", choices=("lm-eval",), help="run lm-evaluation-harness on the model instead")
    evaluate.add_argument("--tasks", metavar="NAMES", help="of --harness, such as gsm8k")
    evaluate.add_argument("--harness-args", metavar="TEXT", help="more arguments of the harness, in one string")


def positive(text: str) -> int:
    """argparse's type of counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


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


def _eval(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if args.list_presets:
        for name, preset in PRESETS.items():
            print(f"{name:<16}" + ", ".join(f"{key} {value}" for key, value in asdict(preset).items() if key != "source"))
            print(f"{'':<16}{preset.source}")
        return 0
    _quiet_libraries()
    from megasd import eval_run

    eval_run.run(args)
    return 0


def _convert(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if args.file_mib < 1:
        parser.error("argument --file-mib: give 1 or more")
    _quiet_libraries()
    from megasd import conversion

    conversion.run(args)
    return 0


def _data(parser: Parser, args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    for name in ("max_prompt_tokens", "max_row_bytes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: give 1 or more")
    _quiet_libraries()
    from megasd import data_check

    return data_check.run(args)


def _analyze(args: argparse.Namespace, rest: list[str]) -> int:
    signal.signal(signal.SIGTERM, _stop)
    _quiet_libraries()
    from megasd import analyze

    analyze.run(args, rest)
    return 0


def _recipes(parser: Parser, as_json: bool, rest: list[str]) -> int:
    if rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if as_json:
        rows = {name: {"paper": paper, "about": about, "row": asdict(RECIPES[name])} for name, (paper, about) in ABOUT.items()}
        print(json.dumps(rows, indent=2))
        return 0
    for name, (paper, about) in ABOUT.items():
        print(f"{name:<12}{paper:<24}{about}")
    return 0


def _train(items: list[str], dry_run: bool, argv: list[str]) -> int:
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    config = load_config([item for item in items if item not in overrides], overrides, RECIPES)
    check_stages(config.algorithm, config.run.steps)
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
    lines += [f"stage        {stage}" for stage in config.algorithm.stages]
    teacher = config.algorithm.teacher
    if teacher:
        longest = tokens + rollout.max_response_tokens
        about = f"; a sequence of about {longest} tokens at most" if teacher.context.endswith("_success") else ""
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
    return f"{' + '.join(names)}; question weight {algorithm.question_weight.kind}, {algorithm.aggregation}"


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
