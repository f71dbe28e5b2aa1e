"""Microbatches through Megatron's schedules, to the hidden states that predict response tokens.

s sequence, b rows, T response tokens of the microbatch on this context-parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megasd.actor.parallel import Mesh
from megasd.actor.static_shapes import outside_graphs
from megasd.batch.microbatch import Microbatch
from megasd.loss.megatron_scaling import without_division

# (microbatch, hidden [T, h] that predict its response tokens) -> Megatron's (loss, num_tokens, log)
TrainLoss = Callable[[Microbatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
# (microbatch, hidden [T, h] that predict its response tokens) -> any result
Reader = Callable[[Microbatch, Tensor], Any]


def run_microbatches(
    model: torch.nn.Module,
    microbatches: list[Microbatch],
    mesh: Mesh,
    config: TransformerConfig,
    on_hidden: TrainLoss | Reader,
    *,
    forward_only: bool,
) -> list[Any]:
    """Run the microbatches by Megatron's own schedule (no pipelining, or 1F1B).

    On the last stage `on_hidden` gets each microbatch and its response hidden states [T, h]. With
    `forward_only` no graph is kept, and the results of `on_hidden` are returned in order. Otherwise
    `on_hidden` is a TrainLoss, gradients are summed over DP x CP, and its logs are returned in
    order. On other stages the list is empty.

    Both schedules take any number of microbatches from 1 on. It must be the same on all
    data-parallel ranks, because of the experts' all-to-all and of gradient buckets. Collectives:
    TP, PP, CP of the model, then the gradient reduction. The host waits for the device only where
    Megatron does: for shapes between pipeline stages, experts' token counts, and rotary tables of
    packed sequences without actor.apply_rope_fusion. ValueError for interleaved stages, and for no
    microbatch.
    """
    if config.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "interleaved stages need microbatches in multiples of the stages, which this function does not"
            " provide"
        )
    if not microbatches:
        raise ValueError("a schedule needs a microbatch; give it one of filler")

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        microbatch = next(iterator)
        packed = _packed_lengths(microbatch, mesh)
        hidden = model(microbatch.tokens, microbatch.position_ids, None, packed_seq_params=packed)
        return hidden, partial(read, microbatch)

    def read(microbatch: Microbatch, hidden: Tensor, non_loss_data: bool = False) -> object:
        return on_hidden(microbatch, response_hidden(hidden, microbatch.rows, mesh, config))

    config.finalize_model_grads_func = without_division(finalize_model_grads)
    moved = [m.to(mesh.device) for m in microbatches]
    with torch.set_grad_enabled(not forward_only), outside_graphs(model) if forward_only else nullcontext():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(moved),
            model=[model],
            num_microbatches=len(moved),
            seq_length=max(m.max_seqlen for m in moved),
            micro_batch_size=max(m.tokens.size(0) for m in moved),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _packed_lengths(microbatch: Microbatch, mesh: Mesh) -> PackedSeqParams | None:
    """The lengths of packed sequences, as Megatron takes them; None for a padded microbatch."""
    if microbatch.cu_seqlens is None:
        return None
    # The lengths are the padded ones already. Under context parallelism TransformerEngine needs them
    # a second time. Without it a second copy makes every layer compare the two on the host
    # (dot_product_attention.py, pad_between_seqs).
    padded = microbatch.cu_seqlens if mesh.cp_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
    )


def response_hidden(hidden: Tensor, rows: Tensor, mesh: Mesh, config: TransformerConfig) -> Tensor:
    """Rows [T, h] of the last stage's output [s, b, h].

    Under sequence parallelism the output is [s / TP, b, h]. Collective: then an all-gather over TP.
    """
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=mesh.tp_group
        )
    return hidden.flatten(0, 1)[rows]
