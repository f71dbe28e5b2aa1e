"""Prepare a sweep over task coverage: the same run on 1, 8, 64 ... questions.

Kim et al. (arXiv 2603.24472) take |D| in {1, 8, 64, 128, 512}.

The subsets are nested: all sizes take the first questions of the same order, drawn from the seed.
The questions are written as rows of the common form, after any data mapping. Each size has an
overlay, a config file that changes only the keys that depend on the size:

    megasd train CONFIG.yaml OUT/coverage-8.yaml

A subset smaller than a batch shrinks the batch: rollout.num_prompts becomes the size (a batch holds
a question once). Steps stay, so a small size also sees fewer samples. UNSURE how the paper fills
batches of 64 when |D| is 1 or 8.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasd.config.schema import Config, ConfigError, samples_per_step
from megasd.config.validate_parallel import data_parallel_size, default_world_size
from megasd.types import Prompt, UserError

SIZES = (1, 8, 64, 128, 512)


def parse_sizes(text: str) -> list[int]:
    """ "1,8,64" -> [1, 8, 64], ascending. UserError unless they are different and positive."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(
        {int(part) for part in parts}
    ) < len(parts):
        raise UserError(
            f"--sizes {text}: give different positive integers, as in {','.join(map(str, SIZES))}"
        )
    return sorted(int(part) for part in parts)


def nested(
    prompts: Sequence[Prompt], sizes: Sequence[int], *, seed: int, source: str
) -> dict[int, list[Prompt]]:
    """Size -> the questions of that size; each subset is the beginning of the next subset.

    UserError if `source` has fewer rows than a size.
    """
    if max(sizes) > len(prompts):
        raise UserError(
            f"--sizes: {max(sizes)} is more than the {len(prompts)} rows of {source}; drop that size or add"
            " rows"
        )
    order = list(prompts)
    random.Random(f"coverage/{seed}").shuffle(order)
    return {size: order[:size] for size in sizes}


def coverage_row(prompt: Prompt) -> str:
    """A prompt as a JSON line, from which data.mapping=auto reads an equal prompt."""
    values: dict[str, Any] = {"id": prompt.id, "prompt": prompt.messages, "answer": prompt.answer}
    values |= {
        name: value
        for name in ("solution", "pass_rate", "rubric")
        if (value := getattr(prompt, name)) is not None
    }
    return json.dumps(values, ensure_ascii=False)


def overlay(
    config: Config, size: int, *, data: Path, run_dir: Path, row_bytes: int
) -> dict[str, dict[str, Any]]:
    """The config keys that a size changes.

    They are the training rows and the run directory. If the batch shrinks, the keys that divide
    the batch change too. `row_bytes`: bytes of the longest row written. ConfigError if the smaller
    batch cannot be divided among the ranks.
    """
    data_keys: dict[str, Any] = {"train": str(data)}
    if config.data.mapping != "auto":
        data_keys |= {"mapping": "auto", "eval_mapping": config.data.eval_mapping or config.data.mapping}
    if row_bytes > config.data.max_row_bytes:
        data_keys["max_row_bytes"] = row_bytes
    tree: dict[str, dict[str, Any]] = {"data": data_keys, "run": {"dir": str(run_dir)}}
    if size >= config.rollout.num_prompts:
        return tree
    tree["rollout"] = {"num_prompts": size}
    if config.algorithm.minibatches > size:
        tree["algorithm"] = {"minibatches": size}
    samples = samples_per_step(config) // config.rollout.num_prompts * size
    ranks = data_parallel_size(config, default_world_size(config))
    if samples % ranks:
        raise ConfigError(
            f"--sizes: {size} questions make {samples} samples a step, which {ranks} data-parallel ranks"
            " cannot share; drop that size, or lower run.num_processes"
        )
    micro = config.actor.micro_batch_size
    if samples // ranks % micro:
        tree["actor"] = {"micro_batch_size": max(n for n in range(1, micro + 1) if samples // ranks % n == 0)}
    return tree
