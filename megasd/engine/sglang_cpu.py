"""The real SGLang server on a machine without CUDA:  python -m megasd.engine.sglang_cpu
--model-path DIR --device cpu ...

SGLang's wheel imports two packages that have no CPU build, for features that a text model on a CPU
never calls; this file puts an empty stand-in in the place of each, leaves out imports that only
cost start-up time, and calls SGLang's own server, whose loop over sequences in decode attention
gives way to one batched call (sglang_cpu_attention.py). A GPU machine never imports it.

SGLang's scheduler and detokenizer are forked from this process, where SGLang asks for "spawn":
there is no CUDA context to protect, no thread runs yet, and forking saves two further imports of
everything (12 s of CPU and 0.5 GB each). It also hands them the stand-ins.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import sys
import types
from pathlib import Path

from megasd.engine.auth import protect

# Without it SGLang takes the vLLM path for rotary embeddings ("No module named 'vllm'").
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# Tiny decode steps lose 3-70 x to thread hand-over when the machine is shared with a trainer.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def stand_in_for_sgl_kernel() -> None:
    """SGLang's compiled kernels (CUDA wheel only). Its CPU modules import speculative-decoding
    helpers by name; calling one is an error.
    """
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
    """Image transforms, imported by SGLang's table of image models. PyPI's wheel is linked against
    CUDA and breaks a CPU torch.

    transformers must go on believing that torchvision is absent, so its cached answer is taken
    before the stand-in appears.
    """
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.InterpolationMode = types.SimpleNamespace(
            NEAREST="nearest", BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos"
        )
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]


def leave_out_megatron() -> None:
    """SGLang's tensor dumper imports Megatron-core when it finds it: 1.5 s in each of three
    processes, for a debugging aid.
    """
    # makes the import raise ImportError, which the dumper expects
    sys.modules["megatron.core"] = None


def leave_out_other_models(model_path: Path) -> None:
    """SGLang imports every one of its 200 model files in each process (a third of the start) unless
    they are disabled by name.

    Keeps the file named after config.json's model_type (what it imports comes with it); without
    such a file every model stays.
    """
    model_type = json.loads((model_path / "config.json").read_text())["model_type"]
    models = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
    names = {path.stem for path in models.glob("*.py")}
    if model_type in names:
        os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(names - {model_type})))


# SGLang's children inherit the environment
if "--model-path" in sys.argv:
    leave_out_other_models(Path(sys.argv[sys.argv.index("--model-path") + 1]))
leave_out_megatron()
stand_in_for_sgl_kernel()
stand_in_for_torchvision()
importlib.import_module("megasd.engine.sglang_cpu_attention")


def fork_instead_of_spawn() -> None:
    """The start method of SGLang's child processes; later calls, as SGLang's own, change nothing."""
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda method, force=False: None


def main(argv: list[str]) -> None:
    """Serve until killed; `argv` is what sglang.launch_server takes."""
    fork_instead_of_spawn()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(argv)
    protect(server_args)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
