"""The state of the algorithm that rank 0 keeps between steps.

It holds pass rates by question, earlier right samples, moments of rewards, and the controller of
teacher.adaptive_prefix.

    state = AlgorithmState(config.algorithm, seed=1, steps=100)
    state.pass_rate(group, algorithm.question_weight)
    state.observe(groups); state.after_step(metrics)

A part is kept only if some stage of the algorithm reads it. Plain Python; the controller imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megasd.algo.advantage import ADVANTAGES, Whitener
from megasd.algo.question_weight import question_weight
from megasd.algo.stages import averages, variants
from megasd.config.schema import AlgorithmConfig, QuestionWeightConfig
from megasd.types import Group, Prompt, UserError, Verdict

if TYPE_CHECKING:
    from megasd.algo.prefix_controller import PrefixController


class AlgorithmState:
    """The algorithm's state of a run between steps.

    seed       run.seed
    averaged   prompt id -> pass rate averaged over visits; None where no stage reads it
    frozen     prompt id -> pass rate of the start model; None before it is estimated
    buffer     prompt id -> text of the latest right sample of an earlier step (DRIFT 2606.30345);
               None where no stage reads it
    whitener   moments of rewards (EGRSD 2605.13255); None where no stage reads them
    exposure   the controller of teacher.adaptive_prefix (ATESD 2605.11458); None without one
    """

    def __init__(self, algorithm: AlgorithmConfig, *, seed: int, steps: int | None = None) -> None:
        """Start with an empty state.

        algorithm: as configured, stages included. steps: length of the run, for the controller.
        """
        self.algorithm, self.seed = algorithm, seed
        stages = variants(algorithm)
        teachers = [one.teacher for one in stages if one.teacher is not None]
        self.averaged: dict[str, float] | None = {} if any(averages(one) for one in stages) else None
        self.frozen: dict[str, float | None] | None = None
        self.buffer: dict[str, str] | None = (
            {} if any(teacher.fallback == "buffer" for teacher in teachers) else None
        )
        whitens = any(
            one.policy_gradient is not None and ADVANTAGES[one.policy_gradient.advantage].reads_moments
            for one in stages
        )
        self.whitener = Whitener() if whitens else None
        self.exposure: PrefixController | None = None
        adaptive = [teacher for teacher in teachers if teacher.adaptive_prefix]
        if adaptive:
            from megasd.algo.prefix_controller import PrefixController

            self.exposure = PrefixController(seed=seed, start=adaptive[0].prefix_fraction, steps=steps)

    # ---- pass rates ----

    @property
    def has_frozen(self) -> bool:
        """Whether the start model's pass rates have been given."""
        return self.frozen is not None

    def set_frozen(self, rates: Mapping[str, float | None]) -> None:
        """Set the start model's pass rates by prompt id (PACED 2603.11178).

        The rate is None if no verifier could score the question.
        """
        self.frozen = dict(rates)

    def pass_rate(self, group: Group, weight: QuestionWeightConfig | None = None) -> float | None:
        """The pass rate in [0, 1] that decides the question's weight; None if it is not known.

        weight: the section question_weight of this step; None means as configured.
        weight.pass_rate names the rate. "step" is the pass rate of these samples. "frozen" is the
        rate in the row, else the rate given to set_frozen. "ema" is the average over earlier
        visits and this visit; an unscored visit does not change the average. The call changes
        nothing.
        """
        weight = weight or self.algorithm.question_weight
        if weight.kind == "none" or weight.pass_rate == "step":
            return group.pass_rate
        if weight.pass_rate == "frozen":
            return self._frozen_rate(group.prompt)
        return self._average(group, weight.ema_rate)

    def dataset_mean(self, prompts: Iterable[Prompt]) -> float | None:
        """The mean raw weight of all training rows by their frozen rates.

        It belongs to the PACED arm of SC-SDPO (2605.27765). None unless normaliser=dataset.
        UserError if the mean is 0, since nothing would be learned.
        """
        config = self.algorithm.question_weight
        if config.kind == "none" or config.normaliser != "dataset":
            return None
        weight_of = question_weight(config)
        weights = [weight_of(self._frozen_rate(prompt)) for prompt in prompts]
        mean = sum(weights) / len(weights) if weights else 0.0
        if mean == 0.0:
            raise UserError(
                f"algorithm.question_weight.kind={config.kind}: the start model's pass rates give all"
                f" {len(weights)} training rows the weight 0; take other rows, or kind=none"
            )
        return mean

    def _frozen_rate(self, prompt: Prompt) -> float | None:
        if prompt.pass_rate is not None:
            return prompt.pass_rate
        if self.frozen is None or prompt.id not in self.frozen:
            raise ValueError(
                f"row {prompt.id!r} has no pass rate of the start model; estimate it before the first step"
            )
        return self.frozen[prompt.id]

    def _average(self, group: Group, rate: float) -> float | None:
        old, new = (self.averaged or {}).get(group.prompt.id), group.pass_rate
        if old is None or new is None:
            return new if old is None else old
        return old + rate * (new - old)

    # ---- after a step ----

    @property
    def prefix_fraction(self) -> float | None:
        """The fraction of the solution that the controller shows in this step (ATESD 2605.11458).

        None without a controller. A run has a controller in all steps or in none (check_stages).
        """
        return None if self.exposure is None else self.exposure.fraction

    def observe(self, groups: list[Group]) -> dict[str, float]:
        """Take in the step's scored groups and return metrics for the log.

        Call it once a step, after the batch of the step was built.
        """
        metrics: dict[str, float] = {}
        if self.averaged is not None:
            for group in groups:
                rate = self._average(group, self._ema_rate())
                if rate is not None:
                    self.averaged[group.prompt.id] = rate
            known = [self.averaged[group.prompt.id] for group in groups if group.prompt.id in self.averaged]
            metrics["weight/averaged_pass_rate"] = sum(known) / len(known) if known else 0.0
        if self.buffer is not None:
            for group in groups:
                right = next((sample for sample in group.samples if sample.verdict is Verdict.RIGHT), None)
                if right is not None:
                    self.buffer[group.prompt.id] = right.text
            metrics["teacher/buffered_questions"] = float(len(self.buffer))
        if self.whitener is not None:
            self.whitener.step()
            metrics["reward/running_mean"] = self.whitener.mean
        if self.exposure is not None:
            metrics |= {f"teacher/prefix_{name}": value for name, value in self.exposure.metrics().items()}
        return metrics

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take in the actor's metrics of the step: "loss", "divergence", "logp"."""
        if self.exposure is not None:
            self.exposure.observe(metrics)

    def _ema_rate(self) -> float:
        """The ema_rate of the stages that average; it is equal in all of them (check_stages)."""
        return next(one.question_weight.ema_rate for one in variants(self.algorithm) if averages(one))

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON-able values."""
        parts = {"whitener": self.whitener, "exposure": self.exposure}
        state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return state | {
            name: None if (held := getattr(self, name)) is None else dict(held)
            for name in ("averaged", "frozen", "buffer")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        A part that the run's algorithm does not read is ignored. A part that the state lacks stays
        empty.
        """
        self.frozen = state["frozen"]
        for name in ("averaged", "buffer"):
            if getattr(self, name) is not None:
                setattr(self, name, state[name] or {})
        for name in ("whitener", "exposure"):
            if getattr(self, name) is not None and state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
