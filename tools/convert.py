"""A checkpoint of a run -> a Hugging Face directory.

    python tools/convert.py runs/quickstart/checkpoints/step-30 exported
    torchrun --nproc-per-node 2 tools/convert.py runs/big/checkpoints/step-500 exported actor.tensor_model_parallel_size=2

The run's config.yaml is read beside the checkpoint; the layout may differ from the run's (key=value overrides), TP = PP = 1 by default.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megasd.algo.recipes import RECIPES
from megasd.config import load_config
from megasd.types import UserError

ONE_RANK = ("tensor_model_parallel_size=1", "pipeline_model_parallel_size=1", "context_parallel_size=1", "expert_model_parallel_size=1")


def convert(checkpoint: Path, out_dir: Path, overrides: list[str]) -> None:
    """Load the model of `checkpoint` on this layout's ranks and write it from rank 0."""
    run_config = checkpoint.parent.parent / "config.yaml"
    if not run_config.is_file():
        raise UserError(f"{run_config}: missing; give a checkpoint inside its run directory, <run.dir>/checkpoints/step-<n>")
    layout = [f"actor.{size}" for size in ONE_RANK] + ["actor.sequence_parallel=false"]
    config = load_config([str(run_config)], [*layout, *overrides], RECIPES)

    from megasd.actor import cpu
    from megasd.actor.parallel import init_distributed, init_model_parallel

    cpu.install()
    from megasd.actor.actor import Actor

    device = init_distributed()
    mesh = init_model_parallel(config.actor, device, config.run.seed)
    actor = Actor(config, mesh)
    actor.load(checkpoint)
    actor.export_hf(out_dir)
    if mesh.rank == 0:
        print(f"{out_dir}: weights of {checkpoint}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.out_dir, arguments.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
