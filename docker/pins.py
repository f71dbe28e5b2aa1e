"""The requirements of an image's environment, read from pyproject.toml, where every version is
pinned:  python pins.py trainer|engine
"""

import sys
import tomllib
from pathlib import Path


def pins(kind: str, project: dict) -> list[str]:
    """trainer: megasd's own and those of its launcher; engine: SGLang, and what `megasd serve`
    reads a config with.
    """
    extras = project["optional-dependencies"]
    if kind == "trainer":
        return project["dependencies"] + extras["launch"]
    return extras["sglang"] + [pin for pin in project["dependencies"] if pin.startswith("omegaconf")]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1], tomllib.loads(Path("pyproject.toml").read_text())["project"])))
