"""Tests that are collected only where a CUDA device is.

test_golden_gpu.py needs the `te` extra too; most other files need torch and triton alone.
"""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
