"""Collected wherever a CUDA device is; needs the `te` extra beside the core."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
