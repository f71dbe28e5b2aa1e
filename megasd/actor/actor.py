"""The actor: a Megatron model that learns, scores, saves and exports.

It never learns the name of the algorithm. A step, on every rank alike:

    batches = actor.shard(batch, algorithm)    # this rank's part of each minibatch
    teacher = actor.teacher_forward(batches)   # forward only, another context, other weights
    metrics = actor.update(batches, teacher)   # minibatches x epochs of optimizer steps

R response tokens of the samples on this rank, K top-k.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.actor import checkpoint, cpu_backend, megatron_patches, rank_batch, scoring
from megasd.actor import model as build
from megasd.actor.learner import Learner
from megasd.actor.parallel import Mesh, broadcast_tensors
from megasd.actor.rank_batch import RankBatch
from megasd.actor.static_shapes import init_user_buffers
from megasd.actor.student import Student
from megasd.actor.teacher import build_teacher
from megasd.actor.teacher_forward import teacher_forward
from megasd.actor.teacher_signal import TeacherSignal
from megasd.batch.batch import Batch
from megasd.batch.shard import make_costs
from megasd.config.schema import AlgorithmConfig, Config
from megasd.config.validate_actor import sequence_multiple
from megasd.models import registry
from megasd.weights.export import BUCKET_BYTES, export_hf, plan_of
from megasd.weights.gather import Gather
from megasd.weights.hf_files import HFWriter, read_hf_config


class Actor:
    """Student, teacher and optimizer on this rank.

    Every method is collective unless it says otherwise: call it on all ranks, in the same order.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Build everything from config.model.path, weights included.

        Raises UserError for unsupported or broken model files.
        """
        cpu_backend.install_cpu_backend()
        megatron_patches.install_megatron_patches()
        self.config, self.mesh, self.algorithm = config, mesh, config.algorithm
        # mean question weight of the training rows, where question_weight.normaliser=dataset
        self.dataset_mean: float | None = None
        self.hf_config = read_hf_config(config.model.path)
        self.num_experts = registry.param_table(self.hf_config).num_experts
        family = build.family_of(config.model.path)
        self.vocab_size = family.vocab_size
        self.model_config = build.transformer_config(family, config.actor, mesh.device)
        init_user_buffers(config, self.model_config, mesh)
        self.model = build.build_model(family, self.model_config, config.actor, mesh)
        build.load_pretrained(self.model, self.model_config, config.model.path, mesh)
        self.ddp = build.wrap_data_parallel(self.model, self.model_config, config.actor)
        self.student = Student(
            self.ddp,
            self.model,
            self.model_config,
            mesh,
            config.actor,
            sequence_multiple(config),
            self.vocab_size,
        )
        self.teacher = build_teacher(self.algorithm.teacher, self.student)
        self.costs = make_costs(config, self.hf_config, len(self.teacher.passes))
        self.learner = Learner(config, self.student, self.teacher)
        self.optimizer, self.gate = self.learner.optimizer, self.learner.gate

    # ---- a training step ----

    def shard(self, batch: Batch, algorithm: AlgorithmConfig | None = None) -> list[RankBatch]:
        """This rank's part of each minibatch of the step, in order (actor/rank_batch.py).

        algorithm: as it stands in this step (algo/stages.py); None: as configured. No collective.
        """
        return rank_batch.shard(
            batch,
            algorithm or self.algorithm,
            self.costs,
            self.mesh,
            sampling_temperature=self.config.rollout.temperature,
            vocab_size=self.vocab_size,
            dataset_mean=self.dataset_mean,
        )

    def teacher_forward(self, batches: list[RankBatch]) -> list[TeacherSignal]:
        """What the student's pass over each minibatch reads of the teacher.

        An algorithm without a teacher gives empty signals. Collectives: actor/teacher_forward.py.
        """
        return teacher_forward(self.student, self.teacher, batches)

    def update(self, batches: list[RankBatch], teacher: list[TeacherSignal]) -> dict[str, float]:
        """All optimizer steps of a batch; metrics, the same on every rank.

        Raises FloatingPointError when a gradient norm is not finite. Collectives: actor/learner.py.
        """
        return self.learner.update(batches, teacher)

    # ---- scoring ----

    def score(self, batch: Batch, *, top_k: int, temperature: float = 1.0) -> dict[str, Tensor]:
        """The live model's view of every response token [R] of a batch that every rank runs whole.

        "logp" of the token and "entropy", float32, nats; "ids" int64 and "logps" float32 [R, K] of
        the K most likely tokens. The dict is empty before the last pipeline stage. Collectives:
        actor/scoring.py.
        """
        return scoring.score(self.student, self.costs, batch, top_k=top_k, temperature=temperature)

    @property
    def is_fp8(self) -> bool:
        """Whether the model computes in fp8."""
        return self.model_config.fp8 is not None

    def score_tokens(self, ids: list[int]) -> list[float]:
        """Log-prob (nats, temperature 1) of ids[1:], each given its prefix, on every rank.

        Collectives: those of `score`, and a broadcast from the last pipeline stage.
        """
        found = self.score(scoring.batch_of_one(ids), top_k=1)
        sent = {"logp": found["logp"].cpu()} if dist.get_rank() == self.mesh.reporter else None
        return broadcast_tensors(sent, self.mesh.reporter)["logp"].tolist()

    # ---- weights and checkpoints ----

    def free_cache(self) -> None:
        """Give the memory that torch's allocator keeps back to the GPU, for an engine on it.

        No collective.
        """
        if self.mesh.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def params(self) -> dict[str, Tensor]:
        """This rank's live parameters under global names. No collective."""
        return build.named_params(self.model, self.model_config, self.num_experts, self.mesh)

    def gather(
        self,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        make_buffer: Callable[[int], Tensor] | None = None,
    ) -> Gather:
        """The transfers that put whole Hugging Face tensors together on world rank 0.

        weights/gather.py runs them. dtype: of the tensors; None: as they are. make_buffer: gives a
        buffer of so many bytes. Collectives: the plan's exchange.
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
        """Write a Hugging Face directory on world rank 0, a bucket at a time.

        Collectives: the plan's exchange, the gather's messages.
        """
        tensors = export_hf(self.gather())
        if self.mesh.rank != 0:
            # This rank sends its pieces while it iterates, and gets no tensor.
            for _ in tensors:
                pass
            return
        with HFWriter(out_dir, self.config.model.path) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)

    def save(self, directory: Path, step: int, state: dict) -> Path:
        """Write model, optimizer, teacher, schedule and RNG to `<directory>/step-<step>`.

        state: rank 0's JSON-able dict. Collectives: actor/checkpoint.py.
        """
        return checkpoint.save(directory, step, state, self._parts(), keep=self.config.checkpoint.keep)

    def load(self, path: Path) -> dict:
        """Restore a checkpoint; returns the state dict that was saved with it.

        Collectives: actor/checkpoint.py.
        """
        return checkpoint.load(path, self._parts())

    def _parts(self) -> checkpoint.Parts:
        return checkpoint.Parts(
            self.model, self.learner.optimizer, self.learner.scheduler, self.teacher.weights, self.mesh
        )
