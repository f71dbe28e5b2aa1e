"""Every knob, once: OmegaConf structured dataclasses. A field's comment gives its unit and, where
it has one, its source.

A field with a bound carries it (bounds.py). What values may be together is in validate.py, how files and
overrides become a Config in load.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Optional

from megasd.config.bounds import (
    FRACTION,
    MOMENTUM,
    NONZERO_FRACTION,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    TOP_K,
    Bound,
    bound,
    bounded,
    each_matching,
    matching,
    within,
)
from megasd.rewards.verifiers import VERIFIERS
from megasd.types import UserError

# Regular expression of an engine's address.
URL = r"https?://[^/\s]+/?"

# The table of verifiers has the names; type checkers cannot read a Literal made from a dict.
if TYPE_CHECKING:
    VerifierName = str
else:
    VerifierName = Literal[tuple(VERIFIERS)]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ConfigError(UserError):
    """A config that cannot run. One line: its source, the dotted key, what is wrong, what to do."""


DEFAULT_TEMPLATE = (
    "{prompt}\n\nA correct solution:\n\n{solution}\n\nNow solve the original question correctly."
)
BOTH_PLACEHOLDERS = Bound(
    "must hold {prompt} and {solution} once each",
    lambda v: v.count("{prompt}") == v.count("{solution}") == 1,
)


@dataclass
class RunConfig:
    # run directory: resolved config, metrics, rollouts, checkpoints, export
    dir: str = bounded("runs/default", NOT_EMPTY)
    # optimizer steps in all, resumed steps included
    steps: int = bounded(100, POSITIVE)
    # prompts order, sampling, initialisation
    seed: int = bounded(1, Bound("must lie in [0, 2**31)", lambda v: 0 <= v < 2**31))
    # none | auto (newest whole checkpoint of run.dir, if any) | path of a checkpoint
    resume: str = bounded("none", NOT_EMPTY)
    # write the final weights as a Hugging Face directory at run.dir/hf
    export: bool = True
    tensorboard: bool = True
    # ranks that `megasd train` starts; 0 = the fewest that hold the model. Under torchrun: its
    # world size
    num_processes: int = bounded(0, NOT_NEGATIVE)
    # permit a fresh run in a run.dir that already holds one
    overwrite: bool = False


@dataclass
class ModelConfig:
    # Hugging Face directory: config.json, *.safetensors, tokenizer
    path: str = bounded("???", NOT_EMPTY)
    # passed to the chat template (Qwen3: false = no thinking, as SDPO); null = its default
    enable_thinking: Optional[bool] = None


@dataclass
class DataConfig:
    # JSONL, parquet or Arrow rows, or a directory of them; {"prompt": str | messages, "answer":
    # str} and optional solution, id, pass_rate, rubric, or the columns of `mapping`
    train: str = bounded("???", NOT_EMPTY)
    # held-out rows, same form
    eval: Optional[str] = bounded(None, NOT_EMPTY)
    # how columns become a prompt and an answer: auto = the common names | a published data set
    # (data/columns.py)
    mapping: Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"] = (
        "auto"
    )
    # of data.eval; null = mapping
    eval_mapping: Optional[
        Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"]
    ] = None
    # a new order each epoch, from run.seed
    shuffle: bool = True
    # a longer row is refused (bytes)
    max_row_bytes: int = bounded(262144, POSITIVE)


@dataclass
class DistillTerm:
    coefficient: float = bounded(1.0, POSITIVE)
    # mixture = KL or Jensen-Shannon by beta | adaptive = forward and reverse KL weighed by their
    # gaps at head and tail (AKL 2404.02657)
    divergence: Literal["mixture", "adaptive"] = "mixture"
    # weight of the teacher in the mixture; 0 = KL(T||S), 1 = KL(S||T) (SDPO alpha, GKD beta)
    beta: float = bounded(0.5, FRACTION)
    # whose top_k tokens the divergence is taken on: student (SDPO) | teacher | union of both | full
    # = the exact whole vocabulary
    support: Literal["student", "teacher", "union", "full"] = "student"
    # tokens of the support; clipped to the vocabulary (SDPO: 100)
    top_k: int = bounded(100, POSITIVE)
    # what becomes of the mass off the support
    tail: Literal["bucket", "renormalise", "raw"] = "bucket"
    # upper bound of each token's summand (nats; OPSD: 0.05); null = off
    pointwise_clip: Optional[float] = bounded(None, POSITIVE)
    # of the teacher's softmax; null = rollout.temperature, as the student's (SDPO)
    teacher_temperature: Optional[float] = bounded(None, POSITIVE)
    # upper bound of pi_theta / pi_old, detached (SDPO); null = off
    is_clip: Optional[float] = bounded(2.0, POSITIVE)
    # which taught samples: all | those not right (SRPO) | the longest wrong one of a group (SSOPD)
    # | those of positive advantage (SDPG)
    samples: Literal["taught", "wrong", "longest_wrong", "positive"] = "taught"
    # first response tokens left out (SDFT: 3)
    skip_tokens: int = bounded(0, NOT_NEGATIVE)
    # response tokens taken in, from the first on (SSOPD: 1024); null = all
    max_tokens: Optional[int] = bounded(None, POSITIVE)
    # factor of each token: none | exp(-scale * teacher entropy), mean 1 over the term's tokens
    # (SRPO) | backward scan (DASH 2608.06243)
    token_weight: Literal["none", "confidence", "scan"] = "none"
    # per nat (SRPO: 1; DASH kappa: 5)
    token_weight_scale: float = bounded(1.0, POSITIVE)
    # steps over which the coefficient rises from 0
    warmup_steps: int = bounded(0, NOT_NEGATIVE)
    # step from which it falls to 0 over decay_steps; null = never
    decay_from: Optional[int] = bounded(None, NOT_NEGATIVE)
    decay_steps: int = bounded(1, POSITIVE)


@dataclass
class CreditConfig:
    """How the log-probs that teachers give the sampled tokens, held against the student's or each
    other, change each token's advantage (loss/credit.py).
    """

    kind: Literal["rlsd", "cepo", "rlcsd", "antisd", "egrsd", "log_ratio", "return", "margin"] = "rlsd"
    # weight of the token-level part (RLSD, CEPO, RLCSD, AntiSD: 0.5)
    lam: float = bounded(0.5, NOT_NEGATIVE)
    # what it falls to, linearly (RLSD, CEPO: 0); null = constant
    lam_end: Optional[float] = bounded(None, NOT_NEGATIVE)
    # steps of that fall
    lam_steps: int = bounded(50, POSITIVE)
    # half-width of the factor around 1 (RLSD, EGRSD: 0.2; CEPO: 0.5)
    clip: float = bounded(0.2, NONZERO_FRACTION)
    # scale of the contrast, nats (RLCSD)
    tau: float = bounded(0.02, POSITIVE)
    # smallest residual that makes a token's second path (RLCSD delta)
    threshold: float = bounded(0.02, NOT_NEGATIVE)
    # weight of the second path (RLCSD)
    eta: float = bounded(1.0, NOT_NEGATIVE)
    # weight lost by a token of the highest teacher entropy (EGRSD gamma)
    entropy_scale: float = bounded(0.3, NOT_NEGATIVE)
    # tokens ahead over which the lowest entropy counts (CL-EGRSD: 3 to 5)
    window: int = bounded(0, NOT_NEGATIVE)
    # steps that set the entropy gate, without the teacher's part (AntiSD)
    gate_warmup: int = bounded(5, POSITIVE)
    # share of the entropy of those steps below which the gate shuts (AntiSD); 0 = no gate
    gate_ratio: float = bounded(0.93, FRACTION)
    # smallest gap between right and wrong samples' mean log-ratio (nats; Uni-OPD)
    margin: float = bounded(0.4, NOT_NEGATIVE)
    # bound of a token's log-ratio before returns are summed (nats; MiniLLM)
    clip_return: float = bounded(100.0, POSITIVE)


@dataclass
class PolicyGradientTerm:
    coefficient: float = bounded(1.0, POSITIVE)
    # ppo: min of plain and clipped | gspo: the same on the sequence's ratio | cispo: clipped,
    # detached ratio times log pi | importance: ratio times advantage | reinforce: log pi times
    # advantage
    surrogate: Literal["ppo", "gspo", "cispo", "importance", "reinforce"] = "ppo"
    clip_low: float = bounded(0.2, NONZERO_FRACTION)
    clip_high: float = bounded(0.28, POSITIVE)
    # bound of the loss at negative advantages, as a multiple of them (PPO dual clip: 3 to 10);
    # null = off
    dual_clip: Optional[float] = bounded(None, Bound("must be greater than 1", lambda v: v > 1))
    # R - mean (Dr. GRPO) | (R - mean) / std (GRPO) | whitened by running moments (EGRSD) | 0, for a
    # credit that needs no reward
    advantage: Literal["group_mean", "group_std", "whitened", "none"] = "group_mean"
    # scored ones | those that distill does not take (SRPO) | right ones (DRIFT) | all
    samples: Literal["scored", "undistilled", "right", "all"] = "scored"
    # added to the advantage of right samples (DRIFT)
    right_bonus: float = bounded(0.0, NOT_NEGATIVE)
    credit: Optional[CreditConfig] = None


@dataclass
class NLLTerm:
    coefficient: float = bounded(1.0, POSITIVE)
    # share of dataset rows whose prompt carries the solution, as the teacher's does
    context_fraction: float = bounded(0.0, FRACTION)
    # of those prompts, as teacher.template
    template: str = DEFAULT_TEMPLATE
    # of sampled responses: all (SSD) | right ones (rejection sampling)
    samples: Literal["all", "right"] = "all"
    # share of a step's responses left out, the shortest ones, rows' solutions too (SSD: 0.1, of its
    # whole set)
    drop_shortest: float = bounded(0.0, MOMENTUM)


@dataclass
class TeacherConfig:
    # what the teacher reads beside the question: a right sample of the group (first: SDPO; random;
    # shortest: SSOPD) | the row's solution | its final answer only (RLSD) | the solution's first
    # part and the answer (ATESD) | nothing more than `system` (OPCD, other models)
    context: Literal[
        "first_success", "random_success", "shortest_success", "solution", "answer", "prefix", "prompt"
    ] = "first_success"
    # a sample is not shown to its own teacher (SDPO)
    exclude_self: bool = True
    # right samples in one context (SDSD: 3)
    num_demonstrations: int = bounded(1, POSITIVE)
    # for samples without a sibling: none = untaught | the row's solution, untaught without one
    # (AntiSD) | the latest right sample of an earlier step (DRIFT)
    fallback: Literal["none", "solution", "buffer"] = "none"
    # the verifier's words on the sample itself (SDPO)
    feedback: Literal["never", "without_demonstration", "always"] = "never"
    # tell the teacher whether the sample is right (AntiSD)
    say_verdict: bool = False
    # contexts to contrast with the first: none | other samples of the group that are wrong (RLCSD)
    # | the answer of a wrong one (CEPO)
    contrast: Literal["none", "failures", "wrong_answer"] = "none"
    # of them (RLCSD K)
    num_contrasts: int = bounded(4, POSITIVE)
    # share of the solution's lines shown by context=prefix; with adaptive_prefix, the first step's
    prefix_fraction: float = bounded(0.5, FRACTION)
    # a controller moves that share (ATESD, algo/prefix_controller.py)
    adaptive_prefix: bool = False
    # a system turn that only the teacher reads (OPCD); null = none
    system: Optional[str] = None
    # enable_thinking of the teacher's prompt (OPSD: true beside a student without); null = the
    # student's
    thinking: Optional[bool] = None
    # the student's own | their average | the start model | a copy every refresh_every steps | a
    # copy when pass rates have risen (CGTR 2606.03532) | logits between the start model's and the
    # live ones (SDPO's trust region) | another model, teacher.model_path
    weights: Literal["live", "ema", "frozen", "snapshot", "gated", "trust_region", "separate"] = "ema"
    # share of the student taken in after each step (SDPO r)
    ema_rate: float = bounded(0.05, NONZERO_FRACTION)
    # steps (RLSD, RLCSD: 10); of gated: the fewest between two copies (CGTR: 30)
    refresh_every: int = bounded(10, POSITIVE)
    # rise of the mean pass rate since the last copy that asks for the next (CGTR)
    gate_gain: float = bounded(0.05, NOT_NEGATIVE)
    # a batch whose longest response exceeds so many mean lengths is not copied after (CGTR's length
    # tail)
    gate_length: float = bounded(3.2, POSITIVE)
    # share of the live logits (SDPO: 0.01)
    trust_mix: float = bounded(0.01, FRACTION)
    # Hugging Face directory of weights=separate: same tokenizer and vocabulary
    model_path: Optional[str] = bounded(None, NOT_EMPTY)
    # the teacher's last user turn; {prompt} and {solution} each stand in it once (SDPO's order:
    # question, solution, instruction)
    template: str = bounded(DEFAULT_TEMPLATE, BOTH_PLACEHOLDERS)
    # leave <think>...</think> out of a demonstration (SDPO)
    strip_thinking: bool = True
    # what is kept of the teacher per response token: its hidden state (any support), or a record of
    # its distill.top_k tokens and the tail (8 top_k + 4 bytes, support teacher only; the teacher is
    # projected on the vocabulary once)
    transport: Literal["hidden", "record"] = "hidden"


@dataclass
class QuestionWeightConfig:
    # of the pass rate p, q = 1 - p: 1 | sqrt(p q) (SC-SDPO) | p q | 4 p q (SSOPD) | p^a q^b (PACED)
    # | 1 within [low, high], else 0
    kind: Literal["none", "sqrt_pq", "pq", "four_pq", "power", "band"] = "none"
    # of power
    a: float = bounded(1.0, NOT_NEGATIVE)
    b: float = bounded(1.0, NOT_NEGATIVE)
    # of band
    low: float = bounded(0.2, FRACTION)
    high: float = bounded(0.8, FRACTION)
    # factor, felt where normaliser=none (SSOPD lambda: 0.5)
    scale: float = bounded(1.0, POSITIVE)
    # what the weights are divided by: their mean over the batch's informative questions (SC-SDPO) |
    # over all its questions | over the training rows (PACED arm of SC-SDPO; needs pass_rate=frozen)
    # | 1
    normaliser: Literal["informative", "batch", "dataset", "none"] = "informative"
    # of this step's samples | of the start model, once | averaged over visits
    pass_rate: Literal["step", "frozen", "ema"] = "step"
    # share of a new visit's pass rate
    ema_rate: float = bounded(0.5, NONZERO_FRACTION)
    # samples a row of the frozen estimate, for rows that do not bring a pass_rate
    num_samples: int = bounded(8, POSITIVE)
    # what is weighed
    terms: Literal["all", "distill"] = "all"


@dataclass
class AlgorithmConfig:
    # a row of algo/recipes.py; other keys here override its values
    recipe: str = "sc_sdpo"
    # on-policy samples | the rows' own solutions | both, dataset_fraction of the questions by their
    # solutions (GKD)
    source: Literal["rollout", "dataset", "mixed"] = "rollout"
    # of source=mixed
    dataset_fraction: float = bounded(0.5, FRACTION)
    distill: Optional[DistillTerm] = None
    policy_gradient: Optional[PolicyGradientTerm] = None
    nll: Optional[NLLTerm] = None
    teacher: Optional[TeacherConfig] = None
    question_weight: QuestionWeightConfig = field(default_factory=QuestionWeightConfig)
    # means: of each response, then over all samples (released SDPO) | then over those that take
    # part | over all tokens that take part | sums of responses over rollout.max_response_tokens,
    # then over all samples (Dr. GRPO) | over the tokens of all terms (SRPO)
    aggregation: Literal[
        "sequence_mean", "sequence_mean_taking_part", "token_mean", "sequence_sum", "token_mean_of_terms"
    ] = "sequence_mean"
    # upper bound of pi_old / mu, the trainer's over the engine's probability; null = off
    tis_clip: Optional[float] = bounded(2.0, POSITIVE)
    # lower bound, for tis_mode=mask
    tis_low: float = bounded(0.0, NOT_NEGATIVE)
    # beyond the bounds: the bound (TIS) | 0 (IcePop)
    tis_mode: Literal["truncate", "mask"] = "truncate"
    # last tokens of a response's room over which its reward falls by overlong_penalty (DAPO); 0 =
    # off
    overlong_buffer: int = bounded(0, NOT_NEGATIVE)
    overlong_penalty: float = bounded(1.0, NOT_NEGATIVE)
    # share added to a right sample's reward for being short, times 1 - length / room (EGRSD: 0.5)
    length_bonus: float = bounded(0.0, NOT_NEGATIVE)
    # optimizer steps a batch, each on its share of the questions (pi_old: the weights before the
    # first)
    minibatches: int = bounded(1, POSITIVE)
    # times that the batch is gone through (MiniLLM: 4)
    epochs: int = bounded(1, POSITIVE)
    # changes of this section from a step on: "50%: distill.beta=1 source=rollout"
    stages: list[str] = field(default_factory=list)


@dataclass
class EngineConfig:
    # running SGLang servers to use; empty = start one
    urls: list[str] = field(
        default_factory=list, metadata=bound(each_matching(URL, "each must be http://HOST:PORT"))
    )
    # directory that engines start from, if not model.path: the same model in fp8 (128 x 128
    # blocks); pushes are then quantised likewise
    model_path: Optional[str] = bounded(None, NOT_EMPTY)
    # a started engine frees its weights and KV cache while the actor trains on the same GPU (SGLang
    # needs torch_memory_saver for it)
    release_memory: bool = False
    # bind address of a started engine
    host: str = bounded(
        "127.0.0.1",
        Bound(
            "must be a loopback address (127.0.0.1); `megasd serve --host` binds others",
            lambda v: v in LOOPBACK,
        ),
    )
    # port of a started engine; 0 = a free one
    port: int = bounded(
        0, Bound("must be 0 (a free port) or lie in [1024, 65535]", lambda v: v == 0 or 1024 <= v <= 65535)
    )
    # engines that the run starts on its own machine, each on the next tensor_parallel_size GPUs
    num_engines: int = bounded(1, POSITIVE)
    # engines on other machines, started there by `megasd serve`, that the run waits for instead of
    # starting any
    served: int = bounded(0, NOT_NEGATIVE)
    # URL of an sglang-router before the engines: samples are asked of it, everything else of the
    # engines
    router: Optional[str] = bounded(None, matching(URL, "must be http://HOST:PORT"))
    # of a started engine, whatever the actor's
    tensor_parallel_size: int = bounded(1, POSITIVE)
    # share of a GPU's memory for an engine's weights and KV cache; null = SGLang's choice
    mem_fraction_static: Optional[float] = bounded(None, Bound("must lie in (0, 1)", lambda v: 0 < v < 1))
    # auto = actor.dtype
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # KV pool (tokens); without it SGLang takes most of the memory
    max_total_tokens: int = bounded(65536, POSITIVE)
    # seconds until a started engine must answer
    start_timeout: float = bounded(240.0, POSITIVE)
    # seconds without any finished request before an engine counts as dead
    progress_timeout: float = bounded(120.0, POSITIVE)
    max_restarts: int = bounded(3, NOT_NEGATIVE)
    # passed to sglang.launch_server as they are
    extra_args: list[str] = field(default_factory=list)


@dataclass
class RolloutConfig:
    # P, questions a step
    num_prompts: int = bounded(32, POSITIVE)
    # G, samples a question
    num_samples: int = bounded(8, POSITIVE)
    max_prompt_tokens: int = bounded(1024, POSITIVE)
    max_response_tokens: int = bounded(1024, POSITIVE)
    temperature: float = bounded(1.0, POSITIVE)
    top_p: float = bounded(1.0, NONZERO_FRACTION)
    # -1 = off
    top_k: int = bounded(-1, TOP_K)
    # stop strings beside the end-of-turn token
    stop: list[str] = field(default_factory=list)
    # requests in flight
    max_concurrency: int = bounded(256, POSITIVE)
    # a request, on 5xx, resets and restarts; a 4xx is never retried
    max_retries: int = bounded(5, NOT_NEGATIVE)
    # sample training responses from the start model throughout (SSD)
    frozen_policy: bool = False
    # sample more questions until num_prompts of them are neither all right nor all wrong (DAPO)
    dynamic_sampling: bool = False
    # batches of questions that dynamic_sampling may sample for a step
    max_batches: int = bounded(10, POSITIVE)
    # train on samples of an older weight version (they are counted either way)
    allow_stale: bool = False
    # steps that sampling runs ahead of training: 0 = on-policy | 1 = the next batch is sampled
    # while this one is learned
    overlap: int = bounded(0, Bound("must be 0 (off) or 1", lambda v: v in (0, 1)))
    # run.dir of another run, whose rollouts/ are read instead of sampling
    replay_dir: Optional[str] = None
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    # math reads the last \boxed{}; code runs the last fenced program on the row's tests, in a
    # sandbox (rewards/verifiers.py)
    verifier: VerifierName = "math"
    # verifier processes, or sandboxes, at once
    workers: int = bounded(2, POSITIVE)
    # seconds a check may take before its worker is killed; of code: a test whose row gives no
    # time_limit
    timeout: float = bounded(6.0, POSITIVE)
    # seconds that all tests of one program may take together
    code_seconds: float = bounded(60.0, POSITIVE)
    # of a program, all its processes together
    code_memory_mib: int = bounded(1024, POSITIVE)
    # rubric score from which on a sample is right
    rubric_threshold: float = bounded(0.5, FRACTION)


@dataclass
class ActorConfig:
    tensor_model_parallel_size: int = bounded(1, POSITIVE)
    pipeline_model_parallel_size: int = bounded(1, POSITIVE)
    context_parallel_size: int = bounded(1, POSITIVE)
    expert_model_parallel_size: int = bounded(1, POSITIVE)
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    # fp32 main parameters are kept by the optimizer
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # samples of a microbatch, per data-parallel rank, where max_tokens_per_microbatch is null
    micro_batch_size: int = bounded(8, POSITIVE)
    # token budget of a microbatch (tokens of a rank, all its context-parallel ranks together,
    # padding included); as many samples as fit, shared over data-parallel ranks by FLOPs; null =
    # micro_batch_size samples, dealt by length
    max_tokens_per_microbatch: Optional[int] = bounded(None, POSITIVE)
    # packed (THD) instead of right-padded microbatches
    packing: bool = False
    # budget of the loss's logits, a chunk of tokens at a time (MiB per rank)
    loss_memory_mib: int = bounded(768, POSITIVE)
    # reduce gradients over DP x CP while the backward runs
    overlap_grad_reduce: bool = False
    # gather updated parameters while the next forward runs (distributed optimizer)
    overlap_param_gather: bool = False
    # TransformerEngine overlaps tensor-parallel collectives with matrix products
    # (sequence_parallel)
    tp_comm_overlap: bool = False
    # activations computed anew in the backward: whole layers, or the parts named in
    # recompute_modules; null = none
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    # of full: every layer in groups of recompute_num_layers | the first recompute_num_layers of a stage only
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = bounded(1, POSITIVE)
    # of selective: core_attn, mlp, moe
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    # what follows needs TransformerEngine, that is a GPU
    # FP8 of the linear layers: hybrid = E4M3 forward, E5M2 backward | e4m3 throughout; null = bf16
    # (loss and output layer always are)
    fp8: Optional[Literal["hybrid", "e4m3"]] = None
    # Megatron's fp8_recipe: scales from past steps (leaves no layer in bf16) | of each tensor now
    # ("current") | of 128 x 128 and 1 x 128 blocks (Hopper)
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    # keep parameters in FP8 and gather those (distributed optimizer)
    fp8_param_gather: bool = False
    # the first num_layers_at_start_in_bf16 and last num_layers_at_end_in_bf16 layers stay in bf16
    first_last_layers_bf16: bool = True
    num_layers_at_start_in_bf16: int = bounded(1, NOT_NEGATIVE)
    num_layers_at_end_in_bf16: int = bounded(1, NOT_NEGATIVE)
    # TransformerEngine's
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    # rotary embedding in one kernel
    apply_rope_fusion: bool = False
    # replay the layers as CUDA graphs: padded microbatches of one length only
    cuda_graph: bool = False
    # Megatron pads the vocabulary to a multiple of this times TP
    make_vocab_size_divisible_by: int = bounded(128, POSITIVE)


@dataclass
class OptimizerConfig:
    lr: float = bounded(1e-5, POSITIVE)
    min_lr: float = bounded(0.0, NOT_NEGATIVE)
    lr_warmup_steps: int = bounded(10, NOT_NEGATIVE)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = bounded(0.01, NOT_NEGATIVE)
    adam_beta1: float = bounded(0.9, MOMENTUM)
    adam_beta2: float = bounded(0.999, MOMENTUM)
    adam_eps: float = bounded(1e-8, POSITIVE)
    # global L2 norm; 0 = off
    clip_grad: float = bounded(1.0, NOT_NEGATIVE)


@dataclass
class SyncConfig:
    # how weights reach the engines: disk (a safetensors file, in shared memory where there is room)
    # | group (broadcast over a process group: NCCL, gloo) | colocated (the engine reads the actor's
    # memory: CUDA IPC, shared memory; engines of this machine only)
    transport: Literal["disk", "group", "colocated"] = "disk"
    # whole tensors put together at a time (MiB; rank 0 keeps two buffers of it); null = 512 on a
    # GPU, 24 on a CPU, where an engine's receive buffer above 32 MiB is fresh memory each time
    bucket_mib: Optional[int] = bounded(None, POSITIVE)
    # what becomes of requests that run during a push by group or colocated: taken back and
    # continued | asked again | waited for
    in_flight: Literal["retract", "abort", "drain"] = "retract"
    # send only parameters whose fingerprint has changed since the last push (group, colocated)
    delta: bool = False
    # per-tensor checksums of the actor's weights against those that the engine reports after a
    # push: off | an eighth of the parameters, in turn | all of them
    verify: Literal["off", "sample", "full"] = "off"
    # pushes between log-prob probes of the engine; 0 = never
    verify_every: int = bounded(1, NOT_NEGATIVE)
    # largest |log-prob actor - log-prob engine| of a probe (nats); null = 1e-3 in float32, else 0.1
    tolerance: Optional[float] = bounded(None, POSITIVE)


@dataclass
class EvaluationConfig:
    # steps between evaluations; 0 = before and after only
    every: int = bounded(0, NOT_NEGATIVE)
    # k of mean@k and maj@k
    num_samples: int = bounded(4, POSITIVE)
    # held-out rows used, the first ones; 0 = all
    num_prompts: int = bounded(0, NOT_NEGATIVE)
    temperature: float = bounded(1.0, Bound("must be 0 (greedy) or more", lambda v: v >= 0))
    top_p: float = bounded(1.0, NONZERO_FRACTION)
    # -1 = off
    top_k: int = bounded(-1, TOP_K)
    # of the held-out prompts; null = model.enable_thinking
    enable_thinking: Optional[bool] = None
    # null = rollout.max_response_tokens
    max_response_tokens: Optional[int] = bounded(None, POSITIVE)


@dataclass
class CheckpointConfig:
    # steps between checkpoints; 0 = at the end only
    every: int = bounded(0, NOT_NEGATIVE)
    # newest checkpoints kept
    keep: int = bounded(2, POSITIVE)
    save_at_end: bool = True


@dataclass
class ClusterConfig:
    """The machines: what `megasd plan` reckons with and `megasd launch` asks for. `megasd train`
    does not read it.
    """

    # a row of cluster/planner/hardware.py
    gpu: str = "h100-80g"
    gpus_per_node: int = bounded(8, POSITIVE)
    # nodes that train
    actor_nodes: int = bounded(1, POSITIVE)
    # nodes of their own for engines (`megasd serve`); 0 = engines share the actor's GPUs
    engine_nodes: int = bounded(0, NOT_NEGATIVE)
    job_name: str = bounded("megasd", matching(r"[\w.-]+", "must be letters, digits, . _ or -"))
    partition: Optional[str] = None
    account: Optional[str] = None
    # hh:mm:ss, or days-hh:mm:ss
    time: str = bounded(
        "04:00:00", matching(r"(\d+-)?\d{1,3}:\d\d:\d\d", "must be hh:mm:ss or days-hh:mm:ss")
    )
    # before the end of `time` at which the run is told to save and leave
    signal_seconds: int = bounded(300, within(1, 65535))
    # how often a job that saved and left is queued again
    max_requeues: int = bounded(20, NOT_NEGATIVE)
    # of pyxis (srun --container-image); null = no container
    container_image: Optional[str] = None
    # HOST:CONTAINER
    container_mounts: list[str] = field(
        default_factory=list, metadata=bound(each_matching(r"[^:\s]+:[^\s]+", "each must be HOST:CONTAINER"))
    )
    # names of variables that the job takes from the submitting shell; values never appear
    env: list[str] = field(
        default_factory=list,
        metadata=bound(
            each_matching(
                r"[A-Za-z_]\w*", "each must be the name of a variable; values come from the submitting shell"
            )
        ),
    )
    # shell lines before the program on every node, such as "source .venv/bin/activate"
    setup: list[str] = field(default_factory=list)
    # further options of sbatch, such as "--constraint=h100"
    sbatch: list[str] = field(
        default_factory=list, metadata=bound(each_matching(r"--[^\n]+", "each must begin with --"))
    )


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def samples_per_step(config: Config) -> int:
    """Samples of one optimizer step over all ranks: P x G rollouts, or P rows of a dataset."""
    return config.rollout.num_prompts * (
        1 if config.algorithm.source == "dataset" else config.rollout.num_samples
    )


def engine_dtype(config: Config) -> str:
    """Of the engine's weights, and so of what is sent to it."""
    return config.actor.dtype if config.rollout.engine.dtype == "auto" else config.rollout.engine.dtype
