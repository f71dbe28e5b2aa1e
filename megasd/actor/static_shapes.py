"""Microbatches of one shape, and passes outside the CUDA graphs that need it (actor.cuda_graph,
actor.tp_comm_overlap).

b rows, s tokens of this context-parallel rank, T response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    """The padded microbatches with actor.micro_batch_size rows each, where shapes are fixed; else
    as they are.

    length: what validate_actor.sequence_multiple padded to. The teacher's passes go outside the
    CUDA graphs, so theirs need no fixing then. UserError for a sequence that is longer.
    """
    if not has_fixed_shape(actor) or (not is_student and not actor.tp_comm_overlap):
        return microbatches
    return [_fixed(one, actor, length) for one in microbatches]


def _fixed(microbatch: Microbatch, actor: ActorConfig, length: int) -> Microbatch:
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
        # of hidden [s, b], flattened
        rows=microbatch.rows // rows * wanted + microbatch.rows % rows,
    )


@contextmanager
def outside_graphs(model: torch.nn.Module) -> Iterator[None]:
    """Run the layers as they are written: graphs replay the student's weights at their addresses,
    in the one shape that was recorded.

    Each layer's answer to Megatron's question is overridden; its manager of graphs, which keeps
    count of microbatches, stays.
    """
    layers = [module for module in model.modules() if "cudagraph_manager" in module._modules]
    for layer in layers:
        layer._should_call_local_cudagraph = lambda *args, **kwargs: False
    try:
        yield
    finally:
        for layer in layers:
            del layer._should_call_local_cudagraph


_user_buffers: tuple[int, ...] | None = None


def init_user_buffers(config: Config, model_config: TransformerConfig, mesh: Mesh) -> None:
    """TransformerEngine's buffers for actor.tp_comm_overlap, once a process, before the model is
    built. Collectives: its own, over TP.

    UserError when this process has buffers for another shape.
    """
    global _user_buffers
    actor = config.actor
    shape = (sequence_multiple(config) * actor.micro_batch_size // mesh.cp_size, model_config.hidden_size)
    if not actor.tp_comm_overlap or _user_buffers == shape:
        return
    if _user_buffers is not None:
        raise UserError(
            f"actor.tp_comm_overlap: this process has buffers for {_user_buffers} already, and now asks for"
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
