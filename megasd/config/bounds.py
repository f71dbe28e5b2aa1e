"""What one value of a config may be, by dotted key; what values may be together is in validate.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from megasd.config.schema import LOOPBACK, ConfigError

# What one value may be, by dotted key. Every number has a line here (tests/unit/config/test_config.py).
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("must be greater than 0", lambda v: v > 0)
NOT_NEGATIVE: Rule = ("must be 0 or more", lambda v: v >= 0)
FRACTION: Rule = ("must lie in [0, 1]", lambda v: 0 <= v <= 1)
NONZERO_FRACTION: Rule = ("must lie in (0, 1]", lambda v: 0 < v <= 1)
MOMENTUM: Rule = ("must lie in [0, 1)", lambda v: 0 <= v < 1)
NOT_EMPTY: Rule = ("must not be empty", lambda v: bool(v.strip()))

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
    "algorithm.distill.skip_tokens": NOT_NEGATIVE,
    "algorithm.distill.max_tokens": POSITIVE,
    "algorithm.distill.token_weight_scale": POSITIVE,
    "algorithm.distill.warmup_steps": NOT_NEGATIVE,
    "algorithm.distill.decay_from": NOT_NEGATIVE,
    "algorithm.distill.decay_steps": POSITIVE,
    "algorithm.policy_gradient.dual_clip": ("must be greater than 1", lambda v: v > 1),
    "algorithm.policy_gradient.right_bonus": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.lam": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.lam_end": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.lam_steps": POSITIVE,
    "algorithm.policy_gradient.credit.clip": NONZERO_FRACTION,
    "algorithm.policy_gradient.credit.tau": POSITIVE,
    "algorithm.policy_gradient.credit.threshold": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.eta": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.entropy_scale": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.window": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.gate_warmup": POSITIVE,
    "algorithm.policy_gradient.credit.gate_ratio": FRACTION,
    "algorithm.policy_gradient.credit.margin": NOT_NEGATIVE,
    "algorithm.policy_gradient.credit.clip_return": POSITIVE,
    "algorithm.nll.drop_shortest": MOMENTUM,
    "algorithm.teacher.num_demonstrations": POSITIVE,
    "algorithm.teacher.num_contrasts": POSITIVE,
    "algorithm.teacher.prefix_fraction": FRACTION,
    "algorithm.teacher.refresh_every": POSITIVE,
    "algorithm.teacher.gate_gain": NOT_NEGATIVE,
    "algorithm.teacher.gate_length": POSITIVE,
    "algorithm.teacher.trust_mix": FRACTION,
    "algorithm.teacher.model_path": NOT_EMPTY,
    "algorithm.question_weight.a": NOT_NEGATIVE,
    "algorithm.question_weight.b": NOT_NEGATIVE,
    "algorithm.question_weight.low": FRACTION,
    "algorithm.question_weight.high": FRACTION,
    "algorithm.question_weight.scale": POSITIVE,
    "algorithm.question_weight.ema_rate": NONZERO_FRACTION,
    "algorithm.question_weight.num_samples": POSITIVE,
    "algorithm.dataset_fraction": FRACTION,
    "algorithm.tis_clip": POSITIVE,
    "algorithm.tis_low": NOT_NEGATIVE,
    "algorithm.overlong_buffer": NOT_NEGATIVE,
    "algorithm.overlong_penalty": NOT_NEGATIVE,
    "algorithm.length_bonus": NOT_NEGATIVE,
    "algorithm.minibatches": POSITIVE,
    "algorithm.epochs": POSITIVE,
    "rollout.max_batches": POSITIVE,
    "rollout.overlap": ("must be 0 (off) or 1", lambda v: v in (0, 1)),
    "rollout.num_prompts": POSITIVE,
    "rollout.num_samples": POSITIVE,
    "rollout.max_prompt_tokens": POSITIVE,
    "rollout.max_response_tokens": POSITIVE,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": NONZERO_FRACTION,
    "rollout.top_k": ("must be -1 (off) or greater than 0", lambda v: v == -1 or v > 0),
    "rollout.max_concurrency": POSITIVE,
    "rollout.max_retries": NOT_NEGATIVE,
    "rollout.engine.urls": (
        "each must be http://HOST:PORT",
        lambda v: all(re.fullmatch(r"https?://[^/\s]+/?", url) for url in v),
    ),
    "rollout.engine.model_path": NOT_EMPTY,
    "rollout.engine.host": (
        "must be a loopback address (127.0.0.1); `megasd serve --host` binds others",
        lambda v: v in LOOPBACK,
    ),
    "rollout.engine.port": (
        "must be 0 (a free port) or lie in [1024, 65535]",
        lambda v: v == 0 or 1024 <= v <= 65535,
    ),
    "rollout.engine.num_engines": POSITIVE,
    "rollout.engine.served": NOT_NEGATIVE,
    "rollout.engine.router": (
        "must be http://HOST:PORT",
        lambda v: bool(re.fullmatch(r"https?://[^/\s]+/?", v)),
    ),
    "rollout.engine.mem_fraction_static": ("must lie in (0, 1)", lambda v: 0 < v < 1),
    "rollout.engine.tensor_parallel_size": POSITIVE,
    "rollout.engine.max_total_tokens": POSITIVE,
    "rollout.engine.start_timeout": POSITIVE,
    "rollout.engine.progress_timeout": POSITIVE,
    "rollout.engine.max_restarts": NOT_NEGATIVE,
    "reward.workers": POSITIVE,
    "reward.timeout": POSITIVE,
    "reward.code_seconds": POSITIVE,
    "reward.code_memory_mib": POSITIVE,
    "reward.rubric_threshold": FRACTION,
    "actor.tensor_model_parallel_size": POSITIVE,
    "actor.pipeline_model_parallel_size": POSITIVE,
    "actor.context_parallel_size": POSITIVE,
    "actor.expert_model_parallel_size": POSITIVE,
    "actor.micro_batch_size": POSITIVE,
    "actor.max_tokens_per_microbatch": POSITIVE,
    "actor.loss_memory_mib": POSITIVE,
    "actor.recompute_num_layers": POSITIVE,
    "actor.num_layers_at_start_in_bf16": NOT_NEGATIVE,
    "actor.num_layers_at_end_in_bf16": NOT_NEGATIVE,
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
    "evaluation.top_k": ("must be -1 (off) or greater than 0", lambda v: v == -1 or v > 0),
    "evaluation.max_response_tokens": POSITIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep": POSITIVE,
    "run.dir": NOT_EMPTY,
    "run.resume": NOT_EMPTY,
    "run.steps": POSITIVE,
    "run.seed": ("must lie in [0, 2**31)", lambda v: 0 <= v < 2**31),
    "run.num_processes": NOT_NEGATIVE,
    "cluster.gpus_per_node": POSITIVE,
    "cluster.actor_nodes": POSITIVE,
    "cluster.engine_nodes": NOT_NEGATIVE,
    "cluster.job_name": ("must be letters, digits, . _ or -", lambda v: bool(re.fullmatch(r"[\w.-]+", v))),
    "cluster.time": (
        "must be hh:mm:ss or days-hh:mm:ss",
        lambda v: bool(re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", v)),
    ),
    "cluster.signal_seconds": ("must lie in [1, 65535]", lambda v: 1 <= v <= 65535),
    "cluster.max_requeues": NOT_NEGATIVE,
    "cluster.container_mounts": (
        "each must be HOST:CONTAINER",
        lambda v: all(re.fullmatch(r"[^:\s]+:[^\s]+", mount) for mount in v),
    ),
    "cluster.env": (
        "each must be the name of a variable; values come from the submitting shell",
        lambda v: all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in v),
    ),
    "cluster.sbatch": (
        "each must begin with --",
        lambda v: all(re.fullmatch(r"--[^\n]+", option) for option in v),
    ),
}


def check_values(config: Any, origin: Mapping[str, str] | None = None, prefix: str = "") -> None:
    """Hold every value against RULES; `origin` names the source of a key for the error. `prefix`:
    the section that `config` is, if it is not the whole. Raises ConfigError.
    """
    for key, value in walk(config, prefix):
        where = (origin or {}).get(key, "config")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key}={value}: must be a finite number")
        if key in RULES and value is not None and not RULES[key][1](value):
            raise ConfigError(f"{where}: {key}={value!r}: {RULES[key][0]}")


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) below a dataclass instance; an optional term that is off yields its
    own key and None.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value
