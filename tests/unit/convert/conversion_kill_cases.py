"""Run by test_conversion.py: converts in forked children that are killed at random points.
Arguments: SOURCE TARGET KILLS SEED.

Prints the kills that found a conversion at work and the files that were whole at each. torch is
imported once and computes nothing before the forks, so a child costs no import.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from megasd.convert.common import ConversionOptions
from megasd.convert.direction import direction_of
from megasd.convert.hf_to_megatron import to_megatron
from megasd.convert.megatron_to_hf import to_hf

FILE_BYTES = 6000


def start(source: Path, target: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            way = to_megatron if direction_of(source) == "megatron" else to_hf
            way(source, target, ConversionOptions(file_bytes=FILE_BYTES))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main(source: Path, target: Path, kills: int, seed: int) -> None:
    rng, whole = random.Random(seed), []
    begin = time.perf_counter()
    assert os.waitpid(start(source, target), 0)[1] == 0
    seconds = time.perf_counter() - begin
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(target)
    for _ in range(20 * kills):
        child = start(source, target)
        time.sleep(rng.uniform(0, seconds * 0.6))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        # it was faster
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            shutil.rmtree(target, ignore_errors=True)
            continue
        whole.append(len(list(partial.glob(".done/*.json"))))
        if len(whole) == kills:
            break
    assert os.waitpid(start(source, target), 0)[1] == 0
    print("kills", len(whole), "whole files", *whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
