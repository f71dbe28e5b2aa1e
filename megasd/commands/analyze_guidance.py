"""`megasd analyze guidance`: what a live model writes with and without a solution in its prompt."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from megasd.commands.parser import Parser, SubCommands, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.read_config import read_config
from megasd.commands.sigterm import unwind_on_sigterm
from megasd.config.schema import Config
from megasd.types import Group, UserError, is_url


@dataclass(frozen=True)
class Options:
    """The options of `megasd analyze guidance`; `add_parser` says what each does."""

    # Hugging Face directory, or URL of a running server
    source: str
    # YAML files and key=value
    items: list[str]
    data: str
    out: Path
    # Hugging Face directory of what a URL serves; None without a URL
    model: str | None
    num_samples: int
    num_questions: int
    min_accuracy: float
    max_accuracy: float
    # "transformers", "engine" or "none"
    kl: str
    top_k: int
    kl_samples: int
    overwrite: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed. UserError for options that clash."""
        by_url = is_url(args.source)
        if by_url and args.model is None:
            raise UserError(
                f"{args.source}: also give --model DIR, the Hugging Face directory (tokenizer, config.json)"
                " of what it serves"
            )
        if not by_url and args.model is not None:
            raise UserError("--model: goes with a URL; SOURCE is a directory, and the model")
        if not 0 <= args.min_accuracy <= args.max_accuracy <= 1:
            raise UserError(
                f"--min-accuracy {args.min_accuracy:g} --max-accuracy {args.max_accuracy:g}: give 0 <= least"
                " <= most <= 1"
            )
        for name in ("num_samples", "num_questions", "top_k", "kl_samples"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
        return cls(
            source=args.source,
            items=args.items,
            data=args.data,
            out=Path(args.out),
            model=args.model,
            num_samples=args.num_samples,
            num_questions=args.num_questions,
            min_accuracy=args.min_accuracy,
            max_accuracy=args.max_accuracy,
            kl=args.kl or ("engine" if by_url else "transformers"),
            top_k=args.top_k,
            kl_samples=args.kl_samples,
            overwrite=args.overwrite,
        )


def add_parser(commands: SubCommands) -> None:
    """Add `megasd analyze guidance` to the command line."""
    parser = commands.add_parser(
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
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face directory to start a server on, or URL of a running one",
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml|key=value",
        help="as of train, such as reward.verifier=exact_match",
    )
    _add_options(parser)
    start_with(parser, lambda args: run(Options.from_args(args)), more="items")


def _add_options(parser: Parser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help="rows, as data.train")
    parser.add_argument("--out", required=True, metavar="DIR", help="where tables, plots and samples go")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="of a URL: Hugging Face directory of what it serves; nothing is sent there",
    )
    parser.add_argument(
        "--num-samples", type=int, default=8, metavar="N", help="samples a question and setting (default 8)"
    )
    parser.add_argument(
        "--num-questions",
        type=int,
        default=100,
        metavar="N",
        help="questions compared, at most (default 100)",
    )
    parser.add_argument(
        "--min-accuracy",
        type=float,
        default=0.125,
        metavar="P",
        help="of a question, unguided (default 0.125)",
    )
    parser.add_argument("--max-accuracy", type=float, default=0.5, metavar="P", help="likewise (default 0.5)")
    parser.add_argument(
        "--kl",
        choices=("transformers", "engine", "none"),
        help=(
            "transformers: exact, from the directory's weights (default of a directory); engine: a lower"
            " bound from top log-probs (default of a URL)"
        ),
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=100,
        metavar="K",
        help="log-probs a token asked for by --kl engine (default 100)",
    )
    parser.add_argument(
        "--kl-samples",
        type=int,
        default=1,
        metavar="N",
        help="unguided responses a question it is taken on (default 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an analysis in --out")


def run(options: Options) -> int:
    """Sample under the four settings, take the KL, write tables into --out; returns 0."""
    unwind_on_sigterm()
    quiet_libraries()
    from megasd.data.chat import Chat
    from megasd.data.prompts import load_prompts
    from megasd.data.rollout_log import save_groups
    from megasd.evaluation.analysis.guidance_report import GUIDANCE_FILES, write_guidance
    from megasd.evaluation.analysis.output import output_directory
    from megasd.evaluation.analysis.study import Bounds, Study
    from megasd.evaluation.analysis.tables import TableRow
    from megasd.evaluation.engine_for import open_guest_engine
    from megasd.rewards.reward_pool import RewardPool

    began, config, out = time.monotonic(), guidance_config(options), options.out
    if (out / "analysis.json").exists() and not options.overwrite:
        raise UserError(
            f"--out {out}: already holds an analysis (analysis.json); give another directory, or --overwrite"
        )
    chat = Chat(config.model.path, enable_thinking=config.model.enable_thinking)
    prompts = load_prompts(
        config.data.train, max_row_bytes=config.data.max_row_bytes, mapping=config.data.mapping
    )
    output_directory(out)
    # An earlier analysis leaves no file behind.
    for old in [out / name for name in GUIDANCE_FILES] + list(out.glob("samples-*.jsonl")):
        old.unlink(missing_ok=True)

    def keep(samples: dict[str, list[Group]]) -> None:
        for setting, groups in samples.items():
            save_groups(out / f"samples-{setting}.jsonl", groups)

    kl: list[TableRow] = []
    bounds = Bounds(options.min_accuracy, options.max_accuracy, options.num_questions)
    with open_guest_engine(config, chat=chat, out=out) as engine, RewardPool(config.reward) as rewards:
        study = Study(config, chat, engine, rewards, say=lambda line: print(line, flush=True))
        study.sample(prompts, bounds, keep)
        if options.kl == "engine":
            kl = study.engine_kl(per_question=options.kl_samples, top_k=options.top_k)
    # Now the engine and its memory have gone.
    if options.kl == "transformers":
        kl = study.full_kl(per_question=options.kl_samples)
    seconds = time.monotonic() - began
    write_guidance(out, study, kl, source=options.source, bounds=bounds, kl_by=options.kl, seconds=seconds)
    return 0


def guidance_config(options: Options) -> Config:
    """The config of an analysis: YAML files and key=value, then what the options say."""
    urls = options.source if is_url(options.source) else ""
    own = [
        f"model.path={options.model or options.source}",
        f"data.train={options.data}",
        f"run.dir={options.out}",
        f"rollout.num_samples={options.num_samples}",
        f"rollout.engine.urls=[{urls}]",
        "rollout.engine.model_path=null",
    ]
    return read_config(options.items, own)
