"""The actor: a Megatron model that scores, learns, saves and exports. It never learns the name of
the algorithm.

A step, on every rank alike:  rank_batch = actor.shard(batch, algorithm);  signal =
actor.teach(rank_batch);  actor.train_step(rank_batch, signal). R local response tokens, T those of
one microbatch, V local vocabulary, h hidden.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor import checkpoint, cpu_backend, megatron_patches
from megasd.actor import model as build
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import Mesh, broadcast_tensors
from megasd.actor.rank_batch import (
    RankBatch,
    active_samples,
    batch_statistics,
    mean_question_weight,
    softmax_temperature,
)
from megasd.actor.static_shapes import fix_shapes, init_user_buffers
from megasd.actor.teacher import Teacher, check_vocabulary
from megasd.actor.teacher_forward import TeacherPass
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch, make_microbatches
from megasd.batch.shard import make_costs, microbatches_in_order, plan_ranks
from megasd.config.schema import AlgorithmConfig, Config
from megasd.loss.normalise import exact_words, megatron_loss, reduce_metrics
from megasd.loss.objective import METRIC_WEIGHTS, logprobs_spec, objective, token_divergence
from megasd.loss.sequence_stats import sequence_log_ratio
from megasd.loss.token_weights import entropy_gate, token_weights
from megasd.models import registry
from megasd.models.param_table import global_params
from megasd.ops.fused_linear_loss import fused_linear_logprobs, fused_linear_loss
from megasd.ops.vocab_parallel import LogProbs, LogProbsSpec
from megasd.weights.export import BUCKET_BYTES, export_hf, plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import HFWriter, read_hf_config
from megasd.weights.load import load_hf


class Actor:
    """Model, optimizer and teacher on this rank. Every public method is collective: call it on all
    ranks, in the same order.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Build from config.model.path (weights included). Raises UserError for unsupported or
        broken model files.
        """
        cpu_backend.install_cpu_backend()
        megatron_patches.install_megatron_patches()
        self.config, self.mesh, self.algorithm = config, mesh, config.algorithm
        # mean question weight of the training rows, where question_weight.normaliser=dataset
        self.dataset_mean: float | None = None
        self.hf_config = read_hf_config(config.model.path)
        family = build.family_of(config.model.path)
        self.vocab_size = family.vocab_size
        self.model_config = build.transformer_config(family, config.actor, mesh.device)
        init_user_buffers(config, self.model_config, mesh)
        self.model = build.build_model(family, self.model_config, config.actor, mesh)
        self.layer_offset = build.layer_offset(self.model_config)
        self.expert_offset = registry.param_table(self.hf_config).num_experts // mesh.ep_size * mesh.ep_rank
        load_hf(
            self.params(),
            config.model.path,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            ep_rank=mesh.ep_rank,
            ep_size=mesh.ep_size,
        )
        self.ddp = build.wrap_data_parallel(self.model, self.model_config, config.actor)
        self.optimizer, self.scheduler = build.build_optimizer(
            self.ddp, config.optimizer, config.actor, config.run.steps
        )
        self.teacher: Teacher | None = None
        if self.algorithm.teacher is not None:
            check_vocabulary(self.vocab_size, self.algorithm.teacher)
            self.teacher = Teacher(
                self.ddp, self.model, self.model_config, self.algorithm.teacher, config.actor, mesh
            )
        self.costs = make_costs(
            config, self.hf_config, len(self.teacher.passes) if self.teacher is not None else 0
        )
        self.gate, self.gate_is_open = entropy_gate(self.algorithm), False
        self.loss_memory_bytes = config.actor.loss_memory_mib * 2**20
        # World rank that reports: first rank of the last pipeline stage (Megatron's order is
        # tp-cp-ep-dp-pp, pp outermost).
        self.reporter = mesh.world_size // mesh.pp_size * (mesh.pp_size - 1)

    # ---- a training step ----

    def shard_all(self, batch: Batch, algorithm: AlgorithmConfig) -> list[RankBatch]:
        """A rank batch of each minibatch; what goes by the batch (mean question weight, pass rate)
        is the whole batch's. No collective.
        """
        weight, parts = algorithm.question_weight, batch.parts(algorithm.minibatches)
        rank_batches = [self.shard(part, algorithm) for part in parts]
        if len(parts) > 1:
            mean = (
                mean_question_weight(batch, weight.normaliser)
                if weight.normaliser in ("informative", "batch")
                else None
            )
            whole = batch_statistics(batch)
            rank_batches = [
                replace(rank_batch, is_first=k == 0, mean_weight=mean or None, **whole)
                for k, rank_batch in enumerate(rank_batches)
            ]
        return rank_batches

    def shard(self, batch: Batch, algorithm: AlgorithmConfig | None = None) -> RankBatch:
        """Cut out this rank's rank batch. algorithm: as it stands in this step (algo/stages.py);
        None: as configured. No collective.
        """
        algorithm = algorithm or self.algorithm
        active = active_samples(batch, algorithm)
        mine = plan_ranks(batch, active, algorithm, self.costs, self.mesh.dp_size)[self.mesh.dp_rank]
        local = batch.select(mine.samples)
        streams = dict(local.streams) | {"distilled": local.distilled.repeat_interleave(local.response_lens)}
        return RankBatch(
            batch=local,
            microbatches=mine.microbatches,
            teacher_microbatches=mine.teacher_microbatches,
            algorithm=algorithm,
            spec=logprobs_spec(
                algorithm,
                temperature=softmax_temperature(algorithm, self.config.rollout.temperature),
                vocab_size=self.vocab_size,
            ),
            streams={name: stream.to(self.mesh.device) for name, stream in streams.items()},
            targets=local.response_ids.to(self.mesh.device),
            metrics=mine.metrics,
            **batch_statistics(batch),
        )

    def teacher_forward(self, rank_batch: RankBatch) -> TeacherSignal | None:
        """What the student's pass reads of the teacher (actor/teacher_forward.py, which says the
        collectives); None without a distillation term.
        """
        if rank_batch.algorithm.teacher is None or self.teacher is None:
            return None
        run = TeacherPass(
            self.teacher,
            self.mesh,
            self.vocab_size,
            self.model_config.params_dtype,
            self.loss_memory_bytes,
            self._microbatches,
        )
        return run(rank_batch)

    @torch.no_grad()
    def student_logprobs(
        self, rank_batch: RankBatch, teacher: TeacherSignal | None, *, with_divergence: bool = False
    ) -> dict[str, Tensor]:
        """The student before its step, forward only: "logp" [R] of the sampled tokens and, if asked
        for, "divergence" [R].

        Zero for inactive samples; an empty dict before the last stage. Collectives: the model's,
        ops/vocab_parallel.py, one all-reduce over CP.
        """
        batch, mesh, results = rank_batch.batch, self.mesh, {}
        if mesh.is_last_stage:
            names = ("logp", "divergence") if with_divergence else ("logp",)
            results = {name: torch.zeros(len(batch.response_ids), device=mesh.device) for name in names}
        spec = rank_batch.spec if with_divergence else replace(rank_batch.spec, support="none")

        def read(microbatch: Microbatch, hidden_Th: Tensor) -> None:
            # on all tensor-parallel ranks alike, which alone talk to each other below
            if microbatch.is_filler:
                return
            index, weight_Vh = microbatch.response_index, self.model.output_weight()
            readout = fused_linear_logprobs(
                hidden_Th.to(weight_Vh.dtype),
                weight_Vh,
                rank_batch.targets[index],
                spec,
                teacher=teacher.of(index) if with_divergence else None,
                tp_group=mesh.tp_group,
                memory_bytes=self.loss_memory_bytes,
            )
            results["logp"][index] = readout.logp_T.float()
            if with_divergence:
                results["divergence"][index] = token_divergence(readout, rank_batch.algorithm).float()

        self.model.eval()
        microbatches = self._microbatches(batch, rank_batch.microbatches, None)
        run_microbatches(self.ddp, microbatches, mesh, self.model_config, read, forward_only=True)
        self.model.train()
        for values in results.values():
            if mesh.cp_size > 1:
                dist.all_reduce(values, group=mesh.cp_group)
        return results

    def snapshot_logprobs(self, rank_batch: RankBatch, *, repeats: bool) -> None:
        """Before the first update of a batch: pi_old of its tokens, where a later update
        (`repeats`) or the algorithm's credit reads it.

        Collectives: those of `student_logprobs`, or none.
        """
        pg, rank_batch.repeats = rank_batch.algorithm.policy_gradient, repeats
        if repeats or (pg is not None and pg.credit is not None and pg.credit.kind in ("return", "margin")):
            found = self.student_logprobs(rank_batch, None)
            if found:
                rank_batch.streams["old_logp"] = found["logp"]

    def _prepare(self, rank_batch: RankBatch, teacher: TeacherSignal | None, *, first: bool) -> None:
        """Weights and streams of the tokens, once a rank batch; the sequence ratio before each
        update. Collectives: loss/token_weights.py, `student_logprobs`.
        """
        algorithm = rank_batch.algorithm
        pg, term = algorithm.policy_gradient, algorithm.distill
        if rank_batch.token_weights is None:
            if term is not None and term.token_weight == "scan":
                rank_batch.streams |= {
                    k: v
                    for k, v in self.student_logprobs(rank_batch, teacher, with_divergence=True).items()
                    if k == "divergence"
                }
            rank_batch.token_weights = token_weights(
                rank_batch.batch,
                rank_batch.streams,
                algorithm,
                observe=partial(self._observe_entropy, is_first=rank_batch.is_first),
                normaliser=(
                    algorithm.question_weight.normaliser if rank_batch.mean_weight is None else "dataset"
                ),
                mean_weight=rank_batch.mean_weight or self.dataset_mean,
                room=self.config.rollout.max_response_tokens,
                dp_group=self.mesh.dp_group,
            ).to(self.mesh.device)
        # before the first update every ratio is 1
        if pg is not None and pg.surrogate == "gspo" and rank_batch.repeats and not first:
            found = self.student_logprobs(rank_batch, None)
            if found:
                ratio_R = sequence_log_ratio(
                    found["logp"].cpu(), rank_batch.streams["old_logp"].cpu(), rank_batch.batch.response_lens
                )
                rank_batch.token_weights.streams["sequence_log_ratio"] = ratio_R.to(found["logp"])

    def _observe_entropy(self, median: float | None, *, is_first: bool) -> tuple[bool, float]:
        """The gate on every rank, once a batch, from the median that the last pipeline stage has
        seen. Collective: one broadcast.
        """
        sent = None if median is None else {"median": torch.tensor(median, dtype=torch.float64)}
        seen = float(
            broadcast_tensors(sent if dist.get_rank() == self.reporter else None, self.reporter)["median"]
        )
        if is_first:
            self.gate_is_open = self.gate.observe(seen)
        return self.gate_is_open, seen

    def train(self, rank_batches: list[RankBatch], signals: list[TeacherSignal | None]) -> dict[str, float]:
        """All optimizer steps of a batch: its minibatches in order, as often as algorithm.epochs
        says. Metrics: means over the steps, counts summed over minibatches. Raises and collectives:
        as `train_step`.
        """
        epochs = rank_batches[0].algorithm.epochs
        steps = [
            (rank_batch, signal)
            for _ in range(epochs)
            for rank_batch, signal in zip(rank_batches, signals, strict=True)
        ]
        for rank_batch in rank_batches:
            self.snapshot_logprobs(rank_batch, repeats=len(steps) > 1)
        found = [
            self.train_step(rank_batch, signal, first=k == 0, last=k == len(steps) - 1)
            for k, (rank_batch, signal) in enumerate(steps)
        ]
        if len(found) == 1:
            return found[0]
        mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        # What happens once a minibatch, and once a step.
        counts = (
            "tokens",
            "taught_tokens",
            "sampled_tokens",
            "informative_questions",
            "teacher_mib",
            "teacher_tflops",
        )
        sums = {name: mean[name] * len(rank_batches) for name in counts if name in mean}
        sums |= {
            name: mean[name] * len(found)
            for name in ("seconds", "student_tflops", "recompute_tflops")
            if name in mean
        }
        return found[-1] | mean | sums | {"updates": float(len(found))}

    def train_step(
        self, rank_batch: RankBatch, teacher: TeacherSignal | None, *, first: bool = True, last: bool = True
    ) -> dict[str, float]:
        """One optimizer step on the rank batch; returns global metrics on every rank.

        first, last of its batch: the learning rate moves before the first, the teacher follows
        after the last (SDPO 2601.20802). Raises FloatingPointError when the gradient norm is not
        finite. Collectives: the model's, the gradient reduction over DP x CP, one all-reduce and
        one broadcast of the metrics, those of loss/token_weights.py.
        """
        start = time.perf_counter()
        self._prepare(rank_batch, teacher, first=first)
        totals: dict[str, Tensor] = {}

        def loss_of(microbatch: Microbatch, hidden_Th: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, sums = self._loss(rank_batch, teacher, microbatch, hidden_Th)
            for name, words in sums.items():
                totals[name] = totals[name] + words if name in totals else words
            return megatron_loss(loss)

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = self._microbatches(rank_batch.batch, rank_batch.microbatches, None)
        run_microbatches(self.ddp, microbatches, self.mesh, self.model_config, loss_of, forward_only=False)
        if first:
            # before the step, so that warm-up starts at lr / warm-up steps and not at zero
            self.scheduler.step(increment=1)
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm}: the step is not trustworthy; resume from the last checkpoint"
            )
        figures = rank_batch.metrics | rank_batch.token_weights.metrics
        if last:
            build.whole_parameters(self.ddp)
        if last and self.teacher is not None:
            self.teacher.after_batch(pass_rate=rank_batch.pass_rate, length_tail=rank_batch.length_tail)
            if self.algorithm.teacher.weights in ("snapshot", "gated"):
                figures = figures | {"teacher_copies": float(self.teacher.weights.refresh.copies)}
        if teacher is not None:
            totals["teacher_mib"] = exact_words(torch.tensor(teacher.num_bytes / 2**20))
        metrics = self._reduce(totals)
        return (
            metrics
            | {"grad_norm": grad_norm, "lr": learning_rate, "seconds": time.perf_counter() - start}
            | figures
        )

    def _loss(
        self, rank_batch: RankBatch, teacher: TeacherSignal | None, microbatch: Microbatch, hidden_Th: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        index, valid = microbatch.response_index, microbatch.valid
        streams_T = {
            name: stream[index]
            for name, stream in rank_batch.token_weights.streams.items()
            if stream.dim() == 1
        }
        weights_T = {term: weight[index] * valid for term, weight in rank_batch.token_weights.weights.items()}

        def loss_fn(readout: LogProbs, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            streams, weights = (
                {name: t[tokens] for name, t in part.items()} for part in (streams_T, weights_T)
            )
            return objective(readout, streams, weights, valid[tokens], rank_batch.algorithm)

        weight_Vh = self.model.output_weight()
        return fused_linear_loss(
            hidden_Th.to(weight_Vh.dtype),
            weight_Vh,
            rank_batch.targets[index],
            rank_batch.spec,
            loss_fn,
            teacher=None if teacher is None else teacher.of(index),
            tp_group=self.mesh.tp_group,
            memory_bytes=self.loss_memory_bytes,
            reduce_hidden_grad=not self.config.actor.sequence_parallel,
        )

    def _microbatches(self, batch: Batch, groups: list[list[int]], context: int | None) -> list[Microbatch]:
        place = {"cp_rank": self.mesh.cp_rank, "cp_size": self.mesh.cp_size, "multiple": self.costs.multiple}
        made = make_microbatches(batch, groups, context, packing=self.config.actor.packing, **place)
        return fix_shapes(made, self.config.actor, self.costs.multiple, is_student=context is None)

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Words summed over data- and context-parallel ranks of the last stage, then values to
        everyone; sums become means per token.
        """
        from megatron.core import parallel_state

        reduced = {}
        if self.mesh.is_last_stage:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            counts = {name: METRIC_WEIGHTS.get(name, "tokens") for name in totals}
            counts = {name: by for name, by in counts.items() if by}
            reduced = reduce_metrics(totals, counts, group=group, device=self.mesh.device)
        sent = {name: torch.tensor(value, dtype=torch.float64) for name, value in reduced.items()}
        return {name: float(value) for name, value in broadcast_tensors(sent, self.reporter).items()}

    # ---- scoring ----

    @torch.no_grad()
    def score(self, batch: Batch, *, top_k: int, temperature: float = 1.0) -> dict[str, Tensor]:
        """Forward only, live weights: for every response token [R] of this rank's `batch` (not
        sharded over data-parallel ranks)

        "logp" of the token, "entropy" (nats), "ids" and "logps" [R, K] of the K most likely tokens,
        float32, on the last stage; an empty dict on other stages. Logits are never gathered.
        Collectives: the model's, ops/ over TP, one all-reduce over CP.
        """
        mesh, results = self.mesh, {}
        k = min(top_k, self.vocab_size)
        size = len(batch.response_ids)
        if mesh.is_last_stage:
            results = {
                "logp": torch.zeros(size),
                "entropy": torch.zeros(size),
                "ids": torch.zeros(size, k),
                "logps": torch.zeros(size, k),
            }
            results = {
                name: t.to(mesh.device, torch.float64 if name == "ids" else torch.float32)
                for name, t in results.items()
            }
        spec = LogProbsSpec(vocab_size=self.vocab_size, top_k=k, tail="raw", temperature=temperature)

        targets = batch.response_ids.to(mesh.device)

        def read(microbatch: Microbatch, hidden_Th: Tensor) -> None:
            if microbatch.is_filler:
                return
            index, weight_Vh = microbatch.response_index, self.model.output_weight()
            readout = fused_linear_logprobs(
                hidden_Th.to(weight_Vh.dtype),
                weight_Vh,
                targets[index],
                spec,
                tp_group=mesh.tp_group,
                memory_bytes=self.loss_memory_bytes,
            )
            found = {
                "logp": readout.logp_T,
                "entropy": readout.entropy_T,
                "ids": readout.ids_TA,
                "logps": readout.student_logq_TB,
            }
            for name, values in found.items():
                results[name][index] = values.to(results[name].dtype)

        self.model.eval()
        microbatches = self._microbatches(batch, microbatches_in_order(batch, self.costs), None)
        run_microbatches(self.ddp, microbatches, mesh, self.model_config, read, forward_only=True)
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
            context_ids=none,
            context_lens=torch.tensor([[0]]),
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

    def free_cache(self) -> None:
        """Give the memory that torch's allocator keeps from the last step back to the GPU, for an
        engine on it. No collective.
        """
        if self.mesh.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def params(self) -> dict[str, Tensor]:
        """This rank's live parameters under global names."""
        return global_params(
            dict(self.model.named_parameters()),
            layer_offset=self.layer_offset,
            expert_offset=self.expert_offset,
        )

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
            params,
            self.hf_config,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            ep_size=mesh.ep_size,
            bucket_bytes=bucket_bytes,
            dtype=dtype,
        )
        return Gather(plan, params, rank=mesh.rank, device=mesh.device, make_buffer=make_buffer)

    def export_hf(self, out_dir: Path) -> None:
        """Write a Hugging Face directory on world rank 0, a bucket at a time. Collectives: the
        plan's exchange, the gather's messages.
        """
        tensors = export_hf(self.gather())
        if self.mesh.rank != 0:
            # gives its pieces
            for _ in tensors:
                pass
            return
        with HFWriter(out_dir, self.config.model.path) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)

    def save(self, directory: Path, step: int, state: dict) -> Path:
        """Checkpoint model, optimizer, teacher, schedule and RNG as `<directory>/step-<step>`; see
        checkpoint.py.
        """
        return checkpoint.save(
            directory, step, state, mesh=self.mesh, keep=self.config.checkpoint.keep, **self._parts()
        )

    def load(self, path: Path) -> dict:
        """Restore a checkpoint; returns the state dict that was saved with it."""
        return checkpoint.load(path, mesh=self.mesh, **self._parts())

    def _parts(self) -> dict:
        teacher = self.teacher.weights if self.teacher is not None else None
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "teacher": teacher,
        }
