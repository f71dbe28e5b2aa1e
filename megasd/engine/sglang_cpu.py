"""The real SGLang server on a machine without CUDA.

    python -m megasd.engine.sglang_cpu --model-path DIR --device cpu ...

SGLang's wheel imports two packages that have no CPU build, for features that a text model on a CPU
never calls. This file puts an empty stand-in in the place of each, leaves out imports that only
cost start-up time, and runs SGLang's own server. In its decode attention one batched call replaces
the loop over sequences (sglang_cpu_attention.py). A GPU machine never imports this file.

SGLang starts its scheduler and detokenizer by "spawn"; here they are forked. There is no CUDA
context to protect, no thread runs yet, and forking saves two further imports of everything (12 s of
CPU and 0.5 GB each). The forked processes also have the stand-ins.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megasd.engine.auth import protect

# Without it SGLang takes the vLLM path for rotary embeddings ("No module named 'vllm'").
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# Small decode steps are 3 to 70 times slower with threads when a trainer shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def stand_in_for_sgl_kernel() -> None:
    """An empty module in the place of SGLang's compiled kernels, which have a CUDA wheel only.

    SGLang's CPU modules import speculative-decoding helpers from it by name; calling one is an error.
    """
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel")

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

        return call

    vars(module)["__getattr__"] = missing
    sys.modules["sgl_kernel"] = module


def stand_in_for_torchvision() -> None:
    """Put empty modules in the place of torchvision, which SGLang's image models import.

    PyPI's wheel is linked against CUDA and breaks a CPU torch. transformers must believe that
    torchvision is absent. It caches its answer, so it is asked before the stand-in appears.
    """
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    modes = types.SimpleNamespace(
        NEAREST="nearest", BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos"
    )
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(module)["InterpolationMode"] = modes
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[leaf] = module


def leave_out_megatron() -> None:
    """Hide Megatron-core from SGLang's tensor dumper, a debugging aid.

    The dumper would import it, which takes 1.5 s in each of three processes.
    """
    # None makes the import raise ImportError, which the dumper expects.
    modules: dict[str, Any] = sys.modules
    modules["megatron.core"] = None


def leave_out_other_models(model_path: Path) -> None:
    """Have SGLang import one of its 200 model files, where all of them take a third of the start.

    The file is that with the name of config.json's model_type. Without such a file every model is
    imported.
    """
    model_type = json.loads((model_path / "config.json").read_text())["model_type"]
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ImportError("sglang is not installed in this environment")
    models = Path(spec.origin).parent / "srt" / "models"
    names = {path.stem for path in models.glob("*.py")}
    if model_type in names:
        os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(names - {model_type})))


# SGLang's children inherit the environment.
if "--model-path" in sys.argv:
    leave_out_other_models(Path(sys.argv[sys.argv.index("--model-path") + 1]))
leave_out_megatron()
stand_in_for_sgl_kernel()
stand_in_for_torchvision()
importlib.import_module("megasd.engine.sglang_cpu_attention")


def fork_instead_of_spawn() -> None:
    """Fork child processes; later calls of set_start_method, such as SGLang's, change nothing."""
    multiprocessing.set_start_method("fork")
    vars(multiprocessing)["set_start_method"] = lambda method, force=False: None


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
