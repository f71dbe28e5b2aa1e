"""Patches that let megatron-core 0.16 run without CUDA, on gloo and CPU tensors.

Nothing here acts when a GPU is visible. Megatron writes "cuda" and torch.cuda.* where it means "the
device". On a build of torch without CUDA each function that is replaced here raises, so nothing
that worked changes. Literals are swapped in the code objects of named functions, and a missing
literal raises: a changed Megatron is noticed at start, not in the numbers. Line numbers are those
of 0.16.1.

model.py turns off two settings that give wrong numbers on gloo without an error:
batch_p2p_comm=True and deallocate_pipeline_outputs=True free or reorder send buffers in flight.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

SUPPORTED = "0.16."
_DEVICE = {"cuda": "cpu"}
_TYPES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}

# (module, function, literals). Literals are the device of small helper tensors, and type names that
# are compared with tensor.type(). Comments give their lines in megatron-core 0.16.1.
_LITERALS: list[tuple[str, str, dict[str, str]]] = [
    # :596, the token counter
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
    # a fully parallel load of a checkpoint
    ("dist_checkpointing.exchange_utils", "_get_empty_tensor_for_exchange", _DEVICE),
]

_installed = False


def install_cpu_backend() -> bool:
    """Patch megatron-core for the CPU, once; False where CUDA is available and nothing is patched.

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
    """Replace string constants of one function, in nested functions and tuples too.

    Raises RuntimeError when the function holds none of them.
    """
    found: Any = importlib.import_module(module)
    for part in qualified_name.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    function = getattr(found, "__func__", found)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    swapped = _swapped(function.__code__, table)
    if swapped == function.__code__:
        raise RuntimeError(
            f"{module}.{qualified_name} holds none of {sorted(table)}: megatron-core changed, review"
            " actor/cpu_backend.py"
        )
    function.__code__ = swapped


def _swapped(constant: Any, table: dict[str, str]) -> Any:
    """A constant of a code object with the strings of `table` replaced in it."""
    if isinstance(constant, str):
        return table.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_swapped(one, table) for one in constant)
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=_swapped(constant.co_consts, table))
    return constant


class _NullEvent:
    """torch.cuda.Event on a CPU: it takes wall-clock times, and nobody waits for it."""

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
    """torch.cuda.Stream on a CPU, where everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, *args: object) -> None:
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, *args: object) -> _NullEvent:
        return _NullEvent()


def _patch_torch_cuda() -> None:
    """Replace torch's functions for the current device, its random state and its streams."""
    cuda: Any = torch.cuda
    # Megatron writes device=torch.cuda.current_device() in many places.
    cuda.current_device = lambda: torch.device("cpu")
    # tensor_parallel/random.py seeds the default stream.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # p2p_communication.py:242 waits after an exchange of sequence lengths.
    cuda.synchronize = lambda *args, **kwargs: None
    # The token dispatcher of mixtures of experts has a stream of its own.
    cuda.Stream, cuda.Event = _NullStream, _NullEvent
    cuda.current_stream = cuda.default_stream = lambda *args: _NullStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # language_module.py:244 moves tied embeddings under pipeline parallelism.
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self


def _patch_rng() -> None:
    """Put the tensor-parallel RNG tracker on the CPU's generator.

    Source: tensor_parallel/random.py:235.
    """
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        """Megatron's tracker with the CPU's generator for that of a GPU."""

        def add(self, name: str, seed: int) -> None:
            """Make a named state from a seed; ValueError for a seed or a name that is taken."""
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG seed {seed} or name {name} was already added")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            """Draw from the named state while the context lasts."""
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    # initialize_rng_tracker() looks the class up by this name.
    random.CudaRNGStatesTracker = CpuRNGStatesTracker


def _patch_rope() -> None:
    """Cut context-parallel rotary tables without pinned memory (rope_utils.py:62)."""
    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.models.common.embeddings.rotary_pos_embedding as rotary

    def get_pos_emb_on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
        size, rank = cp_group.size(), cp_group.rank()
        chunks = pos_emb.chunk(2 * size, dim=seq_dim)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=seq_dim)

    rope_utils.get_pos_emb_on_this_cp_rank = rotary.get_pos_emb_on_this_cp_rank = get_pos_emb_on_this_cp_rank


def _patch_moe() -> None:
    """Mend the router of mixtures of experts.

    moe_utils.py:1192 looks for a name of TransformerEngine, and :1093 wants split sizes as numpy.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def maybe_move_tensor_to_cpu(
        tensor: object, as_numpy: bool = False, record_stream: bool = False
    ) -> object:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
