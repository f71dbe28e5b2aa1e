"""Microbatches of one shape, for actor.cuda_graph and actor.tp_comm_overlap.

CUDA graphs and TransformerEngine's user buffers are made for one shape of microbatch.

b rows, s tokens of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.transformer_config import TransformerConfig

from megasd.actor.parallel import Mesh
from megasd.batch.microbatch import Microbatch
from megasd.config.schema import ActorConfig, Config
from megasd.config.validate_actor import has_fixed_shape, sequence_multiple
from megasd.types import UserError


def fix_shapes(
    microbatches: list[Microbatch], actor: ActorConfig, length: int, *, is_student: bool
) -> list[Microbatch]:
    """Padded microbatches with actor.micro_batch_size rows each, if the config needs one shape.

    Otherwise the microbatches stay as they are. The teacher runs outside CUDA graphs, so its
    microbatches need one shape for actor.tp_comm_overlap only. length: tokens to which
    validate_actor.sequence_multiple padded. UserError for a sequence that is longer.
    """
    if not has_fixed_shape(actor) or (not is_student and not actor.tp_comm_overlap):
        return microbatches
    return [_fixed(one, actor, length) for one in microbatches]


def _fixed(microbatch: Microbatch, actor: ActorConfig, length: int) -> Microbatch:
    """The microbatch with filler rows of zeros up to actor.micro_batch_size."""
    if microbatch.max_seqlen != length:
        key = "cuda_graph" if actor.cuda_graph else "tp_comm_overlap"
        raise UserError(
            f"actor.{key}: a sequence takes {microbatch.max_seqlen} tokens, more than the {length} of"
            " rollout.max_prompt_tokens + max_response_tokens to which all are padded; raise those, or set"
            f" actor.{key}=false"
        )
    rows, wanted = microbatch.tokens.size(0), actor.micro_batch_size
    return replace(
        microbatch,
        tokens=F.pad(microbatch.tokens, (0, 0, 0, wanted - rows)),
        position_ids=torch.cat(
            [microbatch.position_ids, microbatch.position_ids[:1].expand(wanted - rows, -1)]
        ),
        # Rows count along hidden [s, b], flattened: b has grown.
        rows=microbatch.rows // rows * wanted + microbatch.rows % rows,
    )


@contextmanager
def outside_graphs(model: torch.nn.Module) -> Iterator[None]:
    """Run the layers without CUDA graphs while the context lasts.

    A graph replays the student's weights at their addresses, in the one shape that was recorded.
    Megatron asks each layer whether to use its graph, and every layer says no here. The layer's
    manager of graphs stays, since it counts microbatches.
    """
    layers: list[Any] = [module for module in model.modules() if "cudagraph_manager" in module._modules]
    for layer in layers:
        layer._should_call_local_cudagraph = lambda *args, **kwargs: False
    try:
        yield
    finally:
        for layer in layers:
            del layer._should_call_local_cudagraph


# (tokens, hidden size) of the buffers of this process, once they are made
_user_buffers: tuple[int, ...] | None = None


def init_user_buffers(config: Config, model_config: TransformerConfig, mesh: Mesh) -> None:
    """Make TransformerEngine's buffers for actor.tp_comm_overlap, once a process.

    Call it before the model is built. UserError when this process has buffers for another shape.
    Collectives: TransformerEngine's own, over TP.
    """
    global _user_buffers
    actor = config.actor
    shape = (sequence_multiple(config) * actor.micro_batch_size // mesh.cp_size, model_config.hidden_size)
    if not actor.tp_comm_overlap or _user_buffers == shape:
        return
    if _user_buffers is not None:
        raise UserError(
            f"actor.tp_comm_overlap: this process has buffers for {_user_buffers} already, and now needs"
            f" {shape}"
        )
    from transformer_engine.pytorch.module import base

    modes = [
        base.UserBufferQuantizationMode.FP8 if model_config.fp8 else base.UserBufferQuantizationMode.NONE
    ]
    if model_config.fp8 and model_config.first_last_layers_bf16:
        modes.append(base.UserBufferQuantizationMode.NONE)
    base.initialize_ub(
        shape=list(shape), tp_size=mesh.tp_size, quantization_modes=modes, bootstrap_backend="nccl"
    )
    _user_buffers = shape
