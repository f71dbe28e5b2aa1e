"""What the student says about tokens before it learns from them, forward only.

R response tokens of the samples on this rank, K top-k, h hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megasd.actor.rank_batch import RankBatch
from megasd.actor.student import Student
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch.batch import Batch
from megasd.batch.shard import Costs, microbatches_in_order
from megasd.loss.objective import token_divergence
from megasd.ops.vocab_parallel import LogProbsSpec


def student_logprobs(student: Student, rank_batch: RankBatch) -> dict[str, Tensor]:
    """{"logp": float32 [R]}: the student's log-prob (nats) of every sampled token.

    It is 0 for samples that need no forward. The dict is empty before the last pipeline stage.
    Collectives: the model's, ops/vocab_parallel.py, one all_reduce over CP.
    """
    spec = replace(rank_batch.spec, support="none")

    def read(index_T: Tensor, hidden_Th: Tensor) -> dict[str, Tensor]:
        logprobs = student.logprobs(hidden_Th, rank_batch.targets[index_T], spec)
        assert logprobs.logp_T is not None, "targets were given"
        return {"logp": logprobs.logp_T}

    found = student.read_tokens(rank_batch.batch, rank_batch.microbatches, {"logp": ()}, read)
    return {name: values_R.float() for name, values_R in found.items()}


def student_divergence(student: Student, rank_batch: RankBatch, teacher: TeacherSignal) -> dict[str, Tensor]:
    """{"divergence": float32 [R]}: every token's distillation loss (nats) before any weight.

    It is 0 for samples that need no forward. The dict is empty before the last pipeline stage.
    Collectives: the model's, ops/vocab_parallel.py, one all_reduce over CP.
    """
    term = rank_batch.algorithm.distill
    assert term is not None, "a divergence is read where there is distillation"

    def read(index_T: Tensor, hidden_Th: Tensor) -> dict[str, Tensor]:
        targets_T = rank_batch.targets[index_T]
        logprobs = student.logprobs(hidden_Th, targets_T, rank_batch.spec, teacher.of(index_T))
        return {"divergence": token_divergence(logprobs, term)}

    found = student.read_tokens(rank_batch.batch, rank_batch.microbatches, {"divergence": ()}, read)
    return {name: values_R.float() for name, values_R in found.items()}


def score(
    student: Student, costs: Costs, batch: Batch, *, top_k: int, temperature: float
) -> dict[str, Tensor]:
    """The student's view of every response token [R] of a batch that every rank runs whole.

    "logp" of the token and "entropy", float32, nats; "ids" int64 and "logps" float32 [R, K] of the
    K most likely tokens. The dict is empty before the last pipeline stage. Logits are never
    gathered. Collectives: the model's, ops/vocab_parallel.py, four all_reduces over CP.
    """
    k, targets = min(top_k, student.vocab_size), batch.response_ids.to(student.mesh.device)
    spec = LogProbsSpec(vocab_size=student.vocab_size, top_k=k, tail="raw", temperature=temperature)

    def read(index_T: Tensor, hidden_Th: Tensor) -> dict[str, Tensor]:
        logprobs = student.logprobs(hidden_Th, targets[index_T], spec)
        logp_T, entropy_T = logprobs.logp_T, logprobs.entropy_T
        ids_TK, logq_TK = logprobs.ids_TA, logprobs.student_logq_TB
        assert logp_T is not None and entropy_T is not None, "targets were given"
        assert ids_TK is not None and logq_TK is not None, "the support is the student's top k"
        return {"logp": logp_T, "entropy": entropy_T, "ids": ids_TK, "logps": logq_TK}

    shapes: dict[str, tuple[int, ...]] = {"logp": (), "entropy": (), "ids": (k,), "logps": (k,)}
    found = student.read_tokens(batch, microbatches_in_order(batch, costs), shapes, read)
    return {name: values_R.long() if name == "ids" else values_R.float() for name, values_R in found.items()}


def batch_of_one(ids: list[int]) -> Batch:
    """A batch of one sample: the first token is its prompt, all later ones are its response."""
    return Batch(
        prompt_ids=torch.tensor(ids[:1]),
        prompt_lens=torch.tensor([1]),
        context_ids=torch.zeros(0, dtype=torch.int64),
        context_lens=torch.tensor([[0]]),
        response_ids=torch.tensor(ids[1:]),
        response_lens=torch.tensor([len(ids) - 1]),
        question_weight=torch.ones(1, dtype=torch.float64),
        question_size=torch.ones(1, dtype=torch.int64),
        scored=torch.ones(1, dtype=torch.bool),
    )
