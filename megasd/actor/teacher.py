"""The teacher's forward passes, which make the hidden states behind its logits.

A teacher has one pass, or several passes whose logits are mixed. A mixture of logits is a single
projection: hidden states joined along h, times output weights joined along h. So the loss reads a
mixture as it reads one model.

T response tokens of a microbatch, h hidden, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh
from megasd.actor.student import Student
from megasd.actor.teacher_weights import KINDS, NoTeacherWeights, TeacherState, TeacherWeights
from megasd.batch.microbatch import Microbatch
from megasd.config.schema import TeacherConfig
from megasd.types import UserError


@dataclass(frozen=True)
class Pass:
    """One forward of the teacher: with which weights, and for which share of the logits."""

    # the wrapped model that Megatron's schedules run
    module: torch.nn.Module
    config: TransformerConfig
    # the output layer's shard [V, h], detached; last stage only
    output_weight: Callable[[], Tensor]
    # factor of the logits of this pass
    share: float = 1.0
    # gives the module the teacher's weights for the time of the pass
    weights: Callable[[], AbstractContextManager[None]] = nullcontext
    # whether the module is the student's, which learns again afterwards
    is_student: bool = True


class Teacher:
    """The passes of a teacher over microbatches; none for an algorithm without a teacher."""

    def __init__(self, passes: list[Pass], weights: TeacherState, mesh: Mesh) -> None:
        self.passes, self.weights, self.mesh = passes, weights, mesh

    @property
    def hidden_size(self) -> int:
        """Size of a token's joint hidden state: the sum over the passes."""
        return sum(one.config.hidden_size for one in self.passes)

    def output_weight(self, *, repeats: bool) -> Tensor:
        """[V, hidden_size]: the output layers of the passes, joined along h, of this tensor-parallel rank.

        repeats: the student is updated before the batch has read the teacher for the last time, so
        the weight of a live teacher is copied. Last stage only. No collective.
        """
        weights = [one.output_weight() for one in self.passes]
        joint_Vh = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
        return joint_Vh.clone() if repeats and self.weights.kind == "live" else joint_Vh

    @torch.no_grad()
    def run(self, microbatches: list[Microbatch], keep: Callable[[Microbatch, Tensor, slice], None]) -> None:
        """Run every pass over the microbatches, forward only.

        On the last stage `keep` gets each microbatch with the hidden states [T, h] of one pass,
        times the share of that pass, and their columns in the joint hidden states. Collectives:
        those of `run_microbatches`, once a pass.
        """
        start = 0
        for one in self.passes:
            columns = slice(start, start := start + one.config.hidden_size)

            def read(
                microbatch: Microbatch, hidden_Th: Tensor, columns: slice = columns, share: float = one.share
            ) -> None:
                keep(microbatch, hidden_Th if share == 1.0 else hidden_Th * share, columns)

            one.module.eval()
            with one.weights():
                run_microbatches(one.module, microbatches, self.mesh, one.config, read, forward_only=True)
        for one in self.passes:
            if one.is_student:
                one.module.train()


def build_teacher(config: TeacherConfig | None, student: Student) -> Teacher:
    """The teacher that algorithm.teacher describes, on the student's ranks.

    config None: an algorithm without a teacher, which gets a teacher without passes. UserError for
    an unfit teacher.model_path. No collective.
    """
    if config is None:
        return Teacher([], NoTeacherWeights(), student.mesh)
    weights = TeacherWeights(student.model, config)
    return Teacher(PASSES[config.weights](config, student, weights), weights, student.mesh)


def _one_pass(config: TeacherConfig, student: Student, weights: TeacherWeights) -> list[Pass]:
    """The student's module with the teacher's weights."""

    def output_weight() -> Tensor:
        return weights.tensor_of(student.model.output_weight())

    return [Pass(student.ddp, student.model_config, output_weight, weights=weights.active)]


def _mixed_passes(config: TeacherConfig, student: Student, weights: TeacherWeights) -> list[Pass]:
    """The start model and the live model, whose logits are mixed by teacher.trust_mix."""

    def live_weight() -> Tensor:
        return student.model.output_weight().detach()

    start = replace(_one_pass(config, student, weights)[0], share=1 - config.trust_mix)
    return [start, Pass(student.ddp, student.model_config, live_weight, share=config.trust_mix)]


def _separate_pass(config: TeacherConfig, student: Student, weights: TeacherWeights) -> list[Pass]:
    """A frozen Megatron model of a Hugging Face directory, split as the student is (TP, PP, EP)."""
    path = config.model_path
    if path is None:
        raise UserError("algorithm.teacher.model_path: weights=separate needs the directory of a model")
    family = build.family_of(path)
    if family.vocab_size != student.vocab_size:
        raise UserError(
            f"algorithm.teacher.model_path: {path} has a vocabulary of {family.vocab_size}, the student of"
            f" {student.vocab_size}; a teacher must have the student's tokenizer and vocabulary"
        )
    actor, mesh = student.actor, student.mesh
    model_config = build.transformer_config(family, actor, mesh.device)
    model = build.build_model(family, model_config, actor, mesh).requires_grad_(False)
    build.load_pretrained(model, model_config, path, mesh)
    module = Float16Module(model_config, model) if model_config.bf16 else model
    return [Pass(module, model_config, lambda: model.output_weight().detach(), is_student=False)]


PassBuilder = Callable[[TeacherConfig, Student, TeacherWeights], list[Pass]]
# value of algorithm.teacher.weights -> the passes of that teacher
PASSES: dict[str, PassBuilder] = {
    **dict.fromkeys(KINDS, _one_pass),
    "trust_region": _mixed_passes,
    "separate": _separate_pass,
}
