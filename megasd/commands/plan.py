"""`megasd plan`: memory and time of a run, before a GPU is taken.

Prints tables of memory, time and layouts, or one JSON object. Exit code 0 when the run fits. Exit
code 2 when it does not: then one line on stderr names the first key to change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasd.commands.parser import REFUSED, SubCommands, add_items, positive, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.commands.read_config import read_config
from megasd.config.load import split_items
from megasd.config.schema import Config
from megasd.types import UserError

if TYPE_CHECKING:
    from megasd.cluster.planner.job import PlannedRun

# the models of a checkout
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


@dataclass(frozen=True)
class Options:
    """The options of `megasd plan`."""

    # YAML files and key=value
    items: list[str]
    # GPUs that train; None = those of the config
    gpus: int | None
    # kind of GPU; None = cluster.gpu
    gpu: str | None
    # config.json to read; None = that of model.path
    model_config: str | None
    # number of layouts shown
    top: int
    # print one JSON object instead of tables
    json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed."""
        return cls(args.items, args.gpus, args.gpu, args.model_config, args.top, args.json)


def add_parser(commands: SubCommands) -> None:
    """Add `megasd plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="memory and time of a run, before a GPU is taken",
        description=(
            "Memory of a rank by cause, time of a step by phase, and the parallel layouts that fit, ranked."
            " Reads config.json of model.path and no weights; a model that is not on this machine is looked"
            " up by name in configs/model."
        ),
        epilog=(
            "Exit codes: 0 fits, 2 refused, also when no layout fits: the first key to change is named."
            " Formulas: megasd/cluster/planner."
        ),
    )
    add_items(parser)
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="GPUs that train (default: cluster.actor_nodes x cluster.gpus_per_node)",
    )
    parser.add_argument("--gpu", metavar="KIND", help="as cluster.gpu, such as h100-80g")
    parser.add_argument("--model-config", metavar="FILE", help="config.json to read instead of model.path's")
    parser.add_argument("--top", type=positive, default=8, metavar="N", help="layouts shown (default 8)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    start_with(parser, lambda args: run(Options.from_args(args)), more="items")


def run(options: Options) -> int:
    """Plan, print, and return the exit code. UserError when a model or GPU is unknown."""
    quiet_libraries()
    from megasd.cluster.planner.fixes import refusal
    from megasd.cluster.planner.layouts import plan_layout, search
    from megasd.cluster.planner.report import plan_json, plan_text

    files, _ = split_items(options.items)
    job, source = read_planned_run(
        read_config(options.items),
        files,
        gpus=options.gpus,
        gpu=options.gpu,
        model_config=options.model_config,
    )
    own, found = plan_layout(job), search(job)
    if options.json:
        print(json.dumps(plan_json(own, found[: options.top], source), indent=2))
    else:
        print("\n".join(plan_text(own, found[: options.top], len(found), source)))
    if own.fits:
        return 0
    sys.stdout.flush()
    print(f"megasd: {refusal(own, labelled=True)}", file=sys.stderr, flush=True)
    return REFUSED


def read_planned_run(
    config: Config,
    files: Sequence[str],
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    model_config: str | None = None,
) -> tuple[PlannedRun, str]:
    """The run of a config as the planner sees it, and the config.json that was read.

    files: YAML files of the config; a model may lie next to them (`read_model`).
    gpus: number of GPUs that train. Engines on nodes of their own take further GPUs.
    """
    from megasd.cluster.planner.hardware import gpu_kind
    from megasd.cluster.planner.job import PlannedRun
    from megasd.cluster.planner.shapes import Model

    cluster = config.cluster
    kind = gpu_kind(gpu, "--gpu") if gpu else gpu_kind(cluster.gpu)
    hf, source = read_model(config.model.path, files, model_config)
    teacher, path = None, config.algorithm.teacher.model_path if config.algorithm.teacher else None
    if path is not None:
        teacher = Model.of(read_model(path, files, None, "algorithm.teacher.model_path")[0])
    count = gpus or cluster.actor_nodes * cluster.gpus_per_node
    # a part of one node
    if count < cluster.gpus_per_node:
        config = replace(config, cluster=replace(cluster, gpus_per_node=count))
    return (
        PlannedRun(config, Model.of(hf), kind, count, cluster.engine_nodes * cluster.gpus_per_node, teacher),
        source,
    )


def read_model(
    path: str, files: Sequence[str], given: str | None, key: str = "model.path"
) -> tuple[dict[str, Any], str]:
    """Read the config.json of a model; return it and its path.

    given: path of a config.json to read instead. Otherwise `path` is read if it is a file, then
    config.json in the directory `path`. A laptop need not have the model: then NAME.json is looked
    for, where NAME is the last part of `path`, in a folder `model` next to the folder of one of the
    YAML `files`, and in configs/model of this checkout.

    UserError, which names `key`, when there is no such file, or when it holds no JSON object.
    """
    name = Path(path).name if path.endswith(".json") else f"{Path(path).name}.json"
    if given:
        places = [Path(given)]
    else:
        folders = [folder for file in files for folder in Path(file).resolve().parents[:2]]
        places = [Path(path), Path(path) / "config.json"]
        places += [folder / "model" / name for folder in folders]
        places.append(MODELS / name)
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise UserError(
            f"{key}={path}: no config.json there and no {name} in {places[-1].parent}; give one with"
            " --model-config FILE"
        )
    try:
        hf = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {place} cannot be read as JSON: {error}") from error
    if not isinstance(hf, dict):
        raise UserError(f"{key}: {place} must hold a JSON object")
    return hf, str(place)
