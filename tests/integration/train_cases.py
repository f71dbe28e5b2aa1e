"""Several `megasd train` one after the other in the processes that torchrun started; run by test_train.py.

train_cases.py '[["run.yaml", "run.steps=7"], ["run.yaml", "run.steps=20", "run.resume=auto"]]'
"""

from __future__ import annotations

import json
import sys

from megasd import cli

# Megatron's checkpoint writer is spawned, and imports this file again
if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        assert cli.main(["train", *arguments]) == 0, arguments
