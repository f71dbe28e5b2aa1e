"""Scored groups on disk: the record of what a run trained on, and the way to replay it.

There is one file a step, with one JSON object a sample.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from megasd.types import Group, Prompt, Sample, UserError, Verdict


def rollout_path(directory: str | Path, step: int) -> Path:
    """The file of a step."""
    return Path(directory) / f"step-{step:06d}.jsonl"


def save_groups(path: Path, groups: list[Group]) -> None:
    """Write the groups of a step. The file gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    with writing.open("w", encoding="utf-8") as file:
        for group in groups:
            for sample in group.samples:
                row = {"prompt": asdict(group.prompt), **asdict(sample), "reward": sample.reward}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(writing, path)


def load_groups(path: Path) -> list[Group]:
    """The groups of a step, as `save_groups` wrote them.

    UserError names the file that is missing, or the line that is broken.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such rollout file; rollout.replay_dir must be the run.dir of a run with at least"
            " this many steps"
        )
    groups: dict[str, Group] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            prompt, verdict = Prompt(**row.pop("prompt")), Verdict(row.pop("verdict"))
            row.pop("reward")
            groups.setdefault(prompt.id, Group(prompt)).samples.append(Sample(**row, verdict=verdict))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: not a rollout row ({error}); replay a file that a run wrote"
            ) from error
    return list(groups.values())
