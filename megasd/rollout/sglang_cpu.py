"""The real SGLang server on a machine without CUDA:  python -m megasd.rollout.sglang_cpu --model-path DIR --device cpu ...

Nothing of SGLang is replaced or patched. Its wheel imports two packages that have no CPU build, for features that a text model on a CPU
never calls; this file puts an empty stand-in in the place of each, and then calls SGLang's own server. A GPU machine never imports it.

The module body runs again in every process that SGLang spawns: multiprocessing "spawn" imports the parent's main module first. That is
how the stand-ins reach the scheduler and the detokenizer too.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types

# Without it SGLang takes the vLLM path for rotary embeddings ("No module named 'vllm'").
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# Tiny decode steps lose 3-70 x to thread hand-over when the machine is shared with a trainer.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def stand_in_for_sgl_kernel() -> None:
    """SGLang's compiled kernels (CUDA wheel only). Its CPU modules import speculative-decoding helpers by name; calling one is an error."""
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel")

    def missing(name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

        return call

    module.__getattr__ = missing
    sys.modules["sgl_kernel"] = module


def stand_in_for_torchvision() -> None:
    """Image transforms, imported by SGLang's table of image models. PyPI's wheel is linked against CUDA and breaks a CPU torch.

    transformers must go on believing that torchvision is absent, so its cached answer is taken before the stand-in appears.
    """
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.InterpolationMode = types.SimpleNamespace(NEAREST="nearest", BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos")
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]


stand_in_for_sgl_kernel()
stand_in_for_torchvision()


def main(argv: list[str]) -> None:
    """Serve until killed; `argv` is what sglang.launch_server takes."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(argv))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
