"""The model that learns, on this rank, and the two ways in which a batch runs through it.

R response tokens of the samples on this rank, T those of one microbatch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megasd.actor.forward import TrainLoss, run_microbatches
from megasd.actor.model import Backbone
from megasd.actor.parallel import Mesh
from megasd.actor.static_shapes import fix_shapes
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch, make_microbatches
from megasd.config.schema import ActorConfig
from megasd.ops.fused_linear_loss import TeacherSource, fused_linear_logprobs
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec

# (places in the response tokens int64 [T], hidden [T, h] that predict them) -> name -> [T, ...]
TokenReader = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Student:
    """This rank's part of the model that learns. Every method but `microbatches` is collective."""

    # the wrapped model, which Megatron's schedules run
    ddp: DistributedDataParallel
    # the model inside the wrapper
    model: Backbone
    model_config: TransformerConfig
    mesh: Mesh
    actor: ActorConfig
    # tokens to whose multiple every sequence is padded
    multiple: int
    vocab_size: int

    @property
    def loss_memory_bytes(self) -> int:
        """Most bytes that the logits of one chunk of tokens may take."""
        return self.actor.loss_memory_mib * 2**20

    def microbatches(
        self, batch: Batch, groups: list[list[int]], context: int | None = None
    ) -> list[Microbatch]:
        """One microbatch of each group of samples of `batch`; an empty group gives filler.

        context: None for the student's prompts, else the number of a teacher context. UserError for
        a sequence that is too long for actor.cuda_graph or actor.tp_comm_overlap.
        """
        microbatches = make_microbatches(
            batch,
            groups,
            context,
            packing=self.actor.packing,
            cp_rank=self.mesh.cp_rank,
            cp_size=self.mesh.cp_size,
            multiple=self.multiple,
        )
        return fix_shapes(microbatches, self.actor, self.multiple, is_student=context is None)

    def forward_backward(self, microbatches: list[Microbatch], loss: TrainLoss) -> list[dict[str, Tensor]]:
        """Run the model and add up the gradients; the logs of `loss`, by microbatch.

        The list is empty before the last pipeline stage. Collectives: those of `run_microbatches`.
        """
        return run_microbatches(
            self.ddp, microbatches, self.mesh, self.model_config, loss, forward_only=False
        )

    @torch.no_grad()
    def read_tokens(
        self,
        batch: Batch,
        groups: list[list[int]],
        shapes: Mapping[str, tuple[int, ...]],
        reader: TokenReader,
    ) -> dict[str, Tensor]:
        """Run the model forward only and collect what `reader` makes of the response tokens.

        shapes: name -> the shape of one token's value. Returns name -> float64 [R, *shape], whole on
        every context-parallel rank, 0 for samples in none of the groups; an empty dict before the
        last pipeline stage. Collectives: those of the model and of `reader`, and one all_reduce a
        name over CP.
        """

        def read(microbatch: Microbatch, hidden_Th: Tensor) -> tuple[Tensor, dict[str, Tensor]] | None:
            # All tensor-parallel ranks skip filler alike, and only they talk to each other in `reader`.
            if microbatch.is_filler:
                return None
            return microbatch.response_index, reader(microbatch.response_index, hidden_Th)

        self.model.eval()
        parts = run_microbatches(
            self.ddp,
            self.microbatches(batch, groups),
            self.mesh,
            self.model_config,
            read,
            forward_only=True,
        )
        self.model.train()
        if not self.mesh.is_last_stage:
            return {}
        collected = {}
        for name, shape in shapes.items():
            values_R = torch.zeros(
                len(batch.response_ids), *shape, dtype=torch.float64, device=self.mesh.device
            )
            for index_T, values in (part for part in parts if part is not None):
                values_R[index_T] = values[name].double()
            if self.mesh.cp_size > 1:
                dist.all_reduce(values_R, group=self.mesh.cp_group)
            collected[name] = values_R
        return collected

    def logprobs(
        self, hidden_Th: Tensor, targets_T: Tensor, spec: LogProbsSpec, teacher: TeacherSource = None
    ) -> LogProbs:
        """What `spec` says about the logits of some tokens, without gradient. Last stage only.

        Collectives: those of ops/vocab_parallel.py over TP, once a chunk of tokens.
        """
        weight_Vh = self.model.output_weight()
        return fused_linear_logprobs(
            hidden_Th.to(weight_Vh.dtype),
            weight_Vh,
            targets_T,
            spec,
            teacher=teacher,
            tp_group=self.mesh.tp_group,
            memory_bytes=self.loss_memory_bytes,
        )
