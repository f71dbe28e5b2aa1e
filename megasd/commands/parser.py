"""The options of every command. Imports nothing heavy: `megasd --help` answers at once."""

from __future__ import annotations

import argparse
from typing import NoReturn, get_args, get_type_hints

from megasd import __version__
from megasd.algo.recipes import RECIPES
from megasd.config.schema import DataConfig, RewardConfig
from megasd.evaluation.presets import PRESETS

REFUSED = 2


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
        epilog=(
            "Every key is in megasd/config/schema.py. Later files and then overrides win; key=null switches"
            " an optional term off."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml|key=value",
        help="YAML files, and overrides such as optimizer.lr=1e-6",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check, print the resolved config and the plan, and stop"
    )
    add_convert(commands)
    add_data(commands)
    add_analyze(commands)
    add_eval(commands)
    add_plan(commands)
    add_launch(commands)
    add_serve(commands)
    add_doctor(commands)
    recipes = commands.add_parser(
        "recipes", help="list the methods", description="The values of algorithm.recipe, and their papers."
    )
    recipes.add_argument(
        "--json", action="store_true", help="one JSON object: name -> paper, about, and every key of the row"
    )
    return parser


def add_convert(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd convert`."""
    convert = commands.add_parser(
        "convert",
        help="convert weights between Hugging Face and Megatron",
        description=(
            "Hugging Face directory -> Megatron checkpoint (torch_dist), or back: a run's"
            " <run.dir>/checkpoints/step-<n>, or one made here. SOURCE says which. Reads and writes a block"
            " at a time; stopped anywhere, the same command goes on."
        ),
        epilog=(
            "There is no --tp, --pp or --ep: a torch_dist checkpoint holds whole tensors, and Megatron cuts"
            " them when it loads, for any TP, PP, EP and virtual PP. To train from a checkpoint, convert it"
            " to Hugging Face and give that as model.path."
        ),
    )
    convert.add_argument("source", metavar="SOURCE", help="directory to read")
    convert.add_argument("target", metavar="TARGET", help="directory to make; appears when whole")
    convert.add_argument(
        "--to", choices=("megatron", "hf"), help="refuse a SOURCE that is not of the other kind"
    )
    convert.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of what is written (default: keep)",
    )
    convert.add_argument(
        "--check",
        action="store_true",
        help="read the target back, compare every byte, then logits if the model fits",
    )
    convert.add_argument(
        "--teacher",
        action="store_true",
        help="a run's checkpoint: the teacher's moving average, not the model",
    )
    convert.add_argument(
        "--hf",
        metavar="DIR",
        help="config.json and tokenizer of a Megatron SOURCE that does not lead to them",
    )
    convert.add_argument(
        "--file-mib",
        type=int,
        default=2048,
        metavar="N",
        help="size of the files written, about (MiB, default 2048)",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace TARGET, and drop another conversion's partial files"
    )
    convert.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity")
    convert.add_argument(
        "--allow-pickle",
        action="store_true",
        help="take pytorch_model.bin, with torch's weights_only; safetensors else",
    )


def add_data(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd data check`."""
    data = commands.add_parser("data", help="check a data file", description="Work on data files.")
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND", parser_class=Parser)
    check = kinds.add_parser(
        "check",
        help="name every bad row",
        description=(
            "Read every row as a run would, and name each bad one by file and line: rows that cannot be read,"
            " damaged text, ids and prompts that occur twice, prompts of the held-out file, prompts that are"
            " too long, answers that no verifier can read. Then lengths, and a few prompts as student and"
            " teacher read them."
        ),
        epilog=(
            "Exit codes: 0 no errors, 1 errors, 2 unusable arguments. What is an error and what a warning:"
            " megasd/data/check.py."
        ),
    )
    mappings = get_args(get_type_hints(DataConfig)["mapping"])
    check.add_argument("file", metavar="FILE", help="JSONL, parquet or Arrow file, or a directory of them")
    check.add_argument(
        "--against", metavar="EVALFILE", help="held-out file, none of whose questions may be in FILE"
    )
    check.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory: count its tokens, show its chat template"
    )
    check.add_argument("--mapping", choices=mappings, default="auto", help="as data.mapping (default: auto)")
    check.add_argument("--against-mapping", choices=mappings, help="of EVALFILE (default: that of FILE)")
    check.add_argument(
        "--verifier",
        choices=get_args(get_type_hints(RewardConfig)["verifier"]),
        help="as reward.verifier (default: any)",
    )
    check.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="as rollout.max_prompt_tokens (with --model; default 1024)",
    )
    check.add_argument(
        "--max-row-bytes",
        type=int,
        default=DataConfig().max_row_bytes,
        metavar="N",
        help="as data.max_row_bytes",
    )
    check.add_argument(
        "--recipe",
        choices=list(RECIPES),
        metavar="NAME",
        help="whose teacher is shown, and whether rows need a solution",
    )
    check.add_argument(
        "--show", type=int, default=2, metavar="N", help="rows shown as they are read (default 2)"
    )
    check.add_argument(
        "--json",
        action="store_true",
        help='the last line of stdout is {"errors": [{"line", "kind", "message"}], ...}',
    )


def add_analyze(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd analyze`."""
    analyze = commands.add_parser(
        "analyze",
        help="measure length, words of doubt, and what guidance does to them",
        description=(
            "The measurements of Kim et al. (arXiv 2603.24472): why self-distillation sometimes costs"
            " reasoning."
        ),
    )
    kinds = analyze.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    rollouts = kinds.add_parser(
        "rollouts",
        help="score, length and epistemic markers of kept rollouts",
        description=(
            "Tables (CSV, markdown) and plots (where matplotlib is installed) of what a run sampled, by step"
            " and by verdict."
        ),
    )
    rollouts.add_argument(
        "sources", nargs="+", metavar="RUN_DIR|FILE.jsonl", help="a run's directory, or single rollout files"
    )
    rollouts.add_argument(
        "--out", metavar="DIR", help="where tables and plots go (default, for one run: RUN_DIR/analysis)"
    )
    guidance = kinds.add_parser(
        "guidance",
        help="what a live model writes with and without a solution before it",
        description=(
            "Four settings: the question, with a correct rollout, with that rollout less its thinking, with a"
            " response written under it. Score, length and markers of each; and the KL between the model that"
            " reads the solution and the one that does not."
        ),
        epilog=(
            "Sampling, verifier and template are keys of megasd/config/schema.py: rollout.*, reward.*, "
            "algorithm.teacher.template, run.seed."
        ),
    )
    guidance.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face directory to start a server on, or URL of a running one",
    )
    guidance.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml|key=value",
        help="as of train, such as reward.verifier=exact_match",
    )
    guidance.add_argument("--data", required=True, metavar="FILE", help="rows, as data.train")
    guidance.add_argument("--out", required=True, metavar="DIR", help="where tables, plots and samples go")
    guidance.add_argument(
        "--model",
        metavar="DIR",
        help="of a URL: Hugging Face directory of what it serves; nothing is sent there",
    )
    guidance.add_argument(
        "--num-samples", type=int, default=8, metavar="N", help="samples a question and setting (default 8)"
    )
    guidance.add_argument(
        "--num-questions",
        type=int,
        default=100,
        metavar="N",
        help="questions compared, at most (default 100)",
    )
    guidance.add_argument(
        "--min-accuracy",
        type=float,
        default=0.125,
        metavar="P",
        help="of a question, unguided (default 0.125)",
    )
    guidance.add_argument(
        "--max-accuracy", type=float, default=0.5, metavar="P", help="likewise (default 0.5)"
    )
    guidance.add_argument(
        "--kl",
        choices=("transformers", "engine", "none"),
        help=(
            "transformers: exact, from the directory's weights (default of a directory); engine: a lower"
            " bound from top log-probs (default of a URL)"
        ),
    )
    guidance.add_argument(
        "--top-k",
        type=int,
        default=100,
        metavar="K",
        help="log-probs a token asked for by --kl engine (default 100)",
    )
    guidance.add_argument(
        "--kl-samples",
        type=int,
        default=1,
        metavar="N",
        help="unguided responses a question it is taken on (default 1)",
    )
    guidance.add_argument("--overwrite", action="store_true", help="replace an analysis in --out")
    coverage = kinds.add_parser(
        "coverage",
        help="configs of one run on 1, 8, 64 ... questions",
        description=(
            "Nested subsets of data.train and a YAML for each, checked as train checks it; prints the"
            " commands."
        ),
    )
    coverage.add_argument(
        "configs", nargs="+", metavar="CONFIG.yaml", help="the run, as of train; the sizes go on top of it"
    )
    coverage.add_argument(
        "--sizes", default="1,8,64,128,512", metavar="N,N,...", help="questions (default 1,8,64,128,512)"
    )
    coverage.add_argument("--out", required=True, metavar="DIR", help="where rows, YAMLs and the runs go")
    coverage.add_argument(
        "--seed", type=int, metavar="N", help="of the choice of questions (default: run.seed)"
    )


def add_eval(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd eval`."""
    evaluate = commands.add_parser(
        "eval",
        help="measure a model on held-out questions",
        description=(
            "Sample answers, score them, keep them, and print mean@k, unbiased pass@k and maj@k with 95%%"
            " intervals over questions. SOURCE: a Hugging Face directory, a Megatron checkpoint of a run, or"
            " the URL of a running SGLang server, whose weights stay."
        ),
        epilog=(
            "What each figure is: megasd/evaluation/estimators.py. What is reproducible:"
            " megasd/commands/evaluate.py."
        ),
    )
    evaluate.add_argument(
        "source", nargs="?", metavar="SOURCE", help="directory, or http://host:port with --model"
    )
    evaluate.add_argument("--data", metavar="FILE", help="questions, as data.eval")
    evaluate.add_argument("--mapping", metavar="NAME", help="as data.mapping (default: auto)")
    evaluate.add_argument(
        "--verifier", choices=get_args(get_type_hints(RewardConfig)["verifier"]), help="as reward.verifier"
    )
    evaluate.add_argument("--out", metavar="DIR", help="where samples and figures go")
    evaluate.add_argument(
        "--num-samples", type=positive, default=16, metavar="N", help="samples a question (default 16)"
    )
    evaluate.add_argument(
        "--k", metavar="K,K,...", help="k of pass@k and of the drawn figures (default 1,2,4,... to N)"
    )
    evaluate.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")
    evaluate.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="decoding of a paper (--list-presets); the options below win over it",
    )
    evaluate.add_argument("--list-presets", action="store_true", help="print the presets and stop")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="0 = greedy (default 1)")
    evaluate.add_argument("--top-p", type=float, metavar="P", help="(default 1)")
    evaluate.add_argument("--top-k", type=int, metavar="K", help="-1 = off (default)")
    evaluate.add_argument(
        "--max-response-tokens", type=positive, metavar="N", help="(default: 8192, or the model's room)"
    )
    evaluate.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="as model.enable_thinking (default: the template's)",
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the engine and of the intervals (default 0)"
    )
    evaluate.add_argument(
        "--deterministic", action="store_true", help="a sampling seed for each sample (GPU engines)"
    )
    evaluate.add_argument(
        "--model",
        metavar="DIR",
        help="of a URL: Hugging Face directory of what it serves; nothing is sent there",
    )
    evaluate.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="of a started engine (default 1)",
    )
    evaluate.add_argument(
        "--max-total-tokens",
        type=positive,
        default=65536,
        metavar="N",
        help="KV pool of a started engine (tokens)",
    )
    evaluate.add_argument(
        "--max-concurrency", type=positive, default=256, metavar="N", help="requests in flight (default 256)"
    )
    evaluate.add_argument("--verifier-workers", type=positive, metavar="N", help="as reward.workers")
    evaluate.add_argument("--verifier-timeout", type=float, metavar="SECONDS", help="as reward.timeout")
    evaluate.add_argument("--rubric-threshold", type=float, metavar="S", help="as reward.rubric_threshold")
    evaluate.add_argument(
        "--recompute",
        metavar="DIR",
        help="figures of a kept evaluation, without a model; --verifier scores it anew",
    )
    evaluate.add_argument("--overwrite", action="store_true", help="replace the evaluation in --out")
    evaluate.add_argument("--dry-run", action="store_true", help="check the data, print the plan, and stop")
    evaluate.add_argument(
        "--harness", choices=("lm-eval",), help="run lm-evaluation-harness on the model instead"
    )
    evaluate.add_argument("--tasks", metavar="NAMES", help="of --harness, such as gsm8k")
    evaluate.add_argument(
        "--harness-args", metavar="TEXT", help="more arguments of the harness, in one string"
    )


ITEMS = dict(metavar="CONFIG.yaml|key=value", help="as of train")


def add_plan(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd plan`."""
    plan = commands.add_parser(
        "plan",
        help="memory and time of a run, before a GPU is taken",
        description=(
            "Memory of a rank by cause, time of a step by phase, and the parallel layouts that fit, ranked."
            " Reads config.json of model.path and no weights; a model that is not on this machine is looked"
            " up by name in configs/model."
        ),
        epilog=(
            "Exit codes: 0 fits, 2 refused, also when no layout fits: the first key to change is named."
            " Formulas: megasd/planner."
        ),
    )
    plan.add_argument("items", nargs="*", **ITEMS)
    plan.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="GPUs that train (default: cluster.actor_nodes x cluster.gpus_per_node)",
    )
    plan.add_argument("--gpu", metavar="KIND", help="as cluster.gpu, such as h100-80g")
    plan.add_argument("--model-config", metavar="FILE", help="config.json to read instead of model.path's")
    plan.add_argument("--top", type=positive, default=8, metavar="N", help="layouts shown (default 8)")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def add_launch(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd launch`."""
    launch = commands.add_parser(
        "launch",
        help="submit a run to a cluster",
        description="Submit a run; cluster.* says to which machines.",
    )
    kinds = launch.add_subparsers(dest="launcher", required=True, metavar="LAUNCHER", parser_class=Parser)
    slurm = kinds.add_parser(
        "slurm", help="one sbatch script", description="Write the sbatch script of a run and submit it."
    )
    slurm.add_argument("items", nargs="*", **ITEMS)
    slurm.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted, and stop"
    )
    nemo = kinds.add_parser(
        "nemo-run", help="a nemo-run experiment", description="Run through nemo_run: here, or on Slurm."
    )
    nemo.add_argument("items", nargs="*", **ITEMS)
    nemo.add_argument(
        "--executor",
        choices=("slurm", "local"),
        default="slurm",
        help="local: torchrun on this machine (default: slurm)",
    )
    nemo.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    nemo.add_argument("--detach", action="store_true", help="do not wait for the end")


def add_serve(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd serve`."""
    serve = commands.add_parser(
        "serve",
        help="rollout engines on this machine, for a run on others",
        description=(
            "Start as many engines as this machine's GPUs hold, announce them in run.dir/engines for the run"
            " that waits for them (rollout.engine.served), and close them when that run ends."
        ),
    )
    serve.add_argument("items", nargs="*", **ITEMS)
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to bind; other than loopback needs MEGASD_ENGINE_KEY",
    )
    serve.add_argument(
        "--engines",
        type=positive,
        metavar="N",
        help="engines (default: GPUs here / rollout.engine.tensor_parallel_size)",
    )


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """The options of `megasd doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="check this machine",
        description=(
            "Versions and conflicts, GPUs, links, FP8, NCCL, shared memory, ports, disk, SGLang, clock: a"
            " line each, with the fix."
        ),
        epilog="Exit codes: 0 no check failed, 1 some did.",
    )
    doctor.add_argument("items", nargs="*", **ITEMS)
    doctor.add_argument(
        "--json", action="store_true", help='{"checks": [{"name", "status", "detail", "fix"}]}'
    )


def positive(text: str) -> int:
    """argparse's type of counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)
