"""`megasd data check`: name every bad row of a data file (data/check.py).

    megasd data check train.jsonl --against eval.jsonl --model /models/Qwen3-8B --max-prompt-tokens 2048

Exit codes: 0 no errors, 1 errors, 2 unusable arguments. With --json the last line of stdout is one
JSON object, {"errors": [{"file", "line", "kind", "message"}], "warnings": [...], ...}.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from megasd.algo.recipes import RECIPES
from megasd.commands.parser import Parser, SubCommands, positive, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.config.schema import DataConfig, RewardConfig, RolloutConfig
from megasd.types import UserError

if TYPE_CHECKING:
    from megasd.data.chat import Chat
    from megasd.data.check import CheckReport, CheckRules


@dataclass(frozen=True)
class Options:
    """The options of `megasd data check`; `add_parser` says what each does."""

    file: str
    against: str | None
    # Hugging Face directory of the tokenizer; None = lengths are counted in characters
    model: str | None
    mapping: str
    against_mapping: str | None
    verifier: str | None
    max_prompt_tokens: int | None
    max_row_bytes: int
    recipe: str | None
    # number of rows shown
    show: int
    json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed. UserError for options that exclude each other."""
        if args.max_prompt_tokens and not args.model:
            raise UserError("--max-prompt-tokens: counts with a model's tokenizer; give --model DIR too")
        if args.against and Path(args.against).resolve() == Path(args.file).resolve():
            raise UserError(f"--against {args.against}: is the file itself; give the held-out one")
        return cls(
            file=args.file,
            against=args.against,
            model=args.model,
            mapping=args.mapping,
            against_mapping=args.against_mapping,
            verifier=args.verifier,
            max_prompt_tokens=args.max_prompt_tokens,
            max_row_bytes=args.max_row_bytes,
            recipe=args.recipe,
            show=args.show,
            json=args.json,
        )


def add_parser(commands: SubCommands) -> None:
    """Add `megasd data check` to the command line."""
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
    _add_options(check)
    start_with(check, lambda args: run(Options.from_args(args)))


def _add_options(check: Parser) -> None:
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
        type=positive,
        metavar="N",
        help="as rollout.max_prompt_tokens (with --model; default 1024)",
    )
    check.add_argument(
        "--max-row-bytes",
        type=positive,
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


def run(options: Options) -> int:
    """Check the file, print what was found, and return the exit code."""
    quiet_libraries()
    from megasd.algo.stages import reads_solutions
    from megasd.data.chat import Chat
    from megasd.data.check import CHARACTERS_A_TOKEN, CheckRules, check_file
    from megasd.data.check_report import chat_text, plain_text, report_json, report_text

    algorithm = RECIPES[options.recipe] if options.recipe else None
    chat = Chat(options.model) if options.model else None
    longest = options.max_prompt_tokens or RolloutConfig().max_prompt_tokens
    rules = CheckRules(
        mapping=options.mapping,
        max_row_bytes=options.max_row_bytes,
        require_solution=algorithm is not None and reads_solutions(algorithm),
        verifier=options.verifier,
        max_prompt_length=longest if chat else CHARACTERS_A_TOKEN * longest,
    )
    held_out = _check_held_out(options, rules)
    if chat is not None:
        rules = _count_tokens(rules, chat)
    report = check_file(options.file, replace(rules, held_out=held_out), num_shown=options.show)
    render = plain_text if chat is None else chat_text(chat)
    print("\n".join(report_text(report, held_out, algorithm, render)))
    if options.json:
        print(json.dumps(report_json(report, held_out)))
    return int(bool(report.errors) or (held_out is not None and bool(held_out.errors)))


def _check_held_out(options: Options, rules: CheckRules) -> CheckReport | None:
    """The report of --against, whose rows need no solution and may be of any length."""
    from megasd.data.check import check_file

    if options.against is None:
        return None
    mapping = options.against_mapping or options.mapping
    rules = replace(rules, mapping=mapping, require_solution=False, max_prompt_length=None)
    return check_file(options.against, rules, num_shown=0)


def _count_tokens(rules: CheckRules, chat: Chat) -> CheckRules:
    """The rules with lengths in tokens instead of characters."""
    return replace(
        rules,
        prompt_length=lambda messages: len(chat.encode_prompt(messages)),
        text_length=lambda text: len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]),
        unit="tokens",
    )
