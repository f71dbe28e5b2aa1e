"""Checks of an algorithm: which of its values go together, and whether the run can take them.

config/validate.py checks the algorithm of the start, algo/stages.py that of every stage. A value
that would have no effect is refused too, so that a config says what the run does. All functions
raise ConfigError, one line, and import nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence

from megasd.config.schema import (
    AlgorithmConfig,
    Config,
    ConfigError,
    DistillTerm,
    PolicyGradientTerm,
    TeacherConfig,
)
from megasd.config.variants import (
    CONTEXT_TRAITS,
    CREDIT_TRAITS,
    DIVERGENCE_TRAITS,
    QUESTION_WEIGHT_TRAITS,
    SURROGATE_TRAITS,
    TOKEN_WEIGHT_TRAITS,
    contrasting_credits,
    credit_traits,
)


def check_algorithm(config: Config, algorithm: AlgorithmConfig, data_parallel: int) -> None:
    """Refuse an algorithm, that of the start or of a stage, that this run cannot take on
    `data_parallel` ranks.
    """
    check_terms(algorithm)
    _check_rollout(config, algorithm)
    _check_alone(config, algorithm)
    _check_minibatches(config, algorithm, data_parallel)


def check_read(config: Config, stages: Sequence[AlgorithmConfig]) -> None:
    """Refuse a teacher, or dynamic sampling, that no stage of the run reads.

    stages: the algorithm at the start and after each of its stages.
    """
    if any(one.teacher for one in stages) and not any(one.teacher and _reads_teacher(one) for one in stages):
        raise ConfigError(
            "algorithm.teacher: no term reads the teacher; set algorithm.teacher=null or give"
            " algorithm.distill or algorithm.policy_gradient.credit"
        )
    if config.rollout.dynamic_sampling and all(one.source != "rollout" for one in stages):
        raise ConfigError(
            "rollout.dynamic_sampling: asks for samples of every question, and"
            f" algorithm.source={stages[0].source} brings rows; set it to false"
        )


def _reads_teacher(algorithm: AlgorithmConfig) -> bool:
    pg = algorithm.policy_gradient
    return algorithm.distill is not None or (pg is not None and pg.credit is not None)


def check_terms(algorithm: AlgorithmConfig) -> None:
    """Refuse values of one algorithm that do not go together, whatever the rest of the config says."""
    distill, pg, nll, teacher = algorithm.distill, algorithm.policy_gradient, algorithm.nll, algorithm.teacher
    credit = pg.credit if pg is not None else None
    if distill is None and pg is None and nll is None:
        raise ConfigError(
            "algorithm: no term to train on; give algorithm.distill, algorithm.policy_gradient or"
            " algorithm.nll"
        )
    if distill and teacher is None:
        raise ConfigError(
            "algorithm.teacher: algorithm.distill reads a teacher; give one, as in"
            " algorithm.teacher.weights=ema"
        )
    if credit and teacher is None:
        raise ConfigError(
            "algorithm.teacher: algorithm.policy_gradient.credit reads a teacher; give one, or set the credit"
            " to null"
        )
    _check_source(algorithm)
    if distill and teacher:
        _check_distill(algorithm, distill, teacher)
    if teacher:
        _check_teacher(algorithm, teacher)
    if pg:
        _check_policy_gradient(algorithm, pg)
    if algorithm.tis_mode == "mask" and algorithm.tis_clip is None:
        raise ConfigError("algorithm.tis_mode=mask: needs an upper bound; set algorithm.tis_clip")
    if algorithm.tis_clip is not None and algorithm.tis_low >= algorithm.tis_clip:
        raise ConfigError(
            f"algorithm.tis_low={algorithm.tis_low}: must be below algorithm.tis_clip={algorithm.tis_clip}"
        )
    _check_question_weight(algorithm)


def _check_question_weight(algorithm: AlgorithmConfig) -> None:
    weight = algorithm.question_weight
    if weight.kind == "none":
        return
    if weight.normaliser == "dataset" and weight.pass_rate != "frozen":
        raise ConfigError(
            "algorithm.question_weight.normaliser=dataset: asks for the rates of all rows; set"
            " pass_rate=frozen"
        )
    if weight.kind == "band" and weight.low > weight.high:
        raise ConfigError(
            f"algorithm.question_weight.low={weight.low}: exceeds high={weight.high}; exchange them"
        )
    if weight.terms == "distill" and algorithm.distill is None:
        raise ConfigError(
            "algorithm.question_weight.terms=distill: there is no algorithm.distill to weight; set it to all,"
            " or kind to none"
        )


def _check_policy_gradient(algorithm: AlgorithmConfig, pg: PolicyGradientTerm) -> None:
    credit, teacher = pg.credit, algorithm.teacher
    if pg.samples == "undistilled" and algorithm.distill is None:
        raise ConfigError(
            "algorithm.policy_gradient.samples=undistilled: there is no algorithm.distill to leave samples;"
            " set it to scored"
        )
    if pg.advantage == "none" and not credit_traits(algorithm).adds_to_advantage:
        raise ConfigError(
            "algorithm.policy_gradient.advantage=none: nothing is left to learn from; give a reward's"
            " advantage, or a credit that adds one"
        )
    if pg.dual_clip is not None and not SURROGATE_TRAITS[pg.surrogate].takes_dual_clip:
        takers = " and ".join(name for name, traits in SURROGATE_TRAITS.items() if traits.takes_dual_clip)
        raise ConfigError(
            f"algorithm.policy_gradient.dual_clip: is of {takers}, and the surrogate is {pg.surrogate};"
            " set it to null"
        )
    if credit and teacher and CREDIT_TRAITS[credit.kind].reads_contrast:
        if teacher.contrast == "none":
            raise ConfigError(
                f"algorithm.teacher.contrast: credit {credit.kind} contrasts two teachers; set it to failures"
                " or wrong_answer"
            )
        if CONTEXT_TRAITS[teacher.context].shows_nothing:
            raise ConfigError(
                f"algorithm.teacher.context={teacher.context}: shows nothing for credit {credit.kind} to"
                " contrast; take answer, solution or a success"
            )


def _check_source(algorithm: AlgorithmConfig) -> None:
    if algorithm.source == "rollout":
        if algorithm.nll and algorithm.nll.context_fraction:
            raise ConfigError(
                "algorithm.nll.context_fraction: needs the rows' solutions; set it to 0 or"
                " algorithm.source=dataset"
            )
        return
    if algorithm.policy_gradient:
        has = "has none" if algorithm.source == "dataset" else "has rows among them"
        raise ConfigError(
            "algorithm.policy_gradient: learns from sampled responses, and"
            f" algorithm.source={algorithm.source} {has}; set algorithm.policy_gradient=null or"
            " algorithm.source=rollout"
        )
    weight = algorithm.question_weight
    if weight.kind != "none" and weight.pass_rate != "frozen":
        raise ConfigError(
            f"algorithm.question_weight.kind={weight.kind}: algorithm.source={algorithm.source} has rows"
            " without pass rates; set it to none, or algorithm.question_weight.pass_rate=frozen"
        )
    if algorithm.tis_clip is not None:
        raise ConfigError(
            f"algorithm.tis_clip: algorithm.source={algorithm.source} has rows that no engine sampled, so"
            " there is no ratio; set it to null"
        )


def _check_distill(algorithm: AlgorithmConfig, distill: DistillTerm, teacher: TeacherConfig) -> None:
    if teacher.transport == "record" and distill.support != "teacher":
        raise ConfigError(
            "algorithm.teacher.transport=record: holds the teacher's own top tokens, which"
            f" algorithm.distill.support={distill.support} does not ask for; set the support to teacher or"
            " the transport to hidden"
        )
    if teacher.transport == "record" and TOKEN_WEIGHT_TRAITS[distill.token_weight].reads_teacher_entropy:
        raise ConfigError(
            f"algorithm.teacher.transport=record: holds no entropy for"
            f" token_weight={distill.token_weight}; set the transport to hidden"
        )
    _check_divergence(distill)
    if distill.samples == "positive" and algorithm.policy_gradient is None:
        raise ConfigError(
            "algorithm.distill.samples=positive: there is no algorithm.policy_gradient to give advantages;"
            " set it to taught"
        )
    if distill.max_tokens is not None and distill.skip_tokens >= distill.max_tokens:
        raise ConfigError(
            f"algorithm.distill.skip_tokens={distill.skip_tokens}: leaves nothing of the first"
            f" max_tokens={distill.max_tokens}; lower it"
        )


def _check_divergence(distill: DistillTerm) -> None:
    name, traits = distill.divergence, DIVERGENCE_TRAITS[distill.divergence]
    if distill.support == "full" and not traits.has_full_kernel:
        raise ConfigError(
            f"algorithm.distill.divergence={name}: weighs buckets, not the whole vocabulary of support=full;"
            " take support student, teacher or union"
        )
    if distill.tail == "raw" and traits.needs_normalised_buckets:
        raise ConfigError(
            f"algorithm.distill.divergence={name}: weighs buckets that sum to one; take tail bucket or"
            " renormalise"
        )
    if distill.pointwise_clip is not None and not traits.takes_pointwise_clip:
        takers = " and ".join(one for one, its in DIVERGENCE_TRAITS.items() if its.takes_pointwise_clip)
        raise ConfigError(f"algorithm.distill.pointwise_clip: is of divergence={takers}; set it to null")


def _check_teacher(algorithm: AlgorithmConfig, teacher: TeacherConfig) -> None:
    if (teacher.weights == "separate") != (teacher.model_path is not None):
        raise ConfigError(
            f"algorithm.teacher.model_path={teacher.model_path}: goes with algorithm.teacher.weights=separate"
            " and with it alone; give both"
        )
    shows_nothing = CONTEXT_TRAITS[teacher.context].shows_nothing
    if shows_nothing and teacher.system is None and teacher.weights == "live":
        raise ConfigError(
            f"algorithm.teacher.context={teacher.context}: a live teacher that reads the student's own"
            " prompt is the student; give algorithm.teacher.system, other weights or another context"
        )
    if teacher.adaptive_prefix and teacher.context != "prefix":
        raise ConfigError(
            "algorithm.teacher.adaptive_prefix: moves the share shown by context=prefix; set that, or"
            " adaptive_prefix=false"
        )
    if teacher.transport == "record" and algorithm.policy_gradient and algorithm.policy_gradient.credit:
        raise ConfigError(
            "algorithm.teacher.transport=record: credit needs hidden states; set"
            " algorithm.teacher.transport=hidden"
        )
    if teacher.transport == "record" and teacher.weights == "trust_region":
        raise ConfigError(
            "algorithm.teacher.transport=record: is of one model's logits, and weights=trust_region mixes"
            " two; set the transport to hidden"
        )
    reads_contrast = credit_traits(algorithm).reads_contrast
    if teacher.contrast != "none" and _reads_teacher(algorithm) and not reads_contrast:
        raise ConfigError(
            f"algorithm.teacher.contrast={teacher.contrast}: only the credits"
            f" {' and '.join(contrasting_credits())} read it; set it to none"
        )


def _check_rollout(config: Config, algorithm: AlgorithmConfig) -> None:
    rollout, others = config.rollout, algorithm.distill or algorithm.policy_gradient
    if algorithm.nll and others and algorithm.source != "dataset" and rollout.temperature != 1:
        raise ConfigError(
            "algorithm.nll: a likelihood is one at temperature 1, the other terms are at"
            f" rollout.temperature={rollout.temperature}; set that to 1, or drop one of the terms"
        )
    if algorithm.overlong_buffer >= rollout.max_response_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer={algorithm.overlong_buffer}: must be smaller than"
            f" rollout.max_response_tokens={rollout.max_response_tokens}"
        )
    if algorithm.source == "mixed" and rollout.replay_dir is not None:
        raise ConfigError("algorithm.source=mixed: cannot be replayed; set rollout.replay_dir=null")
    if algorithm.tis_clip is not None and (rollout.top_p < 1 or rollout.top_k > 0):
        raise ConfigError(
            "algorithm.tis_clip: the engine's log-probs are those before top-p and top-k, so the ratio to"
            " what was sampled is unknown; set it to null, or rollout.top_p=1 and rollout.top_k=-1"
        )


def _check_alone(config: Config, algorithm: AlgorithmConfig) -> None:
    """A sample that is its question's only one has no sibling, and its question the pass rate 0 or 1."""
    if config.rollout.num_samples > 1 and algorithm.source != "dataset":
        return
    why = "algorithm.source=dataset" if algorithm.source == "dataset" else "rollout.num_samples=1"
    teacher, weight = algorithm.teacher, algorithm.question_weight
    if teacher and _reads_teacher(algorithm):
        needs_siblings = (
            CONTEXT_TRAITS[teacher.context].shows_siblings
            and teacher.exclude_self
            and teacher.fallback == "none"
            and teacher.feedback == "never"
        )
        if needs_siblings:
            raise ConfigError(
                f"algorithm.teacher.context={teacher.context}: reads other samples of a question, and with"
                f" {why} there are none; take solution or answer, or give a fallback"
            )
        if teacher.contrast == "failures":
            raise ConfigError(
                f"algorithm.teacher.contrast=failures: reads other samples of a question, and with {why}"
                " there are none; take wrong_answer"
            )
    if weight.pass_rate == "step" and QUESTION_WEIGHT_TRAITS[weight.kind].is_zero_at_0_and_1(weight):
        raise ConfigError(
            f"algorithm.question_weight.kind={weight.kind}: is 0 for the pass rates 0 and 1, and with {why} a"
            " step has no others; set pass_rate to ema or frozen, or kind to none"
        )


def _check_minibatches(config: Config, algorithm: AlgorithmConfig, data_parallel: int) -> None:
    """Every data-parallel rank gets a sample of every minibatch."""
    rollout, count = config.rollout, algorithm.minibatches
    if count > rollout.num_prompts:
        raise ConfigError(
            f"algorithm.minibatches={count}: exceeds the rollout.num_prompts={rollout.num_prompts} of a batch"
        )
    smallest = rollout.num_prompts // count * (rollout.num_samples if algorithm.source == "rollout" else 1)
    if smallest < data_parallel:
        raise ConfigError(
            f"algorithm.minibatches={count}: leaves {smallest} samples in the smallest, fewer than the"
            f" {data_parallel} data-parallel ranks; lower it, or raise rollout.num_prompts"
        )
