"""PlannedRun: a config on given GPUs, with the sizes and lengths that the planner's formulas use.

Memory is computed for the worst step: every prompt and every response is as long as the config
allows. Time is computed for a mean step: lengths are MEAN_PROMPT and MEAN_RESPONSE of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megasd.cluster.planner.hardware import GpuKind
from megasd.cluster.planner.shapes import Model
from megasd.config.schema import Config, TeacherConfig, samples_per_step
from megasd.config.validate_actor import sequence_multiple
from megasd.config.validate_parallel import data_parallel_size
from megasd.config.validate_rollout import needs_engine
from megasd.config.variants import CONTEXT_TRAITS

# Assumptions: mean length of a step's prompts and responses, as a part of
# rollout.max_prompt_tokens and rollout.max_response_tokens.
MEAN_PROMPT, MEAN_RESPONSE = 0.5, 0.5
# Values of algorithm.teacher.weights for which the actor keeps an fp32 copy (actor/teacher.py).
TEACHERS_WITH_FP32_COPY = ("ema", "frozen", "snapshot", "gated", "trust_region")


@dataclass(frozen=True)
class PlannedRun:
    """A config on given GPUs.

    gpus: GPUs that train, one rank on each. engine_gpus: GPUs that only engines use; 0 means that
    engines share the first node of the actor. teacher: the model of
    algorithm.teacher.weights=separate.

    This class has many properties on purpose: each is one quantity that the formulas of memory.py,
    activations.py and time.py name, is computed from the config in a line or two, and holds no
    state. The formulas read like the papers that they come from.
    """

    config: Config
    model: Model
    gpu: GpuKind
    gpus: int
    engine_gpus: int = 0
    teacher: Model | None = None

    def change(self, **values: Any) -> PlannedRun:
        """The same run with other config values: keyword a__b=1 sets the key a.b to 1."""
        config = self.config
        for key, value in values.items():
            config = _set(config, key.split("__"), value)
        return replace(self, config=config)

    # ---- layout ----

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.config.actor.pipeline_model_parallel_size

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.config.actor.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.config.actor.context_parallel_size

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return self.config.actor.expert_model_parallel_size

    @property
    def dp(self) -> int:
        """Data-parallel ranks. Raises ConfigError if the GPUs cannot be split this way."""
        return data_parallel_size(self.config, self.gpus)

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same experts."""
        return max(1, self.gpus // (self.ep * self.pp * (self.tp if self.ep == 1 else 1)))

    @property
    def sp(self) -> int:
        """Ranks over which sequence parallelism cuts activations (2205.05198); 1 without it."""
        return self.tp if self.config.actor.sequence_parallel else 1

    @property
    def word(self) -> int:
        """Bytes of one number in the model's dtype."""
        return 4 if self.config.actor.dtype == "float32" else 2

    # ---- engines ----

    @property
    def samples_itself(self) -> bool:
        """Whether the planner counts engines: the run samples, and not from rollout.engine.urls."""
        return needs_engine(self.config) and not self.config.rollout.engine.urls

    @property
    def colocated(self) -> bool:
        """Whether engines share GPUs with the actor."""
        return self.samples_itself and self.engine_gpus == 0

    @property
    def engines(self) -> int:
        """Number of engines."""
        engine = self.config.rollout.engine
        return self.engine_gpus // engine.tensor_parallel_size if self.engine_gpus else engine.num_engines

    # ---- lengths (tokens) ----

    @property
    def samples(self) -> int:
        """Samples of a data-parallel rank in one optimizer step."""
        return max(1, samples_per_step(self.config) // self.dp // self.config.algorithm.minibatches)

    def length(self, prompt: int, response: int) -> int:
        """Tokens of a sequence, with the padding that its parallel layout needs."""
        multiple = sequence_multiple(self.config)
        return -(-(prompt + response) // multiple) * multiple

    @property
    def longest(self) -> int:
        """Tokens of the student's longest sequence, padding included."""
        rollout = self.config.rollout
        return self.length(rollout.max_prompt_tokens, rollout.max_response_tokens)

    @property
    def context(self) -> float:
        """What the teacher reads in addition to the student's prompt, in responses.

        These are demonstrations or the solution of a data row; each is taken to be as long as a
        response.
        """
        teacher = self.config.algorithm.teacher
        if teacher is None:
            return 0.0
        traits = CONTEXT_TRAITS[teacher.context]
        if traits.shows_siblings:
            return float(teacher.num_demonstrations)
        return 1.0 if traits.shows_solution else 0.0

    @property
    def longest_teacher(self) -> int:
        """Tokens of the teacher's longest sequence.

        batch/build.py gives no teacher context to samples whose sequence would be longer.
        """
        rollout = self.config.rollout
        length = self.length(
            rollout.max_prompt_tokens + int(self.context * rollout.max_response_tokens),
            rollout.max_response_tokens,
        )
        return min(length, int(self.model.hf.get("max_position_embeddings") or length))

    @property
    def mean_prompt(self) -> float:
        """Tokens of a mean prompt."""
        return MEAN_PROMPT * self.config.rollout.max_prompt_tokens

    @property
    def mean_response(self) -> float:
        """Tokens of a mean response."""
        return MEAN_RESPONSE * self.config.rollout.max_response_tokens

    def rows(self, longest: int) -> int:
        """Samples in a microbatch whose sequences all have `longest` tokens."""
        actor = self.config.actor
        if actor.max_tokens_per_microbatch is None:
            return min(actor.micro_batch_size, self.samples)
        return min(max(1, actor.max_tokens_per_microbatch // longest), self.samples)

    def tokens(self, longest: int) -> int:
        """Tokens of the largest microbatch on a context-parallel rank."""
        budget, whole = self.config.actor.max_tokens_per_microbatch, self.rows(longest) * longest
        if budget is not None and self.config.actor.packing:
            whole = min(max(budget, longest), self.samples * longest)
        return -(-whole // self.cp)

    @property
    def microbatches(self) -> int:
        """Microbatches of a data-parallel rank in one optimizer step of mean lengths.

        With a token budget there are at least as many as pipeline stages, if there are enough
        samples (batch/balance.py: by_tokens).
        """
        actor = self.config.actor
        if actor.max_tokens_per_microbatch is None:
            return -(-self.samples // actor.micro_batch_size)
        mean = self.length(int(self.mean_prompt), int(self.mean_response))
        return max(
            1,
            -(-int(self.samples * mean) // max(actor.max_tokens_per_microbatch, mean)),
            min(self.pp, self.samples),
        )

    def in_flight(self, stage: int) -> float:
        """Microbatches that a pipeline stage holds at once, counted in largest microbatches.

        The stage never holds more tokens than the rank's samples have.
        """
        count = -(-self.samples // self.rows(self.longest))
        if self.config.actor.max_tokens_per_microbatch is not None:
            count = max(count, min(self.pp, self.samples))
        all_samples = self.samples * self.longest / self.cp / self.tokens(self.longest)
        return min(self.pp - stage, count, max(1.0, all_samples))

    # ---- what the algorithm needs ----

    @property
    def has_credit(self) -> bool:
        """Whether the teacher's log-probs weight the policy gradient of each token."""
        term = self.config.algorithm.policy_gradient
        return term is not None and term.credit is not None

    @property
    def active_teacher(self) -> TeacherConfig | None:
        """The config's teacher if a loss reads it, else None."""
        algorithm = self.config.algorithm
        return algorithm.teacher if algorithm.distill is not None or self.has_credit else None

    @property
    def teacher_model(self) -> Model:
        """The model whose sizes the teacher has."""
        return self.teacher or self.model

    @property
    def teacher_forwards(self) -> int:
        """Forwards of the teacher over a step's samples: one for each context.

        A trust region has two sets of weights, and each reads every context.
        """
        teacher = self.active_teacher
        if teacher is None:
            return 0
        contrasts = (
            teacher.num_contrasts if teacher.contrast == "failures" else int(teacher.contrast != "none")
        )
        contexts = 1 + (contrasts if self.has_credit else 0)
        return contexts * (2 if teacher.weights == "trust_region" else 1)


def _set(section: Any, path: list[str], value: Any) -> Any:
    assert path[0] in {item.name for item in fields(section)}, path
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})


def headline(job: PlannedRun, hf: Mapping[str, Any]) -> str:
    """One line that says which model is planned on which GPUs."""
    engines = (
        f"{job.engine_gpus} GPUs for engines"
        if job.engine_gpus
        else "engines on the same GPUs"
        if job.colocated
        else "no engines"
    )
    billions = job.model.weights / 1e9
    return (
        f"{hf.get('model_type')} of {billions:.2f} billion weights on {job.gpus} {job.gpu.name} that train,"
        f" {engines}"
    )
