"""The config of a command line: YAML files and key=value, in any order."""

from __future__ import annotations

from collections.abc import Sequence

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config, split_items
from megasd.config.schema import Config


def read_config(items: Sequence[str], own: Sequence[str] = ()) -> Config:
    """Load the config that `items` say, on top of the recipe's row. Raises ConfigError.

    own: overrides of the command itself, such as "run.dir=out". They win over the user's.
    """
    files, overrides = split_items(items)
    return load_config(files, [*overrides, *own], RECIPES)
