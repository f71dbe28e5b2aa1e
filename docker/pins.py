"""Print the requirements of an image's environment: python pins.py trainer|engine

They are read from pyproject.toml, where every version is pinned.
"""

import sys
import tomllib
from pathlib import Path


def pins(kind: str, project: dict) -> list[str]:
    """The requirements of one kind of environment.

    trainer: those of megasd and of its launcher. engine: SGLang, and what `megasd serve` needs to
    read a config.
    """
    extras = project["optional-dependencies"]
    if kind == "trainer":
        return project["dependencies"] + extras["launch"]
    return extras["sglang"] + [pin for pin in project["dependencies"] if pin.startswith("omegaconf")]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1], tomllib.loads(Path("pyproject.toml").read_text())["project"])))
