"""Every knob, once: OmegaConf structured dataclasses. A field's comment gives its unit and, where it has one, its source.

`load_config` merges  dataclass defaults <- recipe row <- YAML files <- dotted overrides  and returns real dataclasses:

    config = load_config(["run.yaml"], ["algorithm.distill.beta=0.1", "rollout.num_prompts=8"], RECIPES)

What one value may be is checked here, where its source is known; what values may be together, in validate.py.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from megasd.types import UserError


class ConfigError(UserError):
    """A config that cannot run. One line: its source, the dotted key, what is wrong, what to do."""


DEFAULT_TEMPLATE = "{prompt}\n\nA correct solution:\n\n{solution}\n\nNow solve the original question correctly."


@dataclass
class RunConfig:
    dir: str = "runs/default"  # run directory: resolved config, metrics, rollouts, checkpoints, export
    steps: int = 100  # optimizer steps in all, resumed steps included
    seed: int = 1  # prompts order, sampling, initialisation
    resume: str = "none"  # none | auto (newest whole checkpoint of run.dir, if any) | path of a checkpoint
    export: bool = True  # write the final weights as a Hugging Face directory at run.dir/hf
    tensorboard: bool = True
    num_processes: int = 0  # ranks that `megasd train` starts; 0 = the fewest that hold the model. Under torchrun: its world size
    overwrite: bool = False  # permit a fresh run in a run.dir that already holds one


@dataclass
class ModelConfig:
    path: str = "???"  # Hugging Face directory: config.json, *.safetensors, tokenizer
    enable_thinking: Optional[bool] = None  # passed to the chat template (Qwen3: false = no thinking, as SDPO); null = its default


@dataclass
class DataConfig:
    train: str = "???"  # JSONL rows {"prompt": str | messages, "answer": str, "solution": str (optional), "id": str (optional)}
    eval: Optional[str] = None  # held-out rows, same form
    shuffle: bool = True  # a new order each epoch, from run.seed
    max_row_bytes: int = 262144  # a longer row is refused (bytes)


@dataclass
class DistillTerm:
    coefficient: float = 1.0
    beta: float = 0.5  # weight of the teacher in the mixture; 0 = KL(T||S), 1 = KL(S||T) (SDPO alpha, GKD beta)
    # whose top_k tokens the divergence is taken on: student (SDPO) | teacher | union of both | full = the exact whole vocabulary
    support: Literal["student", "teacher", "union", "full"] = "student"
    top_k: int = 100  # tokens of the support; clipped to the vocabulary (SDPO: 100)
    tail: Literal["bucket", "renormalise", "raw"] = "bucket"  # what becomes of the mass off the support
    pointwise_clip: Optional[float] = None  # upper bound of each token's summand (nats; OPSD: 0.05); null = off
    teacher_temperature: Optional[float] = None  # of the teacher's softmax; null = rollout.temperature, as the student's (SDPO)
    is_clip: Optional[float] = 2.0  # upper bound of pi_theta / pi_old, detached (SDPO); null = off


@dataclass
class PolicyGradientTerm:
    coefficient: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    advantage: Literal["group_mean", "group_std"] = "group_mean"  # R - mean (Dr. GRPO) | (R - mean) / std (GRPO)


@dataclass
class NLLTerm:
    coefficient: float = 1.0
    context_fraction: float = 0.0  # share of dataset rows whose prompt carries the solution, as the teacher's does
    template: str = DEFAULT_TEMPLATE  # of those prompts, as teacher.template


@dataclass
class TeacherConfig:
    context: Literal["first_success", "solution"] = "first_success"  # a sibling, own excluded (SDPO) | the row's own
    weights: Literal["live", "ema", "frozen"] = "ema"
    ema_rate: float = 0.05  # share of the student taken in after each step (SDPO r)
    # the teacher's last user turn; {prompt} and {solution} each stand in it once (SDPO's order: question, solution, instruction)
    template: str = DEFAULT_TEMPLATE
    strip_thinking: bool = True  # leave <think>...</think> out of a demonstration (SDPO)
    # what is kept of the teacher per response token: its hidden state (any support), or a record of its distill.top_k tokens and the
    # tail (8 top_k + 4 bytes, support teacher only; the teacher is projected on the vocabulary once)
    transport: Literal["hidden", "record"] = "hidden"


@dataclass
class AlgorithmConfig:
    recipe: str = "sc_sdpo"  # a row of algo/recipes.py; other keys here override its values
    source: Literal["rollout", "dataset"] = "rollout"  # on-policy samples | the rows' own solutions
    distill: Optional[DistillTerm] = None
    policy_gradient: Optional[PolicyGradientTerm] = None
    nll: Optional[NLLTerm] = None
    teacher: Optional[TeacherConfig] = None
    question_weight: Literal["none", "sqrt_pq", "pq"] = "none"  # of the pass rate p, q = 1 - p; sqrt_pq is SC-SDPO
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # over all samples (released SDPO) | over all tokens
    tis_clip: Optional[float] = 2.0  # truncated importance sampling, min(pi_old / mu, clip); null = off


@dataclass
class EngineConfig:
    urls: list[str] = field(default_factory=list)  # running SGLang servers to use; empty = start one
    # directory that engines start from, if not model.path: the same model in fp8 (128 x 128 blocks); pushes are then quantised likewise
    model_path: Optional[str] = None
    # a started engine frees its weights and KV cache while the actor trains on the same GPU (SGLang needs torch_memory_saver for it)
    release_memory: bool = False
    host: str = "127.0.0.1"  # bind address of a started engine
    port: int = 0  # port of a started engine; 0 = a free one
    tensor_parallel_size: int = 1  # of a started engine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = actor.dtype
    max_total_tokens: int = 65536  # KV pool (tokens); without it SGLang takes most of the memory
    start_timeout: float = 240.0  # seconds until a started engine must answer
    progress_timeout: float = 120.0  # seconds without any finished request before an engine counts as dead
    max_restarts: int = 3
    extra_args: list[str] = field(default_factory=list)  # passed to sglang.launch_server as they are


@dataclass
class RolloutConfig:
    num_prompts: int = 32  # P, questions a step
    num_samples: int = 8  # G, samples a question
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 = off
    stop: list[str] = field(default_factory=list)  # stop strings beside the end-of-turn token
    max_concurrency: int = 256  # requests in flight
    max_retries: int = 5  # a request, on 5xx, resets and restarts; a 4xx is never retried
    allow_stale: bool = False  # train on samples of an older weight version (they are counted either way)
    replay_dir: Optional[str] = None  # run.dir of another run, whose rollouts/ are read instead of sampling
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    verifier: Literal["math", "exact_match", "multiple_choice"] = "math"  # math reads the last \boxed{}
    workers: int = 2  # verifier processes
    timeout: float = 6.0  # seconds a check may take before its worker is killed


@dataclass
class ActorConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # fp32 main parameters are kept by the optimizer
    micro_batch_size: int = 8  # samples of a microbatch, per data-parallel rank
    packing: bool = False  # packed (THD) instead of right-padded microbatches
    loss_memory_mib: int = 768  # budget of the loss's logits, a chunk of tokens at a time (MiB per rank)
    overlap_grad_reduce: bool = False  # reduce gradients over DP x CP while the backward runs
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    make_vocab_size_divisible_by: int = 128  # Megatron pads the vocabulary to a multiple of this times TP


@dataclass
class OptimizerConfig:
    lr: float = 1e-5
    min_lr: float = 0.0
    lr_warmup_steps: int = 10
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # global L2 norm; 0 = off


@dataclass
class SyncConfig:
    # how weights reach the engines: disk (a safetensors file, in shared memory where there is room) | group (broadcast over a process
    # group: NCCL, gloo) | colocated (the engine reads the actor's memory: CUDA IPC, shared memory; engines of this machine only)
    transport: Literal["disk", "group", "colocated"] = "disk"
    # whole tensors put together at a time (MiB; rank 0 keeps two buffers of it); null = 512 on a GPU, 24 on a CPU, where an engine's
    # receive buffer above 32 MiB is fresh memory each time
    bucket_mib: Optional[int] = None
    # what becomes of requests that run during a push by group or colocated: taken back and continued | asked again | waited for
    in_flight: Literal["retract", "abort", "drain"] = "retract"
    delta: bool = False  # send only parameters whose fingerprint has changed since the last push (group, colocated)
    # per-tensor checksums of the actor's weights against those that the engine reports after a push: off | an eighth of the
    # parameters, in turn | all of them
    verify: Literal["off", "sample", "full"] = "off"
    verify_every: int = 1  # pushes between log-prob probes of the engine; 0 = never
    tolerance: Optional[float] = None  # largest |log-prob actor - log-prob engine| of a probe (nats); null = 1e-3 in float32, else 0.1


@dataclass
class EvaluationConfig:
    every: int = 0  # steps between evaluations; 0 = before and after only
    num_samples: int = 4  # k of mean@k and maj@k
    num_prompts: int = 0  # held-out rows used, the first ones; 0 = all
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: Optional[int] = None  # null = rollout.max_response_tokens


@dataclass
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0 = at the end only
    keep: int = 2  # newest checkpoints kept
    save_at_end: bool = True


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


def samples_per_step(config: Config) -> int:
    """Samples of one optimizer step over all ranks: P x G rollouts, or P rows of a dataset."""
    return config.rollout.num_prompts * (1 if config.algorithm.source == "dataset" else config.rollout.num_samples)


# What one value may be, by dotted key. Every number has a line here (tests/unit/test_config.py).
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("must be greater than 0", lambda v: v > 0)
NOT_NEGATIVE: Rule = ("must be 0 or more", lambda v: v >= 0)
FRACTION: Rule = ("must lie in [0, 1]", lambda v: 0 <= v <= 1)
NONZERO_FRACTION: Rule = ("must lie in (0, 1]", lambda v: 0 < v <= 1)
MOMENTUM: Rule = ("must lie in [0, 1)", lambda v: 0 <= v < 1)
NOT_EMPTY: Rule = ("must not be empty", lambda v: bool(v.strip()))
LOOPBACK = ("127.0.0.1", "localhost", "::1")

RULES: dict[str, Rule] = {
    "model.path": NOT_EMPTY,
    "data.train": NOT_EMPTY,
    "data.eval": NOT_EMPTY,
    "data.max_row_bytes": POSITIVE,
    "algorithm.distill.coefficient": POSITIVE,
    "algorithm.distill.beta": FRACTION,
    "algorithm.distill.top_k": POSITIVE,
    "algorithm.distill.pointwise_clip": POSITIVE,
    "algorithm.distill.teacher_temperature": POSITIVE,
    "algorithm.distill.is_clip": POSITIVE,
    "algorithm.policy_gradient.coefficient": POSITIVE,
    "algorithm.policy_gradient.clip_low": NONZERO_FRACTION,
    "algorithm.policy_gradient.clip_high": POSITIVE,
    "algorithm.nll.coefficient": POSITIVE,
    "algorithm.nll.context_fraction": FRACTION,
    "algorithm.teacher.ema_rate": NONZERO_FRACTION,
    "algorithm.teacher.template": (
        "must hold {prompt} and {solution} once each",
        lambda v: v.count("{prompt}") == v.count("{solution}") == 1,
    ),
    "algorithm.tis_clip": POSITIVE,
    "rollout.num_prompts": POSITIVE,
    "rollout.num_samples": POSITIVE,
    "rollout.max_prompt_tokens": POSITIVE,
    "rollout.max_response_tokens": POSITIVE,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": NONZERO_FRACTION,
    "rollout.top_k": ("must be -1 (off) or greater than 0", lambda v: v == -1 or v > 0),
    "rollout.max_concurrency": POSITIVE,
    "rollout.max_retries": NOT_NEGATIVE,
    "rollout.engine.urls": ("each must be http://HOST:PORT", lambda v: all(re.fullmatch(r"https?://[^/\s]+/?", url) for url in v)),
    "rollout.engine.model_path": NOT_EMPTY,
    "rollout.engine.host": ("must be a loopback address (127.0.0.1): SGLang has no authentication", lambda v: v in LOOPBACK),
    "rollout.engine.port": ("must be 0 (a free port) or lie in [1024, 65535]", lambda v: v == 0 or 1024 <= v <= 65535),
    "rollout.engine.tensor_parallel_size": POSITIVE,
    "rollout.engine.max_total_tokens": POSITIVE,
    "rollout.engine.start_timeout": POSITIVE,
    "rollout.engine.progress_timeout": POSITIVE,
    "rollout.engine.max_restarts": NOT_NEGATIVE,
    "reward.workers": POSITIVE,
    "reward.timeout": POSITIVE,
    "actor.tensor_model_parallel_size": POSITIVE,
    "actor.pipeline_model_parallel_size": POSITIVE,
    "actor.context_parallel_size": POSITIVE,
    "actor.expert_model_parallel_size": POSITIVE,
    "actor.micro_batch_size": POSITIVE,
    "actor.loss_memory_mib": POSITIVE,
    "actor.make_vocab_size_divisible_by": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.min_lr": NOT_NEGATIVE,
    "optimizer.lr_warmup_steps": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.adam_beta1": MOMENTUM,
    "optimizer.adam_beta2": MOMENTUM,
    "optimizer.adam_eps": POSITIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "sync.bucket_mib": POSITIVE,
    "sync.verify_every": NOT_NEGATIVE,
    "sync.tolerance": POSITIVE,
    "evaluation.every": NOT_NEGATIVE,
    "evaluation.num_samples": POSITIVE,
    "evaluation.num_prompts": NOT_NEGATIVE,
    "evaluation.temperature": ("must be 0 (greedy) or more", lambda v: v >= 0),
    "evaluation.top_p": NONZERO_FRACTION,
    "evaluation.max_response_tokens": POSITIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep": POSITIVE,
    "run.dir": NOT_EMPTY,
    "run.resume": NOT_EMPTY,
    "run.steps": POSITIVE,
    "run.seed": ("must lie in [0, 2**31)", lambda v: 0 <= v < 2**31),
    "run.num_processes": NOT_NEGATIVE,
}

COMMAND_LINE = "command line"


def load_config(files: list[str], overrides: list[str], recipes: Mapping[str, AlgorithmConfig]) -> Config:
    """Merge defaults <- recipe row <- YAML `files` in order <- `overrides` ("optimizer.lr=1e-6") into real dataclasses.

    An override of a string key is taken as it is written; any other value is YAML. `null` switches an optional term off, and a
    key below one that is off builds it from its defaults. `${other.key}` refers to another key.
    Raises ConfigError for anything that is not exactly a key, a type and a value of the dataclasses above.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sources = [(path, _read_yaml(path)) for path in files] + [(COMMAND_LINE, _parse_override(text)) for text in overrides]
    origin: dict[str, str] = {}  # dotted key -> the source that set it last
    for source, tree in sources:
        _check_tree(tree, Config, "", source, origin)

    recipe = AlgorithmConfig.recipe
    for _, tree in sources:
        recipe = tree.get("algorithm", {}).get("recipe", recipe)
    if recipe not in recipes:
        where = origin.get("algorithm.recipe", "defaults")
        raise ConfigError(f"{where}: algorithm.recipe: no recipe {recipe!r}{_nearest(recipe, recipes)}")
    merged = OmegaConf.structured(Config(algorithm=replace(deepcopy(recipes[recipe]), recipe=recipe)))
    for source, tree in sources:
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {error.full_key or 'config'}: {_first_line(error)}") from error
    try:
        missing = OmegaConf.missing_keys(merged)
        config = None if missing else OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = origin.get(error.full_key or "", "config")
        raise ConfigError(f"{where}: {error.full_key or 'config'}: {_first_line(error)}") from error
    if config is None:
        key = min(missing)
        where = origin.get(key, files[-1] if files else COMMAND_LINE)
        raise ConfigError(f"{where}: {key}: is mandatory; set it in a file or add {key}=... to the command line")
    check_values(config, origin)
    return config


def check_values(config: Config, origin: Mapping[str, str] | None = None) -> None:
    """Hold every value against RULES; `origin` names the source of a key for the error. Raises ConfigError."""
    for key, value in walk(config):
        where = (origin or {}).get(key, "config")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key}={value}: must be a finite number")
        if key in RULES and value is not None and not RULES[key][1](value):
            raise ConfigError(f"{where}: {key}={value!r}: {RULES[key][0]}")


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) below a dataclass instance; an optional term that is off yields its own key and None."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def to_yaml(config: Config) -> str:
    """The config as YAML text, which `load_config` reads back to an equal config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file, or key=value") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML mapping: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections ({', '.join(_types(Config))}), not a {type(tree).__name__}")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not an override; write section.key=value")
    kind, optional = _type_at(parts)
    if kind is str or get_origin(kind) is Literal:
        # Taken as written, so that no, on, 1e5 and 0123 stay strings.
        value = None if optional and raw in ("null", "~", "") else re.sub(r"""^(['"])(.*)\1$""", r"\2", raw, flags=re.DOTALL)
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{COMMAND_LINE}: {key}: {raw!r} is not a YAML value: {_first_line(error)}") from error
    tree = value
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _check_tree(tree: dict[Any, Any], cls: type, prefix: str, source: str, origin: dict[str, str]) -> None:
    """Hold a mapping against a dataclass, strictly: OmegaConf alone would read `false` into a string and 1 into a bool."""
    types = _types(cls)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise ConfigError(f"{source}: {key}: unknown key{_suggest(name, prefix, types)}")
        kind, optional = types[name]
        if value is None and optional:
            origin[key] = source
        elif is_dataclass(kind):
            if not isinstance(value, dict):
                what = "is empty" if value is None else f"must be a section of keys, not {value!r}"
                raise ConfigError(f"{source}: {key}: {what}; its keys are {', '.join(_types(kind))}")
            _check_tree(value, kind, f"{key}.", source, origin)
        else:
            origin[key] = source
            wrong = _type_error(value, kind)
            if wrong:
                raise ConfigError(f"{source}: {key}={value!r}: {wrong}{' (or null)' if optional else ''}")


def _type_error(value: Any, kind: Any) -> str | None:
    """Why `value` is not of `kind`, or None when it is. References (`${...}`) are judged after they are resolved."""
    if isinstance(value, str) and "${" in value:
        return None
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices and isinstance(value, str) else f"must be one of {', '.join(choices)}{_nearest(value, choices, '')}"
    if get_origin(kind) is list:
        if not isinstance(value, list):
            return "must be a list, as in [a, b]"
        wrong = [item for item in value if _type_error(item, get_args(kind)[0])]
        return f"the entry {wrong[0]!r} must be a string; quote it" if wrong else None
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "must be an integer"
    if kind is float:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "must be a number"
    return None if isinstance(value, str) else f"must be a string, and YAML reads it as {type(value).__name__}; quote it"


@cache
def _types(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field name -> (type without Optional, whether None is allowed)."""
    found: dict[str, tuple[Any, bool]] = {}
    for name, hint in get_type_hints(cls).items():
        optional = get_origin(hint) is Union and type(None) in get_args(hint)
        found[name] = (next(a for a in get_args(hint) if a is not type(None)), True) if optional else (hint, False)
    return found


def _type_at(parts: list[str]) -> tuple[Any, bool]:
    """The type at a dotted key, or (None, False) when there is no such key (`_check_tree` reports it)."""
    kind, optional = Config, False
    for part in parts:
        if not is_dataclass(kind) or part not in _types(kind):
            return None, False
        kind, optional = _types(kind)[part]
    return kind, optional


def _all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, (kind, _) in _types(cls).items():
        yield f"{prefix}{name}"
        if is_dataclass(kind):
            yield from _all_keys(kind, f"{prefix}{name}.")


def _suggest(name: Any, prefix: str, types: Mapping[str, Any]) -> str:
    """The nearest valid key: in the same section, else a key of the same or a similar name elsewhere, else the section's keys."""
    if not isinstance(name, str):
        return f"; YAML reads it as {type(name).__name__}, and keys are strings"
    near = [prefix + match for match in difflib.get_close_matches(name, types, n=1)]
    everywhere = list(_all_keys(Config))
    near = near or [key for key in everywhere if key.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    near = near or difflib.get_close_matches(prefix + name, everywhere, n=1, cutoff=0.8)
    nested = "; nest it under its section in a file" if "." in name else ""
    if near:
        return f"; did you mean {' or '.join(near)}?{nested}"
    return f"; the keys of {prefix.rstrip('.') or 'the top level'} are {', '.join(types)}{nested}"


def _nearest(value: Any, choices: Any, rest: str | None = None) -> str:
    """ "; did you mean X?" where a choice is near, else the list of choices (or `rest`)."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose one of {', '.join(choices)}" if rest is None else rest


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
