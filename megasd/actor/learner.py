"""The optimizer steps of a batch: token weights, loss, gradients, update, metrics.

R response tokens of a rank batch, T those of one microbatch, V local vocabulary, h hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megasd.actor.model import build_optimizer, whole_parameters
from megasd.actor.parallel import broadcast_tensors
from megasd.actor.rank_batch import RankBatch
from megasd.actor.scoring import student_divergence, student_logprobs
from megasd.actor.student import Student
from megasd.actor.teacher import Teacher
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch.microbatch import Microbatch
from megasd.config.schema import Config
from megasd.config.variants import credit_traits, surrogate_traits, token_weight_traits
from megasd.loss.exact_sum import exact_words, reduce_metrics
from megasd.loss.megatron_scaling import megatron_loss
from megasd.loss.objective import METRIC_WEIGHTS, objective
from megasd.loss.sequence_stats import sequence_log_ratio
from megasd.loss.token_weights import TokenWeights, entropy_gate, token_weights
from megasd.ops.fused_linear_loss import fused_linear_loss
from megasd.ops.vocab_parallel import LogProbs

# metrics that are summed over the minibatches of a step
_PER_MINIBATCH = (
    "tokens",
    "taught_tokens",
    "sampled_tokens",
    "informative_questions",
    "teacher_mib",
    "teacher_tflops",
)
# metrics that are summed over the optimizer steps of a step
_PER_UPDATE = ("seconds", "student_tflops", "recompute_tflops")


class Learner:
    """The student's optimizer and learning-rate schedule, and the algorithm's entropy gate."""

    def __init__(self, config: Config, student: Student, teacher: Teacher) -> None:
        self.student, self.teacher = student, teacher
        self.optimizer, self.scheduler = build_optimizer(
            student.ddp, config.optimizer, config.actor, config.run.steps
        )
        self.max_response_tokens = config.rollout.max_response_tokens
        # a checkpoint saves the gate; `update` moves it once a batch
        self.gate, self.gate_is_open = entropy_gate(config.algorithm), False

    def update(self, batches: list[RankBatch], signals: list[TeacherSignal]) -> dict[str, float]:
        """All optimizer steps of a batch: its minibatches in order, algorithm.epochs times.

        Returns metrics, the same on every rank: means over the optimizer steps, amounts summed over
        minibatches. Raises FloatingPointError when a gradient norm is not finite. Collectives: the
        model's, the gradient reduction over DP x CP, one all-reduce and one broadcast of the
        metrics an optimizer step, those of loss/token_weights.py.
        """
        count = len(batches) * batches[0].algorithm.epochs
        snapshots = [self.snapshot_logprobs(rank_batch, repeats=count > 1) for rank_batch in batches]
        weights: list[TokenWeights] = []
        found = []
        for number in range(count):
            start, k = time.perf_counter(), number % len(batches)
            rank_batch, signal = batches[k], signals[k]
            if number < len(batches):
                weights.append(self._token_weights(rank_batch, signal, snapshots[k], is_first=k == 0))
            # Before the first update the ratio of every sequence is 1.
            now = weights[k] if number == 0 else self._with_sequence_ratio(rank_batch, weights[k])
            metrics = self._optimizer_step(
                rank_batch, signal, now, first=number == 0, last=number == count - 1
            )
            found.append(metrics | {"seconds": time.perf_counter() - start})
        return step_metrics(found, len(batches))

    def snapshot_logprobs(self, rank_batch: RankBatch, *, repeats: bool) -> dict[str, Tensor]:
        """{"old_logp": [R]}: pi_old of the tokens, before the first update of a batch.

        Empty where neither a later update (`repeats`) nor the algorithm's credit reads it, and
        before the last pipeline stage. Collectives: those of `student_logprobs`, or none.
        """
        if not repeats and not credit_traits(rank_batch.algorithm).needs_old_logp:
            return {}
        return {"old_" + name: values_R for name, values_R in self._logprobs(rank_batch).items()}

    def _logprobs(self, rank_batch: RankBatch) -> dict[str, Tensor]:
        return student_logprobs(self.student, rank_batch)

    def _token_weights(
        self,
        rank_batch: RankBatch,
        signal: TeacherSignal,
        snapshot: Mapping[str, Tensor],
        *,
        is_first: bool,
    ) -> TokenWeights:
        """Weights and streams of the tokens of a minibatch, before its first update.

        is_first: of the step's minibatches. Collectives: loss/token_weights.py, and those of
        `student_divergence` where the algorithm's token weights read it.
        """
        device = self.student.mesh.device
        streams = {**rank_batch.streams, **signal.streams, **snapshot}
        if token_weight_traits(rank_batch.algorithm).reads_divergence:
            streams |= student_divergence(self.student, rank_batch, signal)
        return token_weights(
            rank_batch.batch,
            streams,
            rank_batch.algorithm,
            observe=partial(self._observe_entropy, is_first=is_first),
            normaliser=rank_batch.normaliser,
            mean_weight=rank_batch.mean_weight,
            room=self.max_response_tokens,
            dp_group=self.student.mesh.dp_group,
        ).to(device)

    def _with_sequence_ratio(self, rank_batch: RankBatch, weights: TokenWeights) -> TokenWeights:
        """The weights, with the stream "sequence_log_ratio" where the surrogate reads it.

        The stream is the log-ratio of whole sequences, of the student as it is now against pi_old.
        Collectives: those of `student_logprobs` for such a surrogate, else none.
        """
        if not surrogate_traits(rank_batch.algorithm).reads_sequence_ratio:
            return weights
        streams, lens_N = dict(weights.streams), rank_batch.batch.response_lens
        for logp_R in self._logprobs(rank_batch).values():
            ratio_R = sequence_log_ratio(logp_R.cpu(), streams["old_logp"].cpu(), lens_N)
            streams["sequence_log_ratio"] = ratio_R.to(logp_R)
        return replace(weights, streams=streams)

    def _observe_entropy(self, median: float | None, *, is_first: bool) -> tuple[bool, float]:
        """(is the gate open, the median entropy of the teacher), the same on every rank.

        The first minibatch of a batch moves the gate. median: None on a rank that sees no logits.
        Collective: one broadcast from the last pipeline stage.
        """
        source = self.student.mesh.reporter
        sent = {"median": torch.tensor(math.nan if median is None else median, dtype=torch.float64)}
        seen = float(broadcast_tensors(sent, source)["median"])
        if is_first:
            self.gate_is_open = self.gate.observe(seen)
        return self.gate_is_open, seen

    def _optimizer_step(
        self,
        rank_batch: RankBatch,
        signal: TeacherSignal,
        weights: TokenWeights,
        *,
        first: bool,
        last: bool,
    ) -> dict[str, float]:
        """One optimizer step on one minibatch; global metrics on every rank.

        The learning rate moves before the first step of a batch. The teacher follows after the last
        (SDPO 2601.20802).
        """
        student = self.student

        def loss_of(microbatch: Microbatch, hidden_Th: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, words = self._loss(rank_batch, signal, weights, microbatch, hidden_Th)
            return (*megatron_loss(loss)[:2], words)

        student.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = student.microbatches(rank_batch.batch, rank_batch.microbatches)
        totals = _summed(student.forward_backward(microbatches, loss_of))
        if first:
            # Before the step, so that a warm-up starts at lr / warm-up steps and not at zero.
            self.scheduler.step(increment=1)
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        _, norm, _ = self.optimizer.step()
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm}: the step is not trustworthy; resume from the last checkpoint"
            )
        metrics = {**rank_batch.metrics, **weights.metrics}
        if last:
            whole_parameters(student.ddp)
            metrics |= self.teacher.weights.update(rank_batch.outcome)
        if signal.kept is not None:
            totals["teacher_mib"] = exact_words(torch.tensor(signal.num_bytes / 2**20))
        return self._reduce(totals) | {"grad_norm": grad_norm, "lr": learning_rate} | metrics

    def _loss(
        self,
        rank_batch: RankBatch,
        signal: TeacherSignal,
        weights: TokenWeights,
        microbatch: Microbatch,
        hidden_Th: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss of a microbatch, words of its metrics by name). Collectives: over TP."""
        student, index, valid = self.student, microbatch.response_index, microbatch.valid
        streams_T = {name: stream[index] for name, stream in weights.streams.items() if stream.dim() == 1}
        weights_T = {term: weight[index] * valid for term, weight in weights.weights.items()}

        def loss_fn(logprobs: LogProbs, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            streams, of_terms = (
                {name: t[tokens] for name, t in part.items()} for part in (streams_T, weights_T)
            )
            return objective(logprobs, streams, of_terms, valid[tokens], rank_batch.algorithm)

        weight_Vh = student.model.output_weight()
        return fused_linear_loss(
            hidden_Th.to(weight_Vh.dtype),
            weight_Vh,
            rank_batch.targets[index],
            rank_batch.spec,
            loss_fn,
            teacher=signal.of(index),
            tp_group=student.mesh.tp_group,
            memory_bytes=student.loss_memory_bytes,
            reduce_hidden_grad=not student.actor.sequence_parallel,
        )

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Metrics from the ranks' words, on every rank: sums, or means per token.

        Collectives: one all_reduce over the data- and context-parallel ranks of the last stage, one
        broadcast from there.
        """
        from megatron.core import parallel_state

        mesh, reduced = self.student.mesh, {}
        if mesh.is_last_stage:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            counts = {name: METRIC_WEIGHTS.get(name, "tokens") for name in totals}
            counts = {name: by for name, by in counts.items() if by}
            reduced = reduce_metrics(totals, counts, group=group, device=mesh.device)
        sent = {name: torch.tensor(value, dtype=torch.float64) for name, value in reduced.items()}
        return {name: float(value) for name, value in broadcast_tensors(sent, mesh.reporter).items()}


def step_metrics(found: list[dict[str, float]], num_minibatches: int) -> dict[str, float]:
    """The metrics of a step from those of its optimizer steps: sums of amounts, means of the rest."""
    if len(found) == 1:
        return found[0]
    mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    sums = {name: mean[name] * num_minibatches for name in _PER_MINIBATCH if name in mean}
    sums |= {name: mean[name] * len(found) for name in _PER_UPDATE if name in mean}
    return found[-1] | mean | sums | {"updates": float(len(found))}


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The microbatches' words added up, name by name."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, words in part.items():
            totals[name] = totals[name] + words if name in totals else words
    return totals
