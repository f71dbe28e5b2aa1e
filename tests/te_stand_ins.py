"""Stand-ins for TransformerEngine's modules on a CPU: the same parameter names and places in
Megatron's layer spec, torch arithmetic.

    with transformer_engine_spec():
        # layer_spec.py's GPU branch, names such as mlp.linear_fc1.layer_norm_weight
        model = build_model(...)

They show that the GPU spec is put together rightly and that its names are loaded and exported; they
show nothing of TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megasd.actor import layer_spec
from megasd.actor import model as build
from megasd.actor.cpu_layers import RMSNorm, SDPAttention


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm, then the linear layer; the norm's weight is a parameter of this module."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), *args, **kwargs)


class GroupedMLP(SequentialMLP):
    """Experts whose parameters are called linear_fc1.weight0, linear_fc1.weight1, ... as in TEGroupedMLP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        experts = list(self.local_experts)
        del self.local_experts
        # not a child module any more
        object.__setattr__(self, "local_experts", experts)
        for name in ("linear_fc1", "linear_fc2"):
            grouped = torch.nn.Module()
            for i, expert in enumerate(experts):
                grouped.register_parameter(f"weight{i}", getattr(expert, name).weight)
            self.add_module(name, grouped)


class Provider(LocalSpecProvider):
    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SDPAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return GroupedMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


@contextmanager
def transformer_engine_spec() -> Iterator[None]:
    """build_model takes the GPU branch of layer_spec.py, with these modules in TransformerEngine's place."""
    modules = {"norm": RMSNorm, "column": ColumnParallelLinear, "row": RowParallelLinear}

    def block_spec(family: Any, config: Any, gpu: bool, vp_stage: int | None = None) -> Any:
        return layer_spec.block_spec(family, config, True, vp_stage)

    with (
        patch.object(gpt_layer_specs, "TESpecProvider", Provider, create=True),
        patch.object(layer_spec, "_te", partial(dict, modules)),
        patch.object(build, "block_spec", block_spec),
    ):
        yield
