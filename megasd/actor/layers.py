"""Modules that some families need and Megatron does not have.

They are rotary tables by layer, norms after a linear layer, and q/k norms over all heads. They are
the same on CPU and GPU; layer_spec.py puts them into Megatron's layer specs. megatron-core 0.16.1.

Shapes: s sequence (local), b batch, h heads (local), d head size, n rotary tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megasd.models.param_table import Rope
from megasd.types import UserError


def mark(parameter: torch.nn.Parameter, **attributes: object) -> None:
    """Set the attributes by which Megatron tells parameters apart."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


class RotaryTables(RotaryEmbedding):
    """Megatron's rotary embedding with given inverse frequencies.

    It gives the angles [s, 1, n, d] of n tables. Each layer takes one table.
    """

    def __init__(self, ropes: tuple[Rope, ...], config: TransformerConfig) -> None:
        super().__init__(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
        # [n, d / 2], float32
        self.inv_freq = torch.tensor([rope.inverse_frequencies for rope in ropes])

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of the positions from `offset` on, float32 [s, 1, n, d]."""
        # The first forward moves the frequencies to the device, as upstream does.
        self.inv_freq = self.inv_freq.to(torch.cuda.current_device())
        positions = torch.arange(
            offset, offset + max_seq_len, dtype=torch.float32, device=self.inv_freq.device
        )
        angles = positions[:, None, None] * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None]


class TableAttention(SelfAttention):
    """Self-attention with one of several rotary tables and with the attention factor of that table.

    The factor multiplies cosines and sines of queries and of keys, hence scores by its square. Here
    softmax_scale carries the square.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *args: Any,
        table: int,
        attention_factor: float,
        **kwargs: Any,
    ) -> None:
        scale, core = attention_factor**2 / config.kv_channels**0.5, submodules.core_attention

        def scaled_core(**given: Any) -> torch.nn.Module:
            return core(**(given | {"softmax_scale": scale}))

        fields = vars(submodules) | {"core_attention": scaled_core}
        super().__init__(config, SelfAttentionSubmodules(**fields), *args, **kwargs)
        self.table = table

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """SelfAttention's forward with this layer's table out of [s, 1, n, d]."""
        return super().forward(
            *args, rotary_pos_emb=rotary_pos_emb[:, :, self.table : self.table + 1].contiguous(), **kwargs
        )


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) of a value and of its gradient.

    The gradient is summed too, because the loss of every rank depends on the terms of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class AllHeadsRMSNorm(torch.nn.Module):
    """RMS norm of queries (or keys) [s, b, h, d] over the heads of all tensor-parallel ranks.

    Each rank holds the weight of its own heads, with the whole gradient of it. Nothing may sum that
    gradient over TP, hence config.qk_layernorm stays False. The weight is marked as
    tensor-parallel, so that the gradient norm counts the part of every rank. Collectives: one
    all-reduce of [s, b] over TP forward, one backward.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int) -> None:
        """hidden_size: of one head; num_heads: over all ranks.

        UserError when the heads do not divide over the ranks.
        """
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        if num_heads % self.group.size():
            raise UserError(
                f"actor.tensor_model_parallel_size={self.group.size()}: the norm over all {num_heads} query"
                " or key heads of this model needs a divisor of that number"
            )
        self.eps, self.width = eps, num_heads * hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        local = self.width // self.group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype, device=device))
        mark(self.weight, tensor_model_parallel=True, partition_dim=0, partition_stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """The normed heads, in the dtype of x [s, b, h, d]."""
        values = x.float()
        squares = values.pow(2).sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        return (values * torch.rsqrt(squares / self.width + self.eps) * self.weight.view(x.shape[-2:])).to(
            x.dtype
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weight with its place in the whole weight, for Megatron's distributed checkpoints.

        Without it they would take one rank's part for the whole.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


@cache
def post_norm(linear: type, norm: Callable[..., torch.nn.Module]) -> type:
    """The class `linear` (row-parallel) with a norm after it, its child `post_layernorm`.

    The norm comes before the residual. Upstream does the same for Gemma and EXAONE
    (TERowParallelLinearLayerNorm of Megatron-Bridge).
    """

    class PostNormLinear(linear):
        def __init__(
            self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
        ) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return self.post_layernorm(output), bias

    return PostNormLinear
