"""The actor: a Megatron model that scores, learns, saves and exports. It never learns the name of
the algorithm.

A step, on every rank alike:

    batches = actor.shard(batch, algorithm)    # this rank's part of each minibatch
    teacher = actor.teacher_forward(batches)   # forward only, another context, other weights
    metrics = actor.update(batches, teacher)   # minibatches x epochs of optimizer steps

R local response tokens, T those of one microbatch, V local vocabulary, h hidden.
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
from megasd.actor.teacher_signal import TeacherSignal, no_signal
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch, make_microbatches
from megasd.batch.shard import make_costs, microbatches_in_order, plan_ranks
from megasd.config.schema import AlgorithmConfig, Config
from megasd.loss.exact_sum import exact_words, reduce_metrics
from megasd.loss.megatron_scaling import megatron_loss
from megasd.loss.objective import METRIC_WEIGHTS, logprobs_spec, objective, token_divergence
from megasd.loss.sequence_stats import sequence_log_ratio
from megasd.loss.token_weights import TokenWeights, entropy_gate, token_weights
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

    def shard(self, batch: Batch, algorithm: AlgorithmConfig | None = None) -> list[RankBatch]:
        """This rank's part of each minibatch of the step, in order.

        algorithm: as it stands in this step (algo/stages.py); None: as configured. The mean question
        weight, the pass rate and the length tail are those of the whole batch. No collective.
        """
        algorithm = algorithm or self.algorithm
        parts, normaliser = batch.parts(algorithm.minibatches), algorithm.question_weight.normaliser
        mean = None
        if len(parts) > 1 and normaliser in ("informative", "batch"):
            mean = mean_question_weight(batch, normaliser) or None
        whole = batch_statistics(batch)
        return [self._shard(part, algorithm, mean, whole) for part in parts]

    def _shard(
        self, part: Batch, algorithm: AlgorithmConfig, mean_weight: float | None, whole: dict[str, float]
    ) -> RankBatch:
        active = active_samples(part, algorithm)
        mine = plan_ranks(part, active, algorithm, self.costs, self.mesh.dp_size)[self.mesh.dp_rank]
        local = part.select(mine.samples)
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
            mean_weight=mean_weight,
            **whole,
        )

    def teacher_forward(self, batches: list[RankBatch]) -> list[TeacherSignal]:
        """What the student's pass over each minibatch reads of the teacher.

        An algorithm without a teacher gives empty signals. Collectives: actor/teacher_forward.py.
        """
        if self.teacher is None:
            return [no_signal(self.mesh.device) for _ in batches]
        run = TeacherPass(
            self.teacher,
            self.mesh,
            self.vocab_size,
            self.model_config.params_dtype,
            self.loss_memory_bytes,
            self._microbatches,
        )
        return [run(rank_batch) for rank_batch in batches]

    @torch.no_grad()
    def student_logprobs(
        self, rank_batch: RankBatch, teacher: TeacherSignal | None = None
    ) -> dict[str, Tensor]:
        """Run the student, forward only: {"logp": [R]} of the sampled tokens, float32, nats.

        With a teacher also "divergence" [R] from it, before any weight. Values of inactive samples
        are 0. Before the last pipeline stage the dict is empty. Collectives: the model's,
        ops/vocab_parallel.py, one all-reduce a stream over CP.
        """
        batch, mesh = rank_batch.batch, self.mesh
        spec = replace(rank_batch.spec, support="none") if teacher is None else rank_batch.spec

        def read(microbatch: Microbatch, hidden_Th: Tensor) -> dict[str, Tensor]:
            # All tensor-parallel ranks skip it alike; the collectives below are theirs alone.
            if microbatch.is_filler:
                return {}
            index, weight_Vh = microbatch.response_index, self.model.output_weight()
            logprobs = fused_linear_logprobs(
                hidden_Th.to(weight_Vh.dtype),
                weight_Vh,
                rank_batch.targets[index],
                spec,
                teacher=None if teacher is None else teacher.of(index),
                tp_group=mesh.tp_group,
                memory_bytes=self.loss_memory_bytes,
            )
            found = {"index": index, "logp": logprobs.logp_T.float()}
            if teacher is not None:
                found["divergence"] = token_divergence(logprobs, rank_batch.algorithm).float()
            return found

        self.model.eval()
        microbatches = self._microbatches(batch, rank_batch.microbatches, None)
        parts = run_microbatches(self.ddp, microbatches, mesh, self.model_config, read, forward_only=True)
        self.model.train()
        if not mesh.is_last_stage:
            return {}
        names = ("logp",) if teacher is None else ("logp", "divergence")
        return {name: self._joined(parts, name, len(batch.response_ids)) for name in names}

    def _joined(self, parts: list[dict[str, Tensor]], name: str, size: int) -> Tensor:
        """float32 [R] of the parts' values at their "index", 0 elsewhere. Collective: one over CP."""
        values_R = torch.zeros(size, device=self.mesh.device)
        for part in parts:
            if part:
                values_R[part["index"]] = part[name]
        if self.mesh.cp_size > 1:
            dist.all_reduce(values_R, group=self.mesh.cp_group)
        return values_R

    def snapshot_logprobs(self, rank_batch: RankBatch, *, repeats: bool) -> dict[str, Tensor]:
        """{"old_logp": [R]}: pi_old of the tokens, before the first update of a batch.

        Empty where neither a later update (`repeats`) nor the algorithm's credit reads it, and
        before the last pipeline stage. Collectives: those of `student_logprobs`, or none.
        """
        pg = rank_batch.algorithm.policy_gradient
        if not (
            repeats or (pg is not None and pg.credit is not None and pg.credit.kind in ("return", "margin"))
        ):
            return {}
        now = self.student_logprobs(rank_batch)
        return {"old_logp": now["logp"]} if now else {}

    def _token_weights(
        self, rank_batch: RankBatch, teacher: TeacherSignal, snapshot: dict[str, Tensor], *, is_first: bool
    ) -> TokenWeights:
        """Weights and streams of the tokens of a minibatch, before its first update.

        is_first: of the step's minibatches. Collectives: loss/token_weights.py, `student_logprobs`.
        """
        algorithm = rank_batch.algorithm
        streams = {**rank_batch.streams, **teacher.streams, **snapshot}
        if algorithm.distill is not None and algorithm.distill.token_weight == "scan":
            now = self.student_logprobs(rank_batch, teacher)
            now.pop("logp", None)
            streams |= now
        return token_weights(
            rank_batch.batch,
            streams,
            algorithm,
            observe=partial(self._observe_entropy, is_first=is_first),
            normaliser=(
                algorithm.question_weight.normaliser if rank_batch.mean_weight is None else "dataset"
            ),
            mean_weight=rank_batch.mean_weight or self.dataset_mean,
            room=self.config.rollout.max_response_tokens,
            dp_group=self.mesh.dp_group,
        ).to(self.mesh.device)

    def _with_sequence_ratio(self, rank_batch: RankBatch, weights: TokenWeights) -> TokenWeights:
        """With the stream "sequence_log_ratio" of the student as it is now against pi_old.

        Collectives: `student_logprobs`.
        """
        now = self.student_logprobs(rank_batch)
        if not now:
            return weights
        old_logp_R, lens_N = weights.streams["old_logp"], rank_batch.batch.response_lens
        ratio_R = sequence_log_ratio(now["logp"].cpu(), old_logp_R.cpu(), lens_N).to(now["logp"])
        return replace(weights, streams={**weights.streams, "sequence_log_ratio": ratio_R})

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

    def update(self, batches: list[RankBatch], teacher: list[TeacherSignal]) -> dict[str, float]:
        """All optimizer steps of a batch: its minibatches in order, algorithm.epochs times.

        Returns metrics, the same on every rank: means over the optimizer steps, counts summed over
        minibatches. Raises FloatingPointError when a gradient norm is not finite. Collectives: the
        model's, the gradient reduction over DP x CP, one all-reduce and one broadcast of the
        metrics a step, those of loss/token_weights.py.
        """
        count = len(batches) * batches[0].algorithm.epochs
        snapshots = [self.snapshot_logprobs(rank_batch, repeats=count > 1) for rank_batch in batches]
        weights: list[TokenWeights] = []
        found = []
        for number in range(count):
            start, k = time.perf_counter(), number % len(batches)
            if number < len(batches):
                weights.append(self._token_weights(batches[k], teacher[k], snapshots[k], is_first=k == 0))
            now, pg = weights[k], batches[k].algorithm.policy_gradient
            # Before the first update every ratio is 1.
            if pg is not None and pg.surrogate == "gspo" and number > 0:
                now = self._with_sequence_ratio(batches[k], now)
            metrics = self._optimizer_step(
                batches[k], teacher[k], now, first=number == 0, last=number == count - 1
            )
            found.append(metrics | {"seconds": time.perf_counter() - start})
        return step_metrics(found, len(batches))

    def _optimizer_step(
        self,
        rank_batch: RankBatch,
        teacher: TeacherSignal,
        weights: TokenWeights,
        *,
        first: bool,
        last: bool,
    ) -> dict[str, float]:
        """One optimizer step on one minibatch; global metrics on every rank.

        The learning rate moves before the first of a batch. The teacher follows after the last
        (SDPO 2601.20802).
        """

        def loss_of(microbatch: Microbatch, hidden_Th: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, sums = self._loss(rank_batch, teacher, weights, microbatch, hidden_Th)
            return (*megatron_loss(loss)[:2], sums)

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = self._microbatches(rank_batch.batch, rank_batch.microbatches, None)
        sums = run_microbatches(
            self.ddp, microbatches, self.mesh, self.model_config, loss_of, forward_only=False
        )
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
        metrics = {**rank_batch.metrics, **weights.metrics}
        if last:
            build.whole_parameters(self.ddp)
        if last and self.teacher is not None:
            self.teacher.after_batch(pass_rate=rank_batch.pass_rate, length_tail=rank_batch.length_tail)
            if self.algorithm.teacher.weights in ("snapshot", "gated"):
                metrics |= {"teacher_copies": float(self.teacher.weights.refresh.copies)}
        totals = summed(sums)
        if teacher.kept is not None:
            totals["teacher_mib"] = exact_words(torch.tensor(teacher.num_bytes / 2**20))
        return self._reduce(totals) | {"grad_norm": grad_norm, "lr": learning_rate} | metrics

    def _loss(
        self,
        rank_batch: RankBatch,
        teacher: TeacherSignal,
        weights: TokenWeights,
        microbatch: Microbatch,
        hidden_Th: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        index, valid = microbatch.response_index, microbatch.valid
        streams_T = {name: stream[index] for name, stream in weights.streams.items() if stream.dim() == 1}
        weights_T = {term: weight[index] * valid for term, weight in weights.weights.items()}

        def loss_fn(readout: LogProbs, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            streams, of_terms = (
                {name: t[tokens] for name, t in part.items()} for part in (streams_T, weights_T)
            )
            return objective(readout, streams, of_terms, valid[tokens], rank_batch.algorithm)

        weight_Vh = self.model.output_weight()
        return fused_linear_loss(
            hidden_Th.to(weight_Vh.dtype),
            weight_Vh,
            rank_batch.targets[index],
            rank_batch.spec,
            loss_fn,
            teacher=teacher.of(index),
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

    @property
    def is_fp8(self) -> bool:
        """Whether the model computes in fp8."""
        return self.model_config.fp8 is not None

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


# Metrics that are summed over the minibatches of a step, and over its optimizer steps.
_PER_MINIBATCH = (
    "tokens",
    "taught_tokens",
    "sampled_tokens",
    "informative_questions",
    "teacher_mib",
    "teacher_tflops",
)
_PER_UPDATE = ("seconds", "student_tflops", "recompute_tflops")


def step_metrics(found: list[dict[str, float]], minibatches: int) -> dict[str, float]:
    """One step's metrics from those of its optimizer steps: sums of amounts, means of the others."""
    if len(found) == 1:
        return found[0]
    mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    sums = {name: mean[name] * minibatches for name in _PER_MINIBATCH if name in mean}
    sums |= {name: mean[name] * len(found) for name in _PER_UPDATE if name in mean}
    return found[-1] | mean | sums | {"updates": float(len(found))}


def summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The microbatches' words added up, name by name."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, words in part.items():
            totals[name] = totals[name] + words if name in totals else words
    return totals
