"""The algorithm at one step: stages that have begun are applied, and schedules are evaluated.

A stage is a text of algorithm.stages, "START: key=value key=value". START is a step, counted from 0,
or a percentage of run.steps. The keys are keys of the section `algorithm`. Later stages add to
earlier stages. The text is split as a shell would split it, so quote a value with spaces.

    # forward KL on references, then reverse KL on samples (PACED 2603.11178)
    stages: ["50%: source=rollout distill.beta=1.0"]

Two numbers change with the step of the run, in every stage: credit.lam falls to lam_end
over lam_steps (RLSD 2604.03128); distill.coefficient rises over warmup_steps and falls from
decay_from on over decay_steps (SDPG's trapezoid).
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import attrgetter

from megasd.config.load import override
from megasd.config.schema import AlgorithmConfig, Config, ConfigError, CreditConfig, DistillTerm
from megasd.config.validate_algorithm import check_algorithm, check_read
from megasd.config.validate_parallel import data_parallel_size, default_world_size
from megasd.config.variants import CONTEXT_TRAITS, CREDIT_TRAITS

STAGE = re.compile(r"\s*(\d+(?:\.\d+)?)(%?)\s*:(.*)", re.DOTALL)
# The run builds these parts of algorithm.teacher once, before the first step, so no stage can
# change these fields.
BUILT_ONCE = (
    "weights",
    "ema_rate",
    "refresh_every",
    "gate_gain",
    "gate_length",
    "trust_mix",
    "model_path",
    "adaptive_prefix",
)

# Cache: (start, number of stages) -> algorithm. Reading a stage takes milliseconds, and every step
# reads several stages.
_known: dict[tuple[str, int], AlgorithmConfig] = {}


@dataclass(frozen=True)
class Stage:
    """One parsed text of algorithm.stages."""

    # The stage's config key, for error messages.
    where: str
    # The step at which the stage begins; if is_share, a percentage of the run.
    start: float
    is_share: bool
    changes: list[str]

    def first_step(self, steps: int) -> int:
        """The step at which the stage begins in a run of `steps` steps."""
        return math.ceil(self.start * steps / 100 - 1e-9) if self.is_share else int(self.start)


def at(algorithm: AlgorithmConfig, step: int, steps: int) -> AlgorithmConfig:
    """The algorithm of a step (counted from 0) of a run of `steps` steps.

    The stages that have begun are applied. credit.lam and distill.coefficient have their values at
    this step. The first step of a warm-up has 1 / warmup_steps of the coefficient, not 0, as with
    the learning rate. ConfigError for a bad stage.
    """
    begun = takewhile(lambda stage: stage.first_step(steps) <= step, _stages(algorithm))
    algorithm = _after(algorithm, sum(1 for _ in begun))
    term, pg = algorithm.distill, algorithm.policy_gradient
    if term is not None and (term.warmup_steps or term.decay_from is not None):
        algorithm = replace(algorithm, distill=replace(term, coefficient=_coefficient(term, step)))
    if pg is not None and pg.credit is not None and pg.credit.lam_end is not None:
        lam = _lam(pg.credit, step)
        # A credit that vanishes at lam=0 leaves the advantage alone, and the teacher need not run.
        gone = lam == 0.0 and CREDIT_TRAITS[pg.credit.kind].vanishes_at_lam_0
        algorithm = replace(
            algorithm, policy_gradient=replace(pg, credit=None if gone else replace(pg.credit, lam=lam))
        )
    return algorithm


def variants(algorithm: AlgorithmConfig) -> list[AlgorithmConfig]:
    """The algorithm before the first stage, in the first stage, and so on.

    Scheduled numbers have their configured values. ConfigError for a bad stage.
    """
    return [_after(algorithm, count) for count in range(len(algorithm.stages) + 1)]


def reads_solutions(algorithm: AlgorithmConfig) -> bool:
    """Whether some stage needs a solution in every training row.

    teacher.fallback=solution does not count: it also works with rows that have no solution.
    """
    stages = variants(algorithm)
    learned = any(one.source != "rollout" for one in stages)
    return learned or any(
        one.teacher is not None and CONTEXT_TRAITS[one.teacher.context].shows_solution for one in stages
    )


def check_stages(config: Config, world_size: int | None = None) -> None:
    """Raise ConfigError for stages that cannot run.

    A stage is refused if it cannot be read, is out of order, never begins within run.steps, or
    cannot run on `world_size` ranks (None: the number that `megasd train` starts). The algorithm
    before the first stage must pass the same checks.
    """
    algorithm, steps = config.algorithm, config.run.steps
    stages, found, last = _stages(algorithm), variants(algorithm), 0
    data_parallel = data_parallel_size(config, world_size or default_world_size(config))
    check_algorithm(config, algorithm, data_parallel)
    for stage, before, after in zip(stages, found, found[1:], strict=False):
        first = stage.first_step(steps)
        if first < last:
            raise ConfigError(
                f"{stage.where}: begins before the stage in front of it; write stages in their order"
            )
        if first >= steps and not stage.is_share:
            raise ConfigError(
                f"{stage.where}: never begins in run.steps={steps}; give a smaller step, a share such as 50%,"
                " or more steps"
            )
        try:
            check_algorithm(config, after, data_parallel)
        except ConfigError as error:
            raise ConfigError(f"{stage.where}: {error}") from error
        _check_built(stage.where, algorithm, before, after)
        last = first
    check_read(config, found)
    rates = sorted({one.question_weight.ema_rate for one in found if averages(one)})
    if len(rates) > 1:
        raise ConfigError(
            "algorithm.question_weight.ema_rate: pass rates are averaged once for all stages; take"
            f" {rates[0]} or {rates[1]}"
        )


def averages(algorithm: AlgorithmConfig) -> bool:
    """Whether question weights come from pass rates averaged over visits."""
    return algorithm.question_weight.kind != "none" and algorithm.question_weight.pass_rate == "ema"


def _check_built(where: str, start: AlgorithmConfig, before: AlgorithmConfig, after: AlgorithmConfig) -> None:
    """Refuse a stage that changes a part which the run builds once, before the first step."""
    if after.teacher is not None:
        if start.teacher is None:
            raise ConfigError(
                f"{where}: the teacher is built before the first step; give algorithm.teacher from the start"
            )
        changed = [
            f"teacher.{name}"
            for name in BUILT_ONCE
            if getattr(start.teacher, name) != getattr(after.teacher, name)
        ]
    else:
        changed = []
    changed += [name for name in ("recipe", "stages") if attrgetter(name)(before) != attrgetter(name)(after)]
    credit = after.policy_gradient.credit if after.policy_gradient is not None else None
    if credit is not None and CREDIT_TRAITS[credit.kind].has_gate:
        first = start.policy_gradient.credit if start.policy_gradient is not None else None
        gate = attrgetter("gate_warmup", "gate_ratio")
        changed += ["policy_gradient.credit's gate"] if first is None or gate(first) != gate(credit) else []
    weight = after.question_weight
    if weight.kind != "none" and weight.pass_rate == "frozen":
        before_weight = start.question_weight
        if before_weight.kind == "none" or before_weight.pass_rate != "frozen":
            changed += ["question_weight.pass_rate"]
        if weight.normaliser == "dataset" and weight != before_weight:
            changed += ["question_weight"]
    if changed:
        raise ConfigError(
            f"{where}: algorithm.{changed[0]} is built before the first step and cannot change; set it"
            " outside of stages"
        )


def _stages(algorithm: AlgorithmConfig) -> list[Stage]:
    return [_read(text, f"algorithm.stages[{k}]") for k, text in enumerate(algorithm.stages)]


def _read(text: str, where: str) -> Stage:
    found = STAGE.fullmatch(text)
    try:
        changes = shlex.split(found[3]) if found else []
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r}: {error}; close the quotes") from error
    if found is None or not changes:
        raise ConfigError(
            f'{where}: {text!r} is not a stage; write "50%: key=value" or "100: key=value key=value"'
        )
    start, is_share = float(found[1]), found[2] == "%"
    if is_share and start > 100 or not is_share and start != int(start):
        raise ConfigError(f"{where}: {text!r}: starts at a whole step or at 0% to 100%")
    return Stage(where, start, is_share, changes)


def _after(algorithm: AlgorithmConfig, count: int) -> AlgorithmConfig:
    """The algorithm with its first `count` stages applied."""
    if count == 0:
        return algorithm
    key = repr(algorithm), count
    if key not in _known:
        stage = _stages(algorithm)[count - 1]
        if len(_known) > 100:
            _known.clear()
        _known[key] = override(_after(algorithm, count - 1), stage.changes, stage.where)
    return _known[key]


def _coefficient(term: DistillTerm, step: int) -> float:
    rise = min(1.0, (step + 1) / term.warmup_steps) if term.warmup_steps else 1.0
    fall = (
        1.0 if term.decay_from is None else max(0.0, 1.0 - max(0, step - term.decay_from) / term.decay_steps)
    )
    return term.coefficient * rise * fall


def _lam(credit: CreditConfig, step: int) -> float:
    lam_end = credit.lam if credit.lam_end is None else credit.lam_end
    return credit.lam + (lam_end - credit.lam) * min(1.0, step / credit.lam_steps)
