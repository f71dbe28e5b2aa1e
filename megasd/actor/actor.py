"""The actor: a Megatron model that scores, learns, saves and exports. It never learns the name of the algorithm.

A step is three calls, on every rank alike:  share = actor.take(batch);  states = actor.teach(share);  actor.train_step(share, states).
R local response tokens, T those of one microbatch, V local vocabulary, h hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor import checkpoint, cpu, optimizer_fixes
from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh, broadcast_tensors
from megasd.actor.teacher import TeacherWeights
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch import Batch
from megasd.config import Config
from megasd.loss.objective import objective, readout_spec
from megasd.loss.reduce import exact_words, global_normalisers, megatron_loss, reduce_metrics, token_weights
from megasd.microbatch import Microbatch, make_microbatches
from megasd.ops.fused_linear import fused_linear_loss, fused_linear_readout, fused_linear_record
from megasd.ops.readout import Readout, ReadoutSpec
from megasd.weights import families
from megasd.weights.export import BUCKET_BYTES, export_hf, plan_of
from megasd.weights.files import HFWriter, read_hf_config
from megasd.weights.gather import Gather
from megasd.weights.load import load_hf
from megasd.weights.table import global_params

SUMS = ("loss", "tokens", "taught_tokens", "teacher_mib")  # metrics that are sums over the batch; the others are means per token


@dataclass
class Share:
    """This data-parallel rank's part of a step: its samples, which of them need a forward, and the weight of every token."""

    batch: Batch
    active: list[int]  # samples with a weight, an index into batch
    num_microbatches: int  # the same on every rank
    weights: dict[str, Tensor]  # term -> float64 [R]
    figures: dict[str, float]  # of the global normaliser, for metrics


class Actor:
    """Model, optimizer and teacher on this rank. Every public method is collective: call it on all ranks, in the same order."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Build from config.model.path (weights included). Raises UserError for unsupported or broken model files."""
        cpu.install()
        optimizer_fixes.install()
        self.config, self.mesh, self.algorithm = config, mesh, config.algorithm
        self.hf_config = read_hf_config(config.model.path)
        family = build.family_of(config.model.path)
        self.vocab_size = family.vocab_size
        self.model_config = build.transformer_config(family, config.actor, mesh.device)
        self.model = build.build_model(family, self.model_config, config.actor, mesh)
        self.layer_offset = build.layer_offset(self.model_config)
        self.expert_offset = families.table(self.hf_config).num_experts // mesh.ep_size * mesh.ep_rank
        load_hf(
            self.params(),
            config.model.path,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            ep_rank=mesh.ep_rank,
            ep_size=mesh.ep_size,
        )
        self.ddp = build.wrap_data_parallel(self.model, self.model_config, config.actor)
        self.optimizer, self.scheduler = build.build_optimizer(self.ddp, config.optimizer, config.actor, config.run.steps)
        teacher = self.algorithm.teacher
        self.teacher = TeacherWeights(self.model, teacher) if teacher is not None and self.algorithm.distill is not None else None
        self.spec = readout_spec(
            self.algorithm,
            # The rows of a dataset were not sampled at any temperature.
            temperature=config.rollout.temperature if self.algorithm.source == "rollout" else 1.0,
            vocab_size=self.vocab_size,
        )
        self.loss_memory_bytes = config.actor.loss_memory_mib * 2**20
        # World rank that reports: first rank of the last pipeline stage (Megatron's order is tp-cp-ep-dp-pp, pp outermost).
        self.reporter = mesh.world_size // mesh.pp_size * (mesh.pp_size - 1)

    # ---- a training step ----

    def take(self, batch: Batch) -> Share:
        """Cut out this rank's share and weigh its tokens. Collectives: one small all-reduce over the data-parallel group."""
        active = self._active(batch)
        local, local_active = batch.shard(active, self.mesh.dp_rank, self.mesh.dp_size)
        masks = {"distill": local.taught, "policy_gradient": local.scored, "nll": torch.ones(len(local), dtype=torch.bool)}
        masks = {term: mask for term, mask in masks.items() if getattr(self.algorithm, term) is not None}
        normalisers = global_normalisers(
            local.question_weight, local.question_size, masks, local.response_lens, dp_group=self.mesh.dp_group
        )
        weights, figures = {}, {}
        for term, normaliser in normalisers.items():
            weights[term] = token_weights(
                local.question_weight, masks[term], local.response_lens, normaliser=normaliser, aggregation=self.algorithm.aggregation
            )
            figures = {"informative_questions": float(normaliser.num_questions), "mean_question_weight": normaliser.mean_weight}
        return Share(
            batch=local,
            active=local_active.nonzero().squeeze(1).tolist(),
            num_microbatches=batch.num_microbatches(active, self.mesh.dp_size, self.config.actor.micro_batch_size),
            weights=weights,
            figures=figures,
        )

    def _active(self, batch: Batch) -> Tensor:
        """bool [N]: samples that some term gives a weight; the others are counted by the normalisers and need no forward."""
        active = torch.zeros(len(batch), dtype=torch.bool)
        if self.algorithm.nll is not None:
            return ~active
        if self.algorithm.distill is not None:
            active |= batch.taught & (batch.question_weight > 0)
        if self.algorithm.policy_gradient is not None:
            first = batch.response_lens.cumsum(0) - batch.response_lens
            active |= batch.scored & (batch.question_weight > 0) & (batch.streams["advantage"][first] != 0)
        return active

    @torch.no_grad()
    def teach(self, share: Share) -> TeacherSignal | None:
        """Teacher pass, forward only, over the active taught samples; None when the algorithm has no teacher.

        Collectives: the model's, those of ops/readout.py for records, and the signal's all-reduces over the context-parallel group.
        """
        if self.teacher is None:
            return None
        batch, mesh = share.batch, self.mesh
        samples = [i for i in share.active if batch.taught[i]]
        record_k = min(self.spec.top_k, self.vocab_size) if self.spec.support == "record" else None
        signal = TeacherSignal.empty(
            batch,
            samples,
            hidden_size=self.model_config.hidden_size if mesh.is_last_stage else 0,
            top_k=record_k,
            dtype=self.model_config.params_dtype,
            device=mesh.device,
        )

        def keep(microbatch: Microbatch, hidden_Th: Tensor) -> None:
            slots = signal.slot_R[microbatch.response_index[microbatch.valid]]
            hidden_Th = hidden_Th[microbatch.valid].to(self.model_config.params_dtype)
            if record_k is None:
                signal.hidden_Sh[slots] = hidden_Th
                return
            record = fused_linear_record(
                hidden_Th,
                self.model.output_weight(),
                record_k,
                vocab_size=self.vocab_size,
                temperature=self.spec.teacher_temperature,
                tp_group=mesh.tp_group,
                memory_bytes=self.loss_memory_bytes,
            )
            signal.record.ids_TK[slots], signal.record.logq_TK[slots] = record.ids_TK, record.logq_TK
            signal.record.log_tail_T[slots] = record.log_tail_T

        with self.teacher.active():
            self.model.eval()
            microbatches = self._microbatches(batch, samples, "teacher", share.num_microbatches)
            run_microbatches(self.ddp, microbatches, mesh, self.model_config, keep, forward_only=True)
            self.model.train()
        if mesh.is_last_stage:
            signal.complete(mesh.cp_group if mesh.cp_size > 1 else None)
            if record_k is None:
                signal.output_weight_Vh = self.teacher.tensor_of(self.model.output_weight())
        return signal

    def train_step(self, share: Share, teacher: TeacherSignal | None) -> dict[str, float]:
        """One optimizer step on the share; returns global metrics on every rank.

        Raises FloatingPointError when the gradient norm is not finite. Collectives: the model's, the gradient reduction over
        DP x CP, one all-reduce and one broadcast of the metrics.
        """
        start = time.perf_counter()
        totals: dict[str, Tensor] = {}

        def loss_of(microbatch: Microbatch, hidden_Th: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, sums = self._loss(share, teacher, microbatch, hidden_Th)
            for name, words in sums.items():
                totals[name] = totals[name] + words if name in totals else words
            return megatron_loss(loss)

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = self._microbatches(share.batch, share.active, "student", share.num_microbatches)
        run_microbatches(self.ddp, microbatches, self.mesh, self.model_config, loss_of, forward_only=False)
        self.scheduler.step(increment=1)  # before the step, so that warm-up starts at lr / warm-up steps and not at zero
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}: the step is not trustworthy; resume from the last checkpoint")
        if self.teacher is not None:
            self.teacher.update()
        if teacher is not None:
            totals["teacher_mib"] = exact_words(torch.tensor(teacher.num_bytes / 2**20))
        metrics = self._reduce(totals)
        return metrics | {"grad_norm": grad_norm, "lr": learning_rate, "seconds": time.perf_counter() - start} | share.figures

    def _loss(
        self, share: Share, teacher: TeacherSignal | None, microbatch: Microbatch, hidden_Th: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device, index, valid = self.mesh.device, microbatch.response_index.cpu(), microbatch.valid
        streams_T = {name: stream[index].to(device) for name, stream in share.batch.streams.items()}
        weights_T = {term: weight[index].to(device) * valid for term, weight in share.weights.items()}

        def loss_fn(readout: Readout, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            streams, weights = ({name: t[tokens] for name, t in part.items()} for part in (streams_T, weights_T))
            return objective(readout, streams, weights, valid[tokens], self.algorithm)

        weight_Vh = self.model.output_weight()
        return fused_linear_loss(
            hidden_Th.to(weight_Vh.dtype),
            weight_Vh,
            share.batch.response_ids[index].to(device),
            self.spec,
            loss_fn,
            teacher=None if teacher is None else teacher.of(microbatch.response_index),
            tp_group=self.mesh.tp_group,
            memory_bytes=self.loss_memory_bytes,
            reduce_hidden_grad=not self.config.actor.sequence_parallel,
        )

    def _microbatches(self, batch: Batch, samples: list[int], view: str, count: int) -> list[Microbatch]:
        mesh, actor = self.mesh, self.config.actor
        sequence = 2 * mesh.cp_size if mesh.cp_size > 1 else 1
        return make_microbatches(
            batch,
            samples,
            view,
            count=count,
            micro_batch_size=actor.micro_batch_size,
            packing=actor.packing,
            cp_rank=mesh.cp_rank,
            cp_size=mesh.cp_size,
            multiple=sequence * (mesh.tp_size if actor.sequence_parallel else 1),
        )

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Words summed over data- and context-parallel ranks of the last stage, then values to everyone; sums become means per token."""
        from megatron.core import parallel_state

        reduced = {}
        if self.mesh.is_last_stage:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            counts = {name: "taught_tokens" if name == "divergence" else "tokens" for name in totals if name not in SUMS}
            reduced = reduce_metrics(totals, counts, group=group, device=self.mesh.device)
        sent = {name: torch.tensor(value, dtype=torch.float64) for name, value in reduced.items()}
        return {name: float(value) for name, value in broadcast_tensors(sent, self.reporter).items()}

    # ---- scoring ----

    @torch.no_grad()
    def score(self, batch: Batch, *, top_k: int, temperature: float = 1.0, view: str = "student") -> dict[str, Tensor]:
        """Forward only, live weights: for every response token [R] of this rank's `batch` (not sharded over data-parallel ranks)

        "logp" of the token, "entropy" (nats), "ids" and "logps" [R, K] of the K most likely tokens, float32, on the last stage;
        an empty dict on other stages. Logits are never gathered. Collectives: the model's, ops/ over TP, one all-reduce over CP.
        """
        mesh, results = self.mesh, {}
        k = min(top_k, self.vocab_size)
        size = len(batch.response_ids)
        if mesh.is_last_stage:
            results = {"logp": torch.zeros(size), "entropy": torch.zeros(size), "ids": torch.zeros(size, k), "logps": torch.zeros(size, k)}
            results = {name: t.to(mesh.device, torch.float64 if name == "ids" else torch.float32) for name, t in results.items()}
        spec = ReadoutSpec(vocab_size=self.vocab_size, top_k=k, tail="raw", temperature=temperature)

        def read(microbatch: Microbatch, hidden_Th: Tensor) -> None:
            index, valid = microbatch.response_index, microbatch.valid
            weight_Vh, targets_T = self.model.output_weight(), batch.response_ids.to(mesh.device)[index]
            readout = fused_linear_readout(
                hidden_Th.to(weight_Vh.dtype), weight_Vh, targets_T, spec, tp_group=mesh.tp_group, memory_bytes=self.loss_memory_bytes
            )
            found = {"logp": readout.logp_T, "entropy": readout.entropy_T, "ids": readout.ids_TA, "logps": readout.student_logq_TB}
            for name, values in found.items():
                results[name][index[valid]] = values[valid].to(results[name].dtype)

        self.model.eval()
        count = -(-len(batch) // self.config.actor.micro_batch_size)
        run_microbatches(
            self.ddp, self._microbatches(batch, list(range(len(batch))), view, count), mesh, self.model_config, read, forward_only=True
        )
        self.model.train()
        for name in results:
            if mesh.cp_size > 1:
                dist.all_reduce(results[name], group=mesh.cp_group)
        return {name: t.long() if name == "ids" else t for name, t in results.items()}

    def score_tokens(self, ids: list[int]) -> list[float]:
        """Log-prob (nats, temperature 1) of ids[1:], each given its prefix, on every rank."""
        length, none = len(ids) - 1, torch.zeros(0, dtype=torch.int64)
        batch = Batch(
            prompt_ids=torch.tensor(ids[:1]),
            prompt_lens=torch.tensor([1]),
            teacher_ids=none,
            teacher_lens=torch.tensor([0]),
            response_ids=torch.tensor(ids[1:]),
            response_lens=torch.tensor([length]),
            question_weight=torch.ones(1, dtype=torch.float64),
            question_size=torch.ones(1, dtype=torch.int64),
            scored=torch.ones(1, dtype=torch.bool),
        )
        found = self.score(batch, top_k=1)
        sent = {"logp": found["logp"].cpu()} if dist.get_rank() == self.reporter else None
        return broadcast_tensors(sent, self.reporter)["logp"].tolist()

    # ---- weights and checkpoints ----

    def params(self) -> dict[str, Tensor]:
        """This rank's live parameters under global names."""
        return global_params(dict(self.model.named_parameters()), layer_offset=self.layer_offset, expert_offset=self.expert_offset)

    def gather(
        self,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        make_buffer: Callable[[int], Tensor] | None = None,
    ) -> Gather:
        """The transfers that put whole Hugging Face tensors together on world rank 0 (weights/gather.py).

        Collectives: the plan's exchange.
        """
        mesh, params = self.mesh, self.params()
        plan = plan_of(
            params, self.hf_config, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, ep_size=mesh.ep_size, bucket_bytes=bucket_bytes, dtype=dtype
        )
        return Gather(plan, params, rank=mesh.rank, device=mesh.device, make_buffer=make_buffer)

    def export_hf(self, out_dir: Path) -> None:
        """Write a Hugging Face directory on world rank 0, a bucket at a time. Collectives: the plan's exchange, the gather's messages."""
        tensors = export_hf(self.gather())
        if self.mesh.rank != 0:
            for _ in tensors:  # gives its pieces
                pass
            return
        with HFWriter(out_dir, self.config.model.path) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)

    def save(self, directory: Path, step: int, state: dict) -> Path:
        """Checkpoint model, optimizer, teacher, schedule and RNG as `<directory>/step-<step>`; see checkpoint.py."""
        return checkpoint.save(directory, step, state, mesh=self.mesh, keep=self.config.checkpoint.keep, **self._parts())

    def load(self, path: Path) -> dict:
        """Restore a checkpoint; returns the state dict that was saved with it."""
        return checkpoint.load(path, mesh=self.mesh, **self._parts())

    def _parts(self) -> dict:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "teacher": self.teacher}
