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
    # JSONL, parquet or Arrow rows, or a directory of them; {"prompt": str | messages, "answer": str} and optional solution, id,
    # pass_rate, rubric, or the columns of `mapping`
    train: str = "???"
    eval: Optional[str] = None  # held-out rows, same form
    # how columns become a prompt and an answer: auto = the common names | a published data set (data/mappings.py)
    mapping: Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"] = "auto"
    # of data.eval; null = mapping
    eval_mapping: Optional[Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"]] = None
    shuffle: bool = True  # a new order each epoch, from run.seed
    max_row_bytes: int = 262144  # a longer row is refused (bytes)


@dataclass
class DistillTerm:
    coefficient: float = 1.0
    # mixture = KL or Jensen-Shannon by beta | adaptive = forward and reverse KL weighed by their gaps at head and tail (AKL 2404.02657)
    divergence: Literal["mixture", "adaptive"] = "mixture"
    beta: float = 0.5  # weight of the teacher in the mixture; 0 = KL(T||S), 1 = KL(S||T) (SDPO alpha, GKD beta)
    # whose top_k tokens the divergence is taken on: student (SDPO) | teacher | union of both | full = the exact whole vocabulary
    support: Literal["student", "teacher", "union", "full"] = "student"
    top_k: int = 100  # tokens of the support; clipped to the vocabulary (SDPO: 100)
    tail: Literal["bucket", "renormalise", "raw"] = "bucket"  # what becomes of the mass off the support
    pointwise_clip: Optional[float] = None  # upper bound of each token's summand (nats; OPSD: 0.05); null = off
    teacher_temperature: Optional[float] = None  # of the teacher's softmax; null = rollout.temperature, as the student's (SDPO)
    is_clip: Optional[float] = 2.0  # upper bound of pi_theta / pi_old, detached (SDPO); null = off
    # which taught samples: all | those not right (SRPO) | the longest wrong one of a group (SSOPD) | those of positive advantage (SDPG)
    samples: Literal["taught", "wrong", "longest_wrong", "positive"] = "taught"
    skip_tokens: int = 0  # first response tokens left out (SDFT: 3)
    max_tokens: Optional[int] = None  # response tokens taken in, from the first on (SSOPD: 1024); null = all
    # factor of each token: none | exp(-scale * teacher entropy), mean 1 over the term's tokens (SRPO) | backward scan (DASH 2608.06243)
    token_weight: Literal["none", "confidence", "scan"] = "none"
    token_weight_scale: float = 1.0  # per nat (SRPO: 1; DASH kappa: 5)
    warmup_steps: int = 0  # steps over which the coefficient rises from 0
    decay_from: Optional[int] = None  # step from which it falls to 0 over decay_steps; null = never
    decay_steps: int = 1


@dataclass
class CreditConfig:
    """How a teacher's log-probs of the sampled tokens, or the student's own, change each token's advantage (loss/credit.py)."""

    kind: Literal["rlsd", "cepo", "rlcsd", "antisd", "egrsd", "log_ratio", "return", "margin"] = "rlsd"
    lam: float = 0.5  # weight of the token-level part (RLSD, CEPO, RLCSD, AntiSD: 0.5)
    lam_end: Optional[float] = None  # what it falls to, linearly (RLSD, CEPO: 0); null = constant
    lam_steps: int = 50  # steps of that fall
    clip: float = 0.2  # half-width of the factor around 1 (RLSD, EGRSD: 0.2; CEPO: 0.5)
    tau: float = 0.02  # scale of the contrast, nats (RLCSD)
    threshold: float = 0.02  # smallest residual that makes a token's second path (RLCSD delta)
    eta: float = 1.0  # weight of the second path (RLCSD)
    entropy_scale: float = 0.3  # weight lost by a token of the highest teacher entropy (EGRSD gamma)
    window: int = 0  # tokens ahead over which the lowest entropy counts (CL-EGRSD: 3 to 5)
    gate_warmup: int = 5  # steps that set the entropy gate, without the teacher's part (AntiSD)
    gate_ratio: float = 0.93  # share of the entropy of those steps below which the gate shuts (AntiSD); 0 = no gate
    margin: float = 0.4  # smallest gap between right and wrong samples' mean log-ratio (nats; Uni-OPD)
    clip_return: float = 100.0  # bound of a token's log-ratio before returns are summed (nats; MiniLLM)


@dataclass
class PolicyGradientTerm:
    coefficient: float = 1.0
    # ppo: min of plain and clipped | gspo: the same on the sequence's ratio | cispo: clipped, detached ratio times log pi |
    # importance: ratio times advantage | reinforce: log pi times advantage
    surrogate: Literal["ppo", "gspo", "cispo", "importance", "reinforce"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: Optional[float] = (
        None  # bound of the loss at negative advantages, as a multiple of them (PPO dual clip: 3 to 10); null = off
    )
    # R - mean (Dr. GRPO) | (R - mean) / std (GRPO) | whitened by running moments (EGRSD) | 0, for a credit that needs no reward
    advantage: Literal["group_mean", "group_std", "whitened", "none"] = "group_mean"
    # scored ones | those that distill does not take (SRPO) | right ones (DRIFT) | all
    samples: Literal["scored", "undistilled", "right", "all"] = "scored"
    right_bonus: float = 0.0  # added to the advantage of right samples (DRIFT)
    credit: Optional[CreditConfig] = None


@dataclass
class NLLTerm:
    coefficient: float = 1.0
    context_fraction: float = 0.0  # share of dataset rows whose prompt carries the solution, as the teacher's does
    template: str = DEFAULT_TEMPLATE  # of those prompts, as teacher.template
    samples: Literal["all", "right"] = "all"  # of sampled responses: all (SSD) | right ones (rejection sampling)
    drop_shortest: float = 0.0  # share of a step's sampled responses left out, the shortest ones (SSD: 0.1)


@dataclass
class TeacherConfig:
    # what the teacher reads beside the question: a right sample of the group (first: SDPO; random; shortest: SSOPD) | the row's solution |
    # its final answer only (RLSD) | the solution's first part and the answer (ATESD) | nothing more than `system` (OPCD, other models)
    context: Literal["first_success", "random_success", "shortest_success", "solution", "answer", "prefix", "prompt"] = "first_success"
    exclude_self: bool = True  # a sample is not shown to its own teacher (SDPO)
    num_demonstrations: int = 1  # right samples in one context (SDSD: 3)
    # for samples without a sibling: none = untaught | the row's solution (AntiSD) | the latest right sample of an earlier step (DRIFT)
    fallback: Literal["none", "solution", "buffer"] = "none"
    feedback: Literal["never", "without_demonstration", "always"] = "never"  # the verifier's words on the sample itself (SDPO)
    say_verdict: bool = False  # tell the teacher whether the sample is right (AntiSD)
    # contexts to contrast with the first: none | other samples of the group that are wrong (RLCSD) | the answer of a wrong one (CEPO)
    contrast: Literal["none", "failures", "wrong_answer"] = "none"
    num_contrasts: int = 4  # of them (RLCSD K)
    prefix_fraction: float = 0.5  # share of the solution's lines shown by context=prefix; with adaptive_prefix, the first step's
    adaptive_prefix: bool = False  # a controller moves that share (ATESD, algo/exposure.py)
    system: Optional[str] = None  # a system turn that only the teacher reads (OPCD); null = none
    thinking: Optional[bool] = None  # enable_thinking of the teacher's prompt (OPSD: true beside a student without); null = the student's
    # the student's own | their average | the start model | a copy every refresh_every steps | a copy when pass rates have risen (CGTR
    # 2606.03532) | logits between the start model's and the live ones (SDPO's trust region) | another model, teacher.model_path
    weights: Literal["live", "ema", "frozen", "snapshot", "gated", "trust_region", "separate"] = "ema"
    ema_rate: float = 0.05  # share of the student taken in after each step (SDPO r)
    refresh_every: int = 10  # steps (RLSD, RLCSD: 10); of gated: the fewest between two copies (CGTR: 30)
    gate_gain: float = 0.05  # rise of the mean pass rate since the last copy that asks for the next (CGTR)
    gate_length: float = 3.2  # a batch whose longest response exceeds so many mean lengths is not copied after (CGTR's length tail)
    trust_mix: float = 0.01  # share of the live logits (SDPO: 0.01)
    model_path: Optional[str] = None  # Hugging Face directory of weights=separate: same tokenizer and vocabulary
    # the teacher's last user turn; {prompt} and {solution} each stand in it once (SDPO's order: question, solution, instruction)
    template: str = DEFAULT_TEMPLATE
    strip_thinking: bool = True  # leave <think>...</think> out of a demonstration (SDPO)
    # what is kept of the teacher per response token: its hidden state (any support), or a record of its distill.top_k tokens and the
    # tail (8 top_k + 4 bytes, support teacher only; the teacher is projected on the vocabulary once)
    transport: Literal["hidden", "record"] = "hidden"


@dataclass
class QuestionWeightConfig:
    # of the pass rate p, q = 1 - p: 1 | sqrt(p q) (SC-SDPO) | p q | 4 p q (SSOPD) | p^a q^b (PACED) | 1 within [low, high], else 0
    kind: Literal["none", "sqrt_pq", "pq", "four_pq", "power", "band"] = "none"
    a: float = 1.0  # of power
    b: float = 1.0
    low: float = 0.2  # of band
    high: float = 0.8
    scale: float = 1.0  # factor, felt where normaliser=none (SSOPD lambda: 0.5)
    # what the weights are divided by: their mean over the batch's informative questions (SC-SDPO) | over all its questions |
    # over the training rows (PACED arm of SC-SDPO; needs pass_rate=frozen) | 1
    normaliser: Literal["informative", "batch", "dataset", "none"] = "informative"
    pass_rate: Literal["step", "frozen", "ema"] = "step"  # of this step's samples | of the start model, once | averaged over visits
    ema_rate: float = 0.5  # share of a new visit's pass rate
    num_samples: int = 8  # samples a row of the frozen estimate, for rows that do not bring a pass_rate
    terms: Literal["all", "distill"] = "all"  # what is weighed


@dataclass
class AlgorithmConfig:
    recipe: str = "sc_sdpo"  # a row of algo/recipes.py; other keys here override its values
    # on-policy samples | the rows' own solutions | both, dataset_fraction of the questions by their solutions (GKD)
    source: Literal["rollout", "dataset", "mixed"] = "rollout"
    dataset_fraction: float = 0.5  # of source=mixed
    distill: Optional[DistillTerm] = None
    policy_gradient: Optional[PolicyGradientTerm] = None
    nll: Optional[NLLTerm] = None
    teacher: Optional[TeacherConfig] = None
    question_weight: QuestionWeightConfig = field(default_factory=QuestionWeightConfig)
    # means: of each response, then over all samples (released SDPO) | then over those that take part | over all tokens that take part |
    # sums of responses over rollout.max_response_tokens, then over all samples (Dr. GRPO) | over the tokens of all terms (SRPO)
    aggregation: Literal["sequence_mean", "sequence_mean_taking_part", "token_mean", "sequence_sum", "token_mean_of_terms"] = (
        "sequence_mean"
    )
    tis_clip: Optional[float] = 2.0  # upper bound of pi_old / mu, the trainer's over the engine's probability; null = off
    tis_low: float = 0.0  # lower bound, for tis_mode=mask
    tis_mode: Literal["truncate", "mask"] = "truncate"  # beyond the bounds: the bound (TIS) | 0 (IcePop)
    overlong_buffer: int = 0  # last tokens of a response's room over which its reward falls by overlong_penalty (DAPO); 0 = off
    overlong_penalty: float = 1.0
    length_bonus: float = 0.0  # share added to a right sample's reward for being short, times 1 - length / room (EGRSD: 0.5)
    minibatches: int = 1  # optimizer steps a batch, each on its share of the questions (pi_old: the weights before the first)
    epochs: int = 1  # times that the batch is gone through (MiniLLM: 4)
    stages: list[str] = field(default_factory=list)  # changes of this section from a step on: "50%: distill.beta=1 source=rollout"


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
    frozen_policy: bool = False  # sample training responses from the start model throughout (SSD)
    dynamic_sampling: bool = False  # sample more questions until num_prompts of them are neither all right nor all wrong (DAPO)
    max_batches: int = 10  # batches of questions that dynamic_sampling may sample for a step
    allow_stale: bool = False  # train on samples of an older weight version (they are counted either way)
    replay_dir: Optional[str] = None  # run.dir of another run, whose rollouts/ are read instead of sampling
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    # math reads the last \boxed{}; code runs the last fenced program on the row's tests, in a sandbox (data/rewards.py)
    verifier: Literal["math", "exact_match", "multiple_choice", "tool_use", "code", "rubric"] = "math"
    workers: int = 2  # verifier processes, or sandboxes, at once
    timeout: float = 6.0  # seconds a check may take before its worker is killed; of code: a test whose row gives no time_limit
    code_seconds: float = 60.0  # seconds that all tests of one program may take together
    code_memory_mib: int = 1024  # of a program, all its processes together
    rubric_threshold: float = 0.5  # rubric score from which on a sample is right


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
    "reward.code_seconds": POSITIVE,
    "reward.code_memory_mib": POSITIVE,
    "reward.rubric_threshold": FRACTION,
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


def override(algorithm: AlgorithmConfig, changes: list[str], source: str) -> AlgorithmConfig:
    """The algorithm with dotted `changes` such as "distill.beta=1", read and checked as `load_config` does; errors name `source`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    origin: dict[str, str] = {}
    merged = OmegaConf.structured(algorithm)
    for text in changes:
        tree = _parse_override(f"algorithm.{text}", source)
        _check_tree(tree, Config, "", source, origin)
        try:
            merged = OmegaConf.merge(merged, tree["algorithm"])
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: algorithm.{error.full_key}: {_first_line(error)}") from error
    try:
        changed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: algorithm.{error.full_key}: {_first_line(error)}") from error
    check_values(changed, origin, "algorithm.")
    return changed


def check_values(config: Any, origin: Mapping[str, str] | None = None, prefix: str = "") -> None:
    """Hold every value against RULES; `origin` names the source of a key for the error. `prefix`: the section that `config` is, if it is
    not the whole. Raises ConfigError."""
    for key, value in walk(config, prefix):
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


def _parse_override(text: str, source: str = COMMAND_LINE) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{source}: {text!r} is not an override; write section.key=value")
    kind, optional = _type_at(parts)
    if kind is str or get_origin(kind) is Literal:
        # Taken as written, so that no, on, 1e5 and 0123 stay strings.
        value = None if optional and raw in ("null", "~", "") else re.sub(r"""^(['"])(.*)\1$""", r"\2", raw, flags=re.DOTALL)
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{source}: {key}: {raw!r} is not a YAML value: {_first_line(error)}") from error
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
