"""How fast a step was: tokens per second, model FLOPs and their share of the GPU's peak.

Each rank of the actor counts as one GPU; on a machine without GPUs it is a process.

    speed/tokens_per_second          prompt and response tokens of the step's samples / seconds of
                                     the whole step, sampling, verifying,
                                     pushing, saving and evaluating included
    speed/tokens_per_second_per_gpu  that / ranks
    speed/model_tflops_per_gpu       model FLOPs / (seconds of teaching and training x ranks) / 10^12
    speed/mfu                        speed/model_tflops_per_gpu / the GPU's dense peak: FP8's where
                                     actor.fp8 is set, bfloat16's otherwise
    speed/hfu                        the same, with the forwards that the backward repeats; only
                                     where actor.recompute_granularity is set

Model FLOPs of a step (models/flops.py: matrix products and causal attention, n tokens a sequence of which
r are its response):

    student    3 x (layers(n) + output(r))     forward, and a backward of twice that, in every
               update of the batch
    teacher        (layers(n') + output(r))    forward alone, n' tokens with the teacher's prompt;
                   for each context and pass of the teacher

over the samples that need a forward. Padding is not counted as work, so padding lowers the MFU. So
do the optimizer, waiting, and the additional forwards of some methods (log-probabilities before the
first of several updates). The seconds are rank 0's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from megasd.cluster.planner.hardware import GPU_KINDS
from megasd.config.schema import ActorConfig

# The driver's name of a GPU -> a row of cluster/planner/hardware.py with the same peak. (An H100 PCIe
# has another peak than the H100 of that table.)
DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200-141g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA B200": "b200-180g",
}


def speed(metrics: Mapping[str, float], seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    """The metrics at the head of this file, as far as `metrics` has what they need.

    metrics: the step's, with train/* and seconds/*. seconds: of the whole step. peak: dense peak of a
    GPU in FLOP/s, None if it is not known.
    """
    found = {}
    if "train/batch_tokens" in metrics:
        found["speed/tokens_per_second"] = metrics["train/batch_tokens"] / seconds
        found["speed/tokens_per_second_per_gpu"] = found["speed/tokens_per_second"] / ranks
    learning = metrics.get("seconds/teach", 0.0) + metrics.get("seconds/train", 0.0)
    if "train/student_tflops" not in metrics or learning <= 0:
        return found
    tflops = (metrics["train/student_tflops"] + metrics.get("train/teacher_tflops", 0.0)) / learning / ranks
    found["speed/model_tflops_per_gpu"] = tflops
    if peak is not None:
        found["speed/mfu"] = tflops * 1e12 / peak
        if "train/recompute_tflops" in metrics:
            found["speed/hfu"] = (
                found["speed/mfu"] + metrics["train/recompute_tflops"] * 1e12 / learning / ranks / peak
            )
    return found


def peak_of(actor: ActorConfig) -> float | None:
    """Dense peak of this machine's GPU (FLOP/s) in the number format of the layers' products.

    None without a GPU, for a GPU that is not in the table, and for float32.
    """
    name = _device_name()
    if name not in DEVICE_NAMES or actor.dtype == "float32":
        return None
    kind = GPU_KINDS[DEVICE_NAMES[name]]
    return kind.bf16 if actor.fp8 is None else kind.fp8


@cache
def _device_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
