"""Forward and backward passes through Megatron's schedules, and the hidden states that predict
response tokens.

s sequence, b rows, T response tokens of the microbatch on this context-parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

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

# (microbatch, hidden [T, h] of the tokens that predict its response tokens) -> what the pass is for
TrainLoss = Callable[[Microbatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
Reader = Callable[[Microbatch, Tensor], object]


def run_microbatches(
    model: torch.nn.Module,
    microbatches: list[Microbatch],
    mesh: Mesh,
    config: TransformerConfig,
    on_hidden: TrainLoss | Reader,
    *,
    forward_only: bool,
) -> list:
    """One pass over the microbatches by Megatron's own schedule (no pipelining, or 1F1B).

    On the last stage `on_hidden` gets each microbatch and its response hidden states `[T, h]`; its
    results are returned in order (an empty list on other stages). With `forward_only` no graph is
    kept. Otherwise on_hidden returns Megatron's (loss, num_tokens, log) and gradients are summed
    over DP x CP. Collectives: TP, PP, CP of the model, then the gradient reduction. Any number of
    microbatches from 1 on suits both schedules, equal over data-parallel ranks (experts'
    all-to-all, gradient buckets). No wait for the device, but for Megatron's own: shapes between
    pipeline stages, experts' token counts, rotary tables of packed sequences without
    actor.apply_rope_fusion.
    """
    if config.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "interleaved stages need microbatches in multiples of the stages, which nobody sees to here"
        )
    if not microbatches:
        raise ValueError("a schedule needs a microbatch; fill in an empty one")

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        microbatch = next(iterator)
        packed = None
        if microbatch.cu_seqlens is not None:
            # The lengths are the padded ones already. TransformerEngine asks for them twice under
            # context parallelism only; elsewhere a second copy makes it compare the two on the host
            # in every layer (dot_product_attention.py, pad_between_seqs).
            padded = microbatch.cu_seqlens if mesh.cp_size > 1 else None
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=microbatch.cu_seqlens,
                cu_seqlens_kv=microbatch.cu_seqlens,
                cu_seqlens_q_padded=padded,
                cu_seqlens_kv_padded=padded,
                max_seqlen_q=microbatch.max_seqlen,
                max_seqlen_kv=microbatch.max_seqlen,
            )
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


def response_hidden(hidden: Tensor, rows: Tensor, mesh: Mesh, config: TransformerConfig) -> Tensor:
    """Rows `[T, h]` of the last stage's output `[s, b, h]` (`[s / TP, b, h]` under sequence
    parallelism: gathered over TP).
    """
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=mesh.tp_group
        )
    return hidden.flatten(0, 1)[rows]
