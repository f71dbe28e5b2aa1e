"""The Hugging Face directory of a model that a command is given."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megasd.types import UserError, is_url


@contextlib.contextmanager
def model_directory(source: str, model: str | None, *, convert: bool = True) -> Iterator[Path | None]:
    """Yield the Hugging Face directory of a SOURCE of the command line.

    That is the directory itself, or `model` for a URL, or a conversion of a Megatron checkpoint that
    is deleted at the end. convert=False: check the arguments only, and yield None.
    """
    if is_url(source):
        if model is None:
            raise UserError(
                f"{source}: give --model DIR, the Hugging Face directory whose model it serves (for the"
                " tokenizer)"
            )
        yield Path(model) if convert else None
        return
    if model is not None:
        raise UserError("--model belongs to an engine URL; a directory brings its own tokenizer")
    from megasd.convert.direction import direction_of

    path = Path(source)
    megatron = direction_of(path) == "hf"
    if not convert or not megatron:
        yield path if convert else None
        return
    from megasd.convert.common import ConversionOptions, ConversionProgress
    from megasd.convert.megatron_to_hf import to_hf

    with tempfile.TemporaryDirectory(prefix="megasd-eval-", dir=os.environ.get("TMPDIR")) as folder:
        target = Path(folder) / "hf"
        to_hf(path, target, ConversionOptions(), ConversionProgress())
        yield target
