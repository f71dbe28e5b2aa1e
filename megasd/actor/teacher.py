"""The teacher's weights, sharded exactly as the model is, and the forward passes that make its
final hidden states.

    live           the student's own
    ema            phi <- (1 - r) phi + r theta, fp32, once after each batch (SDPO 2601.20802, 2.3)
    frozen         the start model
    snapshot       a copy every `refresh_every` steps (RLSD 2604.03128, RLCSD 2606.11709)
    gated          a copy once pass rates have risen and lengths have no long tail (CGTR 2606.03532)
    trust_region   softmax((1 - a) z_start + a z_live), both reading the teacher's context (SDPO 2.3)
    separate       another model of the same vocabulary, frozen (GKD 2306.13649)

A mixture of logits is one projection: of the hidden states side by side on the output weights side
by side, so the loss never knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh
from megasd.batch.microbatch import Microbatch
from megasd.config.schema import ActorConfig, TeacherConfig
from megasd.models import registry
from megasd.models.param_table import global_params
from megasd.types import UserError
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from megasd.weights.te_fp8 import lend, plain, storage

SHADOWED = ("ema", "frozen", "snapshot", "gated", "trust_region")


@dataclass
class Refresh:
    """What decides the next copy of a snapshot or gated teacher; JSON-able, saved with a checkpoint."""

    # batches since the last copy
    steps: int = 0
    # of the batch after which it was made; None: not seen yet
    pass_rate: float | None = None
    copies: int = 0


@dataclass
class Pass:
    """One forward of the teacher: which weights, and the share of its logits."""

    module: torch.nn.Module
    config: TransformerConfig
    # the output layer's shard, detached; of the last stage
    weight_Vh: Callable[[], Tensor]
    share: float
    uses_shadow: bool


class TeacherWeights:
    """fp32 copies of this rank's parameters where the teacher is not the live model. Collectives:
    those of the model's forward alone.
    """

    def __init__(self, model: torch.nn.Module, config: TeacherConfig) -> None:
        self.model, self.config = model, config
        self.refresh = Refresh()
        self.shadow: dict[str, Tensor] = {}
        if config.weights in SHADOWED:
            self.shadow = {name: plain(p).float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, *, pass_rate: float | None = None, length_tail: float = 0.0) -> None:
        """After a batch. pass_rate: its mean; length_tail: its longest response over the mean
        length (gated teachers).
        """
        config, state = self.config, self.refresh
        if config.weights == "ema":
            for name, p in self.model.named_parameters():
                self.shadow[name].lerp_(plain(p).float(), config.ema_rate)
        if config.weights not in ("snapshot", "gated"):
            return
        state.steps += 1
        if state.pass_rate is None:
            state.pass_rate = pass_rate
        due = state.steps >= config.refresh_every
        if config.weights == "gated":
            rise = (pass_rate or 0.0) - (state.pass_rate or 0.0)
            due = due and rise >= config.gate_gain and length_tail <= config.gate_length
        if due:
            for name, p in self.model.named_parameters():
                self.shadow[name].copy_(plain(p))
            self.refresh = Refresh(steps=0, pass_rate=pass_rate, copies=state.copies + 1)

    def state_dict(self) -> dict:
        return asdict(self.refresh)

    def load_state_dict(self, state: dict) -> None:
        self.refresh = Refresh(**state)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the model with the teacher's weights. The student's storage is only set aside, so
        optimizer buffers stay valid.

        FP8 parameters (actor.fp8_param_gather) get them quantised anew; delayed scaling thereby
        also sees the teacher's largest weights.
        """
        if not self.shadow:
            yield
            return
        student = {name: storage(p) for name, p in self.model.named_parameters()}
        try:
            for name, p in self.model.named_parameters():
                # no copy when the model is fp32
                lend(p, self.shadow[name].to(p.dtype))
            yield
        finally:
            for name, p in self.model.named_parameters():
                lend(p, student[name])

    def tensor_of(self, parameter: Tensor) -> Tensor:
        """The teacher's value of one model parameter, detached, in the parameter's dtype."""
        for name, p in self.model.named_parameters():
            if p is parameter and self.shadow:
                return self.shadow[name].to(p.dtype)
        return parameter.detach()


class Teacher:
    """Passes of the teacher over microbatches. Every method is collective over the model's ranks."""

    def __init__(
        self,
        module: torch.nn.Module,
        model: torch.nn.Module,
        model_config: TransformerConfig,
        config: TeacherConfig,
        actor: ActorConfig,
        mesh: Mesh,
    ) -> None:
        """module: the wrapped model that the schedules run; model: the Backbone in it. UserError
        for an unfit teacher.model_path.
        """
        self.config, self.mesh = config, mesh
        # of the batch that is being learned
        self._head: Tensor | None = None
        self.weights = TeacherWeights(model, config)
        if config.weights == "separate":
            other, other_config = _separate_model(config.model_path, actor, mesh)
            other_module = Float16Module(other_config, other) if other_config.bf16 else other
            self.passes = [
                Pass(other_module, other_config, lambda: other.output_weight().detach(), 1.0, False)
            ]
            return
        shadow = Pass(module, model_config, lambda: self.weights.tensor_of(model.output_weight()), 1.0, True)
        self.passes = [shadow]
        if config.weights == "trust_region":
            shadow.share = 1 - config.trust_mix
            self.passes.append(
                Pass(module, model_config, lambda: model.output_weight().detach(), config.trust_mix, False)
            )

    @property
    def hidden_size(self) -> int:
        """Of what `hidden` gives: the sum over passes."""
        return sum(p.config.hidden_size for p in self.passes)

    def output_weight(self, *, repeats: bool = False) -> Tensor:
        """[V, hidden_size] of this tensor-parallel rank, on the last stage; one tensor for all
        passes of a batch.

        repeats: the student is updated before the last of them is read, so a live teacher's is copied.
        """
        if self._head is None:
            weights = [p.weight_Vh() for p in self.passes]
            self._head = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
            if repeats and self.config.weights == "live":
                self._head = self._head.clone()
        return self._head

    def after_batch(self, *, pass_rate: float | None = None, length_tail: float = 0.0) -> None:
        """As TeacherWeights.update."""
        self._head = None
        self.weights.update(pass_rate=pass_rate, length_tail=length_tail)

    @torch.no_grad()
    def run(self, microbatches: list[Microbatch], keep: Callable[[Microbatch, Tensor, slice], None]) -> None:
        """Forward only; keep(microbatch, hidden [T, h] times the pass's share, its columns of
        hidden_size) on the last stage.
        """
        start = 0
        for one in self.passes:
            columns = slice(start, start := start + one.config.hidden_size)

            def read(
                microbatch: Microbatch, hidden_Th: Tensor, columns: slice = columns, share: float = one.share
            ) -> None:
                keep(microbatch, hidden_Th if share == 1.0 else hidden_Th * share, columns)

            one.module.eval()
            if one.uses_shadow:
                with self.weights.active():
                    run_microbatches(one.module, microbatches, self.mesh, one.config, read, forward_only=True)
            else:
                run_microbatches(one.module, microbatches, self.mesh, one.config, read, forward_only=True)
        # the same module learns
        if self.config.weights != "separate":
            self.passes[0].module.train()


def _separate_model(path: str, actor: ActorConfig, mesh: Mesh) -> tuple[build.Backbone, TransformerConfig]:
    """A frozen Megatron model of a Hugging Face directory on this run's ranks (TP, PP, EP as the student)."""
    family, hf_config = build.family_of(path), read_hf_config(path)
    config = build.transformer_config(family, actor, mesh.device)
    model = build.build_model(family, config, actor, mesh).requires_grad_(False)
    params = global_params(
        dict(model.named_parameters()),
        layer_offset=build.layer_offset(config),
        expert_offset=registry.param_table(hf_config).num_experts // mesh.ep_size * mesh.ep_rank,
    )
    load_hf(
        params, path, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, ep_rank=mesh.ep_rank, ep_size=mesh.ep_size
    )
    return model, config


def check_vocabulary(student_size: int, config: TeacherConfig) -> None:
    """UserError unless the separate teacher has the student's vocabulary size; what its ids mean,
    run.py holds against the tokenizer.
    """
    teacher_path = config.model_path
    size = student_size if config.weights != "separate" else build.family_of(teacher_path).vocab_size
    if size != student_size:
        raise UserError(
            f"algorithm.teacher.model_path: {teacher_path} has a vocabulary of {size}, the student of"
            f" {student_size}; a teacher must have the student's tokenizer and vocabulary"
        )
