"""`megasd analyze coverage`: configs of one run on 1, 8, 64 ... questions."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasd.algo.stages import check_stages
from megasd.commands.parser import SubCommands, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.read_config import read_config
from megasd.commands.sigterm import unwind_on_sigterm
from megasd.config.load import split_items
from megasd.config.validate import validate
from megasd.types import UserError


@dataclass(frozen=True)
class Options:
    """The options of `megasd analyze coverage`."""

    # YAML files of the run
    configs: list[str]
    # numbers of questions, as in "1,8,64"
    sizes: str
    # directory of rows, YAML files and runs
    out: Path
    # seed of the choice of questions; None = run.seed
    seed: int | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed. UserError for a key=value."""
        for item in split_items(args.configs)[1]:
            raise UserError(
                f"{item}: a sweep takes YAML files, so that its commands say everything; put the key into a"
                " file"
            )
        return cls(configs=args.configs, sizes=args.sizes, out=Path(args.out), seed=args.seed)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd analyze coverage` to the command line."""
    parser = commands.add_parser(
        "coverage",
        help="configs of one run on 1, 8, 64 ... questions",
        description=(
            "Nested subsets of data.train and a YAML for each, checked as train checks it; prints the"
            " commands."
        ),
    )
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG.yaml", help="the run, as of train; the sizes go on top of it"
    )
    parser.add_argument(
        "--sizes", default="1,8,64,128,512", metavar="N,N,...", help="questions (default 1,8,64,128,512)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where rows, YAMLs and the runs go")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the choice of questions (default: run.seed)"
    )
    start_with(parser, lambda args: run(Options.from_args(args)), more="configs")


def run(options: Options) -> int:
    """Write the rows and the YAML of each size into --out, and print the commands; returns 0.

    Each YAML has passed the checks of `megasd train`.
    """
    unwind_on_sigterm()
    quiet_libraries()
    from megasd.data.prompts import load_prompts
    from megasd.evaluation.analysis import coverage
    from megasd.evaluation.analysis.output import output_directory

    files, out = options.configs, options.out
    config = read_config(files)
    prompts = load_prompts(
        config.data.train, max_row_bytes=config.data.max_row_bytes, mapping=config.data.mapping
    )
    sizes = coverage.parse_sizes(options.sizes)
    seed = config.run.seed if options.seed is None else options.seed
    output_directory(out)
    commands = []
    for size, chosen in coverage.nested(prompts, sizes, seed=seed, source=config.data.train).items():
        data, target = out / f"coverage-{size}.jsonl", out / f"coverage-{size}.yaml"
        rows = [coverage.coverage_row(prompt) for prompt in chosen]
        longest = max(len(line.encode()) for line in rows)
        tree = coverage.overlay(config, size, data=data, run_dir=out / f"run-{size}", row_bytes=longest)
        data.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
        _write_yaml(
            target,
            tree,
            f"{size} of the {len(prompts)} rows of {config.data.train}, seed {seed}; on top of"
            f" {' '.join(files)}",
        )
        try:
            sized = read_config([*files, str(target)])
            check_stages(sized)
            validate(sized)
        except UserError as error:
            raise UserError(f"size {size} ({target}): {error}") from error
        commands.append(shlex.join(["megasd", "train", *files, str(target)]))
    print("\n".join(commands))
    return 0


def _write_yaml(path: Path, tree: dict[str, Any], comment: str) -> None:
    """Write a tree of keys as YAML below a comment line."""
    import yaml

    path.write_text(
        f"# {comment}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}", encoding="utf-8"
    )
