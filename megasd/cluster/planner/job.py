"""A config on given GPUs, and the lengths that everything is reckoned with.

Memory is reckoned for the worst step: every prompt and every response as long as the config allows.
Time is reckoned for a mean one: MEAN_PROMPT and MEAN_RESPONSE of those lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from megasd.cluster.planner.hardware import GpuKind
from megasd.cluster.planner.shapes import Model
from megasd.config.schema import Config, samples_per_step
from megasd.config.validate_actor import sequence_multiple
from megasd.config.validate_parallel import data_parallel_size
from megasd.config.validate_rollout import needs_engine
from megasd.config.variants import CONTEXT_TRAITS

# Assumptions: shares of rollout.max_prompt_tokens and max_response_tokens that a step's mean sample takes.
MEAN_PROMPT, MEAN_RESPONSE = 0.5, 0.5
# teachers with fp32 weights of their own (actor/teacher.py)
SHADOWED = ("ema", "frozen", "snapshot", "gated", "trust_region")


@dataclass(frozen=True)
class PlannedRun:
    """gpus: those that train, a rank on each. engine_gpus: engines' own; 0 = engines share the
    first node of the actor's.
    """

    config: Config
    model: Model
    gpu: GpuKind
    gpus: int
    engine_gpus: int = 0
    # of algorithm.teacher.weights=separate
    teacher: Model | None = None

    def change(self, **values: Any) -> PlannedRun:
        """With other values of dotted config keys, their dots written as "__"."""
        config = self.config
        for key, value in values.items():
            config = _set(config, key.split("__"), value)
        return replace(self, config=config)

    # ---- layout ----

    @property
    def pp(self) -> int:
        return self.config.actor.pipeline_model_parallel_size

    @property
    def tp(self) -> int:
        return self.config.actor.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.config.actor.context_parallel_size

    @property
    def ep(self) -> int:
        return self.config.actor.expert_model_parallel_size

    @property
    def dp(self) -> int:
        """Raises ConfigError where the GPUs cannot be split so."""
        return data_parallel_size(self.config, self.gpus)

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.gpus // (self.ep * self.pp * (self.tp if self.ep == 1 else 1)))

    @property
    def sp(self) -> int:
        """Parts that sequence parallelism cuts the activations between tensor-parallel regions into."""
        return self.tp if self.config.actor.sequence_parallel else 1

    @property
    def word(self) -> int:
        """Bytes of the model's dtype."""
        return 4 if self.config.actor.dtype == "float32" else 2

    # ---- engines ----

    @property
    def samples_itself(self) -> bool:
        """Whether the run has engines of its own to plan for (engines by URL are someone else's)."""
        return needs_engine(self.config) and not self.config.rollout.engine.urls

    @property
    def colocated(self) -> bool:
        return self.samples_itself and self.engine_gpus == 0

    @property
    def engines(self) -> int:
        engine = self.config.rollout.engine
        return self.engine_gpus // engine.tensor_parallel_size if self.engine_gpus else engine.num_engines

    # ---- lengths (tokens) ----

    @property
    def samples(self) -> int:
        """Of a data-parallel rank and optimizer step."""
        return max(1, samples_per_step(self.config) // self.dp // self.config.algorithm.minibatches)

    def length(self, prompt: int, response: int) -> int:
        multiple = sequence_multiple(self.config)
        return -(-(prompt + response) // multiple) * multiple

    @property
    def longest(self) -> int:
        """A sequence of the student at most, padding included."""
        rollout = self.config.rollout
        return self.length(rollout.max_prompt_tokens, rollout.max_response_tokens)

    @property
    def context(self) -> float:
        """What the teacher reads beside the student's prompt, in responses: demonstrations, or a
        row's solution, taken to be as long.
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
        """A sequence of the teacher at most; longer ones stay untaught (batch/build.py)."""
        rollout = self.config.rollout
        length = self.length(
            rollout.max_prompt_tokens + int(self.context * rollout.max_response_tokens),
            rollout.max_response_tokens,
        )
        return min(length, int(self.model.hf.get("max_position_embeddings") or length))

    @property
    def mean_prompt(self) -> float:
        return MEAN_PROMPT * self.config.rollout.max_prompt_tokens

    @property
    def mean_response(self) -> float:
        return MEAN_RESPONSE * self.config.rollout.max_response_tokens

    def rows(self, longest: int) -> int:
        """Samples of a microbatch of the longest sequences."""
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
        """Of a mean step; within a token budget as many as there are pipeline stages, if samples
        last (partition.by_tokens).
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
        """Largest microbatches of the longest sequences that a pipeline stage holds at once, no
        more than the rank's share has tokens.
        """
        count = -(-self.samples // self.rows(self.longest))
        if self.config.actor.max_tokens_per_microbatch is not None:
            count = max(count, min(self.pp, self.samples))
        share = self.samples * self.longest / self.cp / self.tokens(self.longest)
        return min(self.pp - stage, count, max(1.0, share))

    # ---- what the algorithm asks for ----

    @property
    def has_teacher(self) -> bool:
        algorithm = self.config.algorithm
        credit = algorithm.policy_gradient is not None and algorithm.policy_gradient.credit is not None
        return algorithm.teacher is not None and (algorithm.distill is not None or credit)

    @property
    def teacher_model(self) -> Model:
        return self.teacher or self.model

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher over a step's samples: contexts, and both of a trust
        region's weights.
        """
        if not self.has_teacher:
            return 0
        teacher, pg = self.config.algorithm.teacher, self.config.algorithm.policy_gradient
        contrasts = (
            teacher.num_contrasts if teacher.contrast == "failures" else int(teacher.contrast != "none")
        )
        contexts = 1 + (contrasts if pg is not None and pg.credit is not None else 0)
        return contexts * (2 if teacher.weights == "trust_region" else 1)


def _set(section: Any, path: list[str], value: Any) -> Any:
    assert is_dataclass(section) and path[0] in {item.name for item in fields(section)}, path
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})


def headline(job: PlannedRun, hf: Mapping[str, Any]) -> str:
    """One line about what is planned."""
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
