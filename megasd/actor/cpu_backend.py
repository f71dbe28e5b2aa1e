"""All that lets megatron-core 0.16 run without CUDA (gloo, CPU tensors). Nothing here acts when a
GPU is visible.

Megatron writes "cuda" and torch.cuda.* where it means "the device". On a build of torch without
CUDA each function replaced here raises, so nothing that worked changes. Literals are swapped in the
named functions' code objects, and a missing literal raises: a changed Megatron is noticed at start,
not in the numbers. Line numbers are of 0.16.1.

Settings that are silently wrong on gloo are set in model.py: batch_p2p_comm=True and
deallocate_pipeline_outputs=True send buffers that are freed or reordered in flight (wrong loss,
exit status 0).
"""

from __future__ import annotations

import contextlib
import importlib
import time
import types
from collections.abc import Iterator

import torch

SUPPORTED = "0.16."
_DEVICE = {"cuda": "cpu"}
_TYPES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}

# (module, function, literals): device="cuda" of small helper tensors, and type names compared with
# tensor.type().
_LITERALS: list[tuple[str, str, dict[str, str]]] = [
    # :596 token counter
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining", _DEVICE),
    # :2138
    ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving", _DEVICE),
    # :983
    ("pipeline_parallel.schedules", "forward_backward_pipelining_with_interleaving", _DEVICE),
    # :35
    ("transformer.utils", "get_default_causal_mask", _DEVICE),
    # :40
    ("transformer.utils", "get_sliding_window_causal_mask", _DEVICE),
    # :1207
    ("utils", "local_multi_tensor_l2_norm", _DEVICE),
    # :103
    ("optimizer.clip_grads", "get_grad_norm_fp32", _DEVICE),
    # :167, :174
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", {**_DEVICE, **_TYPES}),
    ("optimizer.clip_grads", "count_zeros_fp32", _DEVICE),
    # :481, :485
    ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__", _DEVICE),
    # :907
    ("optimizer.optimizer", "FP32Optimizer.__init__", _DEVICE),
    # :671, :690
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__", _TYPES),
    # :582
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__", _TYPES),
    # :361, :420
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups", _TYPES),
    # fully parallel load
    ("dist_checkpointing.exchange_utils", "_get_empty_tensor_for_exchange", _DEVICE),
]

_installed = False


def install_cpu_backend() -> bool:
    """Patch megatron-core for CPU, once. Returns False, untouched, where CUDA is available.

    Raises RuntimeError when megatron-core is of another version or a patched literal is gone.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    import megatron.core

    if not megatron.core.__version__.startswith(SUPPORTED):
        raise RuntimeError(
            f"megatron-core {megatron.core.__version__}: actor/cpu_backend.py was written for {SUPPORTED}x;"
            " review it"
        )
    _patch_torch_cuda()
    for module, function, table in _LITERALS:
        _swap_literals(f"megatron.core.{module}", function, table)
    _patch_rng()
    _patch_rope()
    _patch_moe()
    _installed = True
    return True


def _swap_literals(module: str, qualified_name: str, table: dict[str, str]) -> None:
    """Replace string constants of one function, nested functions and default tuples included."""
    found: object = importlib.import_module(module)
    for part in qualified_name.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    function = getattr(found, "__func__", found)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    hits = 0

    def swap(constant: object) -> object:
        nonlocal hits
        if isinstance(constant, str) and constant in table:
            hits += 1
            return table[constant]
        if isinstance(constant, tuple):
            return tuple(swap(c) for c in constant)
        if isinstance(constant, types.CodeType):
            return constant.replace(co_consts=tuple(swap(c) for c in constant.co_consts))
        return constant

    function.__code__ = swap(function.__code__)
    if not hits:
        raise RuntimeError(
            f"{module}.{qualified_name} holds none of {sorted(table)}: megatron-core changed, review"
            " actor/cpu_backend.py"
        )


class _NullEvent:
    """torch.cuda.Event on a CPU: wall-clock times, nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.time = 0.0

    def record(self, *args: object) -> None:
        self.time = time.perf_counter()

    def wait(self, *args: object) -> None:
        pass

    synchronize = wait

    def elapsed_time(self, other: _NullEvent) -> float:
        return (other.time - self.time) * 1e3


class _NullStream:
    """torch.cuda.Stream on a CPU: everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, *args: object) -> None:
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, *args: object) -> _NullEvent:
        return _NullEvent()


def _patch_torch_cuda() -> None:
    cuda = torch.cuda
    # device=torch.cuda.current_device() all over Megatron
    cuda.current_device = lambda: torch.device("cpu")
    # tensor_parallel/random.py seeds the default stream
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # p2p_communication.py:242, variable sequence lengths
    cuda.synchronize = lambda *args, **kwargs: None
    # MoE token dispatcher
    cuda.Stream, cuda.Event = _NullStream, _NullEvent
    cuda.current_stream = cuda.default_stream = lambda *args: _NullStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # language_module.py:244, tied embeddings over PP
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _patch_rng() -> None:
    """The tensor-parallel RNG tracker on the CPU generator (tensor_parallel/random.py:235)."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG seed {seed} or name {name} was already added")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    # looked up by initialize_rng_tracker()
    random.CudaRNGStatesTracker = CpuRNGStatesTracker


def _patch_rope() -> None:
    """Context-parallel rotary tables without pinned memory (rope_utils.py:62)."""
    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.models.common.embeddings.rotary_pos_embedding as rotary

    def get_pos_emb_on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: object) -> torch.Tensor:
        size, rank = cp_group.size(), cp_group.rank()
        chunks = pos_emb.chunk(2 * size, dim=seq_dim)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=seq_dim)

    rope_utils.get_pos_emb_on_this_cp_rank = rotary.get_pos_emb_on_this_cp_rank = get_pos_emb_on_this_cp_rank


def _patch_moe() -> None:
    """The router's missing TransformerEngine name (moe_utils.py:1192) and split sizes as numpy (:1093)."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def maybe_move_tensor_to_cpu(
        tensor: object, as_numpy: bool = False, record_stream: bool = False
    ) -> object:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
