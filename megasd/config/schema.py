"""Every key of a config, once, as OmegaConf structured dataclasses: the users' reference.

A comment says what a key does, its unit, and the paper it comes from. `a | b` are the values that a
key may have, and `null` is YAML's None. A field with a bound carries it (bounds.py), and values.py
checks it. Which values may stand together is in validate.py. load.py makes a Config from files and
overrides.
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
    """The run as a whole."""

    # Directory of the run: resolved config, metrics, rollouts, checkpoints, export.
    dir: str = bounded("runs/default", NOT_EMPTY)
    # Optimizer steps of the whole run; resumed steps count.
    steps: int = bounded(100, POSITIVE)
    # Seed of the order of prompts, of sampling and of initialisation.
    seed: int = bounded(1, Bound("must lie in [0, 2**31)", lambda v: 0 <= v < 2**31))
    # none | auto (the newest whole checkpoint of run.dir, if there is one) | path of a checkpoint.
    resume: str = bounded("none", NOT_EMPTY)
    # Write the final weights as a Hugging Face directory, run.dir/hf.
    export: bool = True
    # Write metrics for TensorBoard into run.dir/tensorboard.
    tensorboard: bool = True
    # Ranks that `megasd train` starts; 0 = the fewest that hold the model. Under torchrun the world
    # size counts, and this must be 0 or equal to it.
    num_processes: int = bounded(0, NOT_NEGATIVE)
    # Start a new run in a run.dir that already holds one.
    overwrite: bool = False


@dataclass
class ModelConfig:
    """The model that is trained."""

    # Hugging Face directory: config.json, *.safetensors, tokenizer.
    path: str = bounded("???", NOT_EMPTY)
    # Value that the chat template gets (Qwen3: false = no thinking, as SDPO); null = the default of
    # the template.
    enable_thinking: Optional[bool] = None


@dataclass
class DataConfig:
    """The rows that are learned from, and the held-out rows."""

    # File of rows (JSONL, parquet, Arrow), or a directory of such files. A row is {"prompt": str |
    # messages, "answer": str} with optional solution, id, pass_rate and rubric, or it has the
    # columns of `mapping`.
    train: str = bounded("???", NOT_EMPTY)
    # File or directory of held-out rows, in the same form; null = none.
    eval: Optional[str] = bounded(None, NOT_EMPTY)
    # How columns become a prompt and an answer: auto = common names | the name of a published data
    # set (data/columns.py).
    mapping: Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"] = (
        "auto"
    )
    # The mapping of data.eval; null = data.mapping.
    eval_mapping: Optional[
        Literal["auto", "dapo_math", "sciknoweval", "toolalpaca", "livecodebench", "math500", "aime"]
    ] = None
    # Draw a new order for each epoch from run.seed; false = the order of the file.
    shuffle: bool = True
    # Largest size of a row (bytes); a longer row is refused.
    max_row_bytes: int = bounded(262144, POSITIVE)


@dataclass
class DistillTerm:
    """The term that pulls the student towards the teacher, token by token (loss/divergence.py)."""

    # Weight of the term in the loss.
    coefficient: float = bounded(1.0, POSITIVE)
    # mixture = KL or Jensen-Shannon, set by beta | adaptive = forward and reverse KL, weighted by
    # their gaps at head and tail (AKL 2404.02657).
    divergence: Literal["mixture", "adaptive"] = "mixture"
    # Weight of the teacher in the mixture: 0 = KL(T||S), 1 = KL(S||T) (SDPO alpha, GKD beta).
    beta: float = bounded(0.5, FRACTION)
    # The tokens over which the divergence is taken: the top_k of the student (SDPO) | of the
    # teacher | of both (union) | full = the whole vocabulary, exactly.
    support: Literal["student", "teacher", "union", "full"] = "student"
    # Number of tokens of the support; at most the size of the vocabulary (SDPO: 100).
    top_k: int = bounded(100, POSITIVE)
    # What happens to the probability outside of the support: bucket = it is one more token |
    # renormalise = the support is scaled to 1 | raw = it is left out.
    tail: Literal["bucket", "renormalise", "raw"] = "bucket"
    # Upper bound of each token's summand (nats; OPSD: 0.05); null = off.
    pointwise_clip: Optional[float] = bounded(None, POSITIVE)
    # Temperature of the teacher's softmax; null = rollout.temperature, the student's (SDPO).
    teacher_temperature: Optional[float] = bounded(None, POSITIVE)
    # Upper bound of the detached ratio pi_theta / pi_old (SDPO); null = off.
    is_clip: Optional[float] = bounded(2.0, POSITIVE)
    # The distilled samples that take part: taught = all | wrong = those that are not right (SRPO) |
    # the longest wrong sample of a group (SSOPD) | those of positive advantage (SDPG).
    samples: Literal["taught", "wrong", "longest_wrong", "positive"] = "taught"
    # Number of response tokens at the start that take no part (SDFT: 3).
    skip_tokens: int = bounded(0, NOT_NEGATIVE)
    # Number of response tokens that take part, from the start (SSOPD: 1024); null = all.
    max_tokens: Optional[int] = bounded(None, POSITIVE)
    # Factor of each token: none | confidence = exp(-scale * teacher entropy), with mean 1 over the
    # tokens of the term (SRPO) | scan = backward scan (DASH 2608.06243).
    token_weight: Literal["none", "confidence", "scan"] = "none"
    # The scale of token_weight (1 / nat; SRPO: 1; DASH kappa: 5).
    token_weight_scale: float = bounded(1.0, POSITIVE)
    # Number of steps over which the coefficient rises from 0.
    warmup_steps: int = bounded(0, NOT_NEGATIVE)
    # Step from which the coefficient falls to 0, over decay_steps; null = it never falls.
    decay_from: Optional[int] = bounded(None, NOT_NEGATIVE)
    # Number of steps of that fall.
    decay_steps: int = bounded(1, POSITIVE)


@dataclass
class CreditConfig:
    """How teachers change the advantage of each token (loss/credit.py).

    A credit compares the log-probs that a teacher gives the sampled tokens with those of the
    student, or with those of a second teacher.
    """

    # The method (loss/credit.py).
    kind: Literal["rlsd", "cepo", "rlcsd", "antisd", "egrsd", "log_ratio", "return", "margin"] = "rlsd"
    # Weight of the token-level part (RLSD, CEPO, RLCSD, AntiSD: 0.5).
    lam: float = bounded(0.5, NOT_NEGATIVE)
    # Value to which lam falls linearly (RLSD, CEPO: 0); null = lam is constant.
    lam_end: Optional[float] = bounded(None, NOT_NEGATIVE)
    # Number of steps of that fall.
    lam_steps: int = bounded(50, POSITIVE)
    # Half-width of the interval around 1 that bounds the factor (RLSD, EGRSD: 0.2; CEPO: 0.5).
    clip: float = bounded(0.2, NONZERO_FRACTION)
    # Scale of the contrast (nats; RLCSD).
    tau: float = bounded(0.02, POSITIVE)
    # Smallest residual that gives a token a second path (RLCSD delta).
    threshold: float = bounded(0.02, NOT_NEGATIVE)
    # Weight of the second path (RLCSD).
    eta: float = bounded(1.0, NOT_NEGATIVE)
    # Weight that a token of the highest teacher entropy loses (EGRSD gamma).
    entropy_scale: float = bounded(0.3, NOT_NEGATIVE)
    # Number of following tokens of which the lowest entropy counts (CL-EGRSD: 3 to 5).
    window: int = bounded(0, NOT_NEGATIVE)
    # Number of steps that set the entropy gate; they train without the teacher's part (AntiSD).
    gate_warmup: int = bounded(5, POSITIVE)
    # Share of the entropy of those steps below which the gate shuts (AntiSD); 0 = no gate.
    gate_ratio: float = bounded(0.93, FRACTION)
    # Smallest gap between the mean log-ratios of right and of wrong samples (nats; Uni-OPD).
    margin: float = bounded(0.4, NOT_NEGATIVE)
    # Bound of a token's log-ratio, applied before returns are summed (nats; MiniLLM).
    clip_return: float = bounded(100.0, POSITIVE)


@dataclass
class PolicyGradientTerm:
    """The term that learns from rewards (loss/policy_gradient.py)."""

    # Weight of the term in the loss.
    coefficient: float = bounded(1.0, POSITIVE)
    # ppo = minimum of plain and clipped ratio | gspo = the same with the ratio of the sequence |
    # cispo = clipped, detached ratio times log pi | importance = ratio times advantage | reinforce
    # = log pi times advantage.
    surrogate: Literal["ppo", "gspo", "cispo", "importance", "reinforce"] = "ppo"
    # The ratio is clipped at 1 - clip_low.
    clip_low: float = bounded(0.2, NONZERO_FRACTION)
    # The ratio is clipped at 1 + clip_high.
    clip_high: float = bounded(0.28, POSITIVE)
    # Bound of the loss at negative advantages, as a multiple of them (PPO dual clip: 3 to 10); null
    # = off.
    dual_clip: Optional[float] = bounded(None, Bound("must be greater than 1", lambda v: v > 1))
    # group_mean = R - mean (Dr. GRPO) | group_std = (R - mean) / std (GRPO) | whitened = by running
    # moments (EGRSD) | none = 0, for a credit that needs no reward.
    advantage: Literal["group_mean", "group_std", "whitened", "none"] = "group_mean"
    # The samples that take part: scored ones | undistilled = those that distill does not take
    # (SRPO) | right ones (DRIFT) | all.
    samples: Literal["scored", "undistilled", "right", "all"] = "scored"
    # Number added to the advantage of right samples (DRIFT).
    right_bonus: float = bounded(0.0, NOT_NEGATIVE)
    # How teachers change the advantage of each token; null = off.
    credit: Optional[CreditConfig] = None


@dataclass
class NLLTerm:
    """The term that imitates solutions of rows, or samples."""

    # Weight of the term in the loss.
    coefficient: float = bounded(1.0, POSITIVE)
    # Share of the dataset rows whose prompt shows the solution, like the teacher's prompt.
    context_fraction: float = bounded(0.0, FRACTION)
    # Template of those prompts, in the form of teacher.template.
    template: str = DEFAULT_TEMPLATE
    # The sampled responses that take part: all (SSD) | right ones (rejection sampling).
    samples: Literal["all", "right"] = "all"
    # Share of a step's responses that is left out, the shortest ones; solutions of rows count as
    # responses (SSD: 0.1, of its whole set).
    drop_shortest: float = bounded(0.0, MOMENTUM)


@dataclass
class TeacherConfig:
    """The teacher: what it reads, and which weights it has."""

    # What the teacher reads next to the question: a right sample of the group (first: SDPO; random;
    # shortest: SSOPD) | the solution of the row | its final answer only (RLSD) | prefix = the first
    # part of the solution and the answer (ATESD) | prompt = nothing but `system` (OPCD, other
    # models).
    context: Literal[
        "first_success", "random_success", "shortest_success", "solution", "answer", "prefix", "prompt"
    ] = "first_success"
    # Never show a sample to the teacher of that same sample (SDPO).
    exclude_self: bool = True
    # Number of right samples in one context (SDSD: 3).
    num_demonstrations: int = bounded(1, POSITIVE)
    # What the teacher reads when the group has no other right sample: none = the sample is not
    # distilled | the solution of the row, if there is one (AntiSD) | buffer = the latest right
    # sample of an earlier step (DRIFT).
    fallback: Literal["none", "solution", "buffer"] = "none"
    # When the teacher reads what the verifier says about the sample (SDPO).
    feedback: Literal["never", "without_demonstration", "always"] = "never"
    # Tell the teacher whether the sample is right (AntiSD).
    say_verdict: bool = False
    # Contexts that are contrasted with the first: none | failures = wrong samples of the group
    # (RLCSD) | wrong_answer = the answer of a wrong sample (CEPO).
    contrast: Literal["none", "failures", "wrong_answer"] = "none"
    # Number of contrasting contexts (RLCSD K).
    num_contrasts: int = bounded(4, POSITIVE)
    # Share of the lines of the solution that context=prefix shows; with adaptive_prefix the share
    # of the first step.
    prefix_fraction: float = bounded(0.5, FRACTION)
    # Let a controller move that share (ATESD, algo/prefix_controller.py).
    adaptive_prefix: bool = False
    # A system turn that only the teacher reads (OPCD); null = none.
    system: Optional[str] = None
    # enable_thinking of the teacher's prompt (OPSD: true for a student without thinking); null =
    # that of the student.
    thinking: Optional[bool] = None
    # live = the student's own weights | ema = their moving average | frozen = the start model |
    # snapshot = a copy every refresh_every steps | gated = a copy when pass rates have risen (CGTR
    # 2606.03532) | trust_region = logits between those of the start model and the live ones (SDPO)
    # | separate = another model, teacher.model_path.
    weights: Literal["live", "ema", "frozen", "snapshot", "gated", "trust_region", "separate"] = "ema"
    # Share of the student in the average after each step (SDPO r).
    ema_rate: float = bounded(0.05, NONZERO_FRACTION)
    # Number of steps between two copies (RLSD, RLCSD: 10); with weights=gated the fewest (CGTR:
    # 30).
    refresh_every: int = bounded(10, POSITIVE)
    # Rise of the mean pass rate since the last copy that makes a new copy due (CGTR).
    gate_gain: float = bounded(0.05, NOT_NEGATIVE)
    # No copy is made after a batch whose longest response exceeds this many mean lengths (CGTR's
    # length tail).
    gate_length: float = bounded(3.2, POSITIVE)
    # Share of the live logits with weights=trust_region (SDPO: 0.01).
    trust_mix: float = bounded(0.01, FRACTION)
    # Hugging Face directory of weights=separate; the tokenizer and the vocabulary must be the same.
    model_path: Optional[str] = bounded(None, NOT_EMPTY)
    # Last user turn of the teacher. {prompt} and {solution} each occur once (SDPO's order:
    # question, solution, instruction).
    template: str = bounded(DEFAULT_TEMPLATE, BOTH_PLACEHOLDERS)
    # Leave <think>...</think> out of a demonstration (SDPO).
    strip_thinking: bool = True
    # What is kept of the teacher for each response token: hidden = its hidden state (any support) |
    # record = its distill.top_k tokens and the tail (8 top_k + 4 bytes; support=teacher only; the
    # teacher is projected on the vocabulary once).
    transport: Literal["hidden", "record"] = "hidden"


@dataclass
class QuestionWeightConfig:
    """Weights of questions by their pass rates (algo/question_weight.py)."""

    # Weight of a question, from its pass rate p and q = 1 - p: none = 1 | sqrt_pq (SC-SDPO) | pq |
    # four_pq = 4 p q (SSOPD) | power = p^a q^b (PACED) | band = 1 within [low, high], else 0.
    kind: Literal["none", "sqrt_pq", "pq", "four_pq", "power", "band"] = "none"
    # Exponent of p in kind=power.
    a: float = bounded(1.0, NOT_NEGATIVE)
    # Exponent of q in kind=power.
    b: float = bounded(1.0, NOT_NEGATIVE)
    # Lower end of kind=band.
    low: float = bounded(0.2, FRACTION)
    # Upper end of kind=band.
    high: float = bounded(0.8, FRACTION)
    # Factor of all weights; it has an effect with normaliser=none only (SSOPD lambda: 0.5).
    scale: float = bounded(1.0, POSITIVE)
    # What the weights are divided by: their mean over the informative questions of the batch
    # (SC-SDPO) | over all questions of the batch | over the training rows (the PACED arm of
    # SC-SDPO; needs pass_rate=frozen) | none = 1.
    normaliser: Literal["informative", "batch", "dataset", "none"] = "informative"
    # The pass rate of a question: of the samples of this step | frozen = of the start model,
    # measured once | ema = averaged over visits.
    pass_rate: Literal["step", "frozen", "ema"] = "step"
    # Share of a new visit in the average.
    ema_rate: float = bounded(0.5, NONZERO_FRACTION)
    # Number of samples for pass_rate=frozen of a row that has no pass_rate of its own.
    num_samples: int = bounded(8, POSITIVE)
    # The terms of the loss that are weighted.
    terms: Literal["all", "distill"] = "all"


@dataclass
class AlgorithmConfig:
    """What is learned from a group of samples, and how: the terms of the loss."""

    # A row of algo/recipes.py; other keys of this section override its values.
    recipe: str = "sc_sdpo"
    # What is learned from: rollout = on-policy samples | dataset = the solutions of the rows |
    # mixed = both, with a share dataset_fraction of the questions from the rows (GKD).
    source: Literal["rollout", "dataset", "mixed"] = "rollout"
    # Share of the questions that source=mixed takes from the rows.
    dataset_fraction: float = bounded(0.5, FRACTION)
    # Divergence from the teacher; null = off.
    distill: Optional[DistillTerm] = None
    # Policy gradient on rewards; null = off.
    policy_gradient: Optional[PolicyGradientTerm] = None
    # Negative log-likelihood of solutions or samples; null = off.
    nll: Optional[NLLTerm] = None
    # The teacher of distill and of credit; null = none.
    teacher: Optional[TeacherConfig] = None
    # Weight of each question in the loss.
    question_weight: QuestionWeightConfig = field(default_factory=QuestionWeightConfig)
    # How token losses become one loss: sequence_mean = mean of each response, then over all samples
    # (released SDPO) | sequence_mean_taking_part = then over the samples that take part |
    # token_mean = over all tokens that take part | sequence_sum = sums of responses over
    # rollout.max_response_tokens, then mean over all samples (Dr. GRPO) | token_mean_of_terms =
    # over the tokens of all terms (SRPO).
    aggregation: Literal[
        "sequence_mean", "sequence_mean_taking_part", "token_mean", "sequence_sum", "token_mean_of_terms"
    ] = "sequence_mean"
    # Upper bound of pi_old / mu, the probability of the trainer over that of the engine; null =
    # off.
    tis_clip: Optional[float] = bounded(2.0, POSITIVE)
    # Lower bound of that ratio, with tis_mode=mask.
    tis_low: float = bounded(0.0, NOT_NEGATIVE)
    # What a ratio beyond the bounds becomes: truncate = the bound (TIS) | mask = 0 (IcePop).
    tis_mode: Literal["truncate", "mask"] = "truncate"
    # Number of last tokens of rollout.max_response_tokens over which the reward falls, by
    # overlong_penalty (DAPO); 0 = off.
    overlong_buffer: int = bounded(0, NOT_NEGATIVE)
    # How far the reward falls over overlong_buffer.
    overlong_penalty: float = bounded(1.0, NOT_NEGATIVE)
    # Share that is added to the reward of a right sample, times 1 - length / max_response_tokens
    # (EGRSD: 0.5).
    length_bonus: float = bounded(0.0, NOT_NEGATIVE)
    # Optimizer steps for each batch; each takes its share of the questions. pi_old are the weights
    # before the first.
    minibatches: int = bounded(1, POSITIVE)
    # Number of times that each batch is learned (MiniLLM: 4).
    epochs: int = bounded(1, POSITIVE)
    # Changes of this section from a step on, as in "50%: distill.beta=1 source=rollout".
    stages: list[str] = field(default_factory=list)


@dataclass
class EngineConfig:
    """The rollout engines (SGLang)."""

    # URLs of running SGLang servers; empty = the run starts its own.
    urls: list[str] = field(
        default_factory=list, metadata=bound(each_matching(URL, "each must be http://HOST:PORT"))
    )
    # Directory that engines start from; null = model.path. It holds the same model in fp8 (128 x
    # 128 blocks); pushed weights are then quantised likewise.
    model_path: Optional[str] = bounded(None, NOT_EMPTY)
    # A started engine frees its weights and KV cache while the actor trains on the same GPU (SGLang
    # needs torch_memory_saver).
    release_memory: bool = False
    # Address that a started engine binds.
    host: str = bounded(
        "127.0.0.1",
        Bound(
            "must be a loopback address (127.0.0.1); `megasd serve --host` binds others",
            lambda v: v in LOOPBACK,
        ),
    )
    # Port of a started engine; 0 = a free one.
    port: int = bounded(
        0, Bound("must be 0 (a free port) or lie in [1024, 65535]", lambda v: v == 0 or 1024 <= v <= 65535)
    )
    # Engines that the run starts on its own machine; each takes the next tensor_parallel_size GPUs.
    num_engines: int = bounded(1, POSITIVE)
    # Engines on other machines that the run waits for, instead of starting any. `megasd serve`
    # starts them.
    served: int = bounded(0, NOT_NEGATIVE)
    # URL of an sglang-router before the engines; null = none. Samples are requested from the
    # router, everything else from the engines.
    router: Optional[str] = bounded(None, matching(URL, "must be http://HOST:PORT"))
    # Tensor-parallel size of a started engine; the actor's may differ.
    tensor_parallel_size: int = bounded(1, POSITIVE)
    # Share of a GPU's memory for weights and KV cache of an engine; null = SGLang chooses.
    mem_fraction_static: Optional[float] = bounded(None, Bound("must lie in (0, 1)", lambda v: 0 < v < 1))
    # Precision of a started engine; auto = actor.dtype.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Size of the KV pool (tokens). Without a limit SGLang takes most of the memory.
    max_total_tokens: int = bounded(65536, POSITIVE)
    # Time within which a started engine must answer (seconds).
    start_timeout: float = bounded(240.0, POSITIVE)
    # Time without a finished request after which an engine counts as dead (seconds).
    progress_timeout: float = bounded(120.0, POSITIVE)
    # How often an engine is started again after it died.
    max_restarts: int = bounded(3, NOT_NEGATIVE)
    # Further arguments of sglang.launch_server.
    extra_args: list[str] = field(default_factory=list)


@dataclass
class RolloutConfig:
    """How training samples are made."""

    # P, the number of questions of a step.
    num_prompts: int = bounded(32, POSITIVE)
    # G, the number of samples of a question.
    num_samples: int = bounded(8, POSITIVE)
    # Longest prompt (tokens).
    max_prompt_tokens: int = bounded(1024, POSITIVE)
    # Longest response (tokens).
    max_response_tokens: int = bounded(1024, POSITIVE)
    # Sampling temperature.
    temperature: float = bounded(1.0, POSITIVE)
    # Share of the probability that is sampled from; 1 = all.
    top_p: float = bounded(1.0, NONZERO_FRACTION)
    # Number of most probable tokens that are sampled from; -1 = off.
    top_k: int = bounded(-1, TOP_K)
    # Strings that end a response, next to the end-of-turn token.
    stop: list[str] = field(default_factory=list)
    # Number of requests in flight.
    max_concurrency: int = bounded(256, POSITIVE)
    # Number of retries of a request after 5xx, resets and restarts; a 4xx is never retried.
    max_retries: int = bounded(5, NOT_NEGATIVE)
    # Sample all training responses from the start model (SSD).
    frozen_policy: bool = False
    # Sample further questions until num_prompts of them are neither all right nor all wrong (DAPO).
    dynamic_sampling: bool = False
    # Most batches of questions that dynamic_sampling samples for one step.
    max_batches: int = bounded(10, POSITIVE)
    # Train on samples of an older weight version; they are counted in any case.
    allow_stale: bool = False
    # Number of steps by which sampling runs ahead of training: 0 = on-policy | 1 = the next batch
    # is sampled during the training on this one.
    overlap: int = bounded(0, Bound("must be 0 (off) or 1", lambda v: v in (0, 1)))
    # run.dir of another run, whose rollouts/ are read instead of sampling; null = sample.
    replay_dir: Optional[str] = None
    # The engines that sample.
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    """The verifier of answers."""

    # How answers are checked: math reads the last \boxed{}; code runs the last fenced program on
    # the row's tests, in a sandbox (rewards/verifiers.py).
    verifier: VerifierName = "math"
    # Number of verifier processes, or of sandboxes, at once.
    workers: int = bounded(2, POSITIVE)
    # Time that a check may take before its worker is killed (seconds); with verifier=code the time
    # of a test whose row has no time_limit.
    timeout: float = bounded(6.0, POSITIVE)
    # Time that all tests of one program may take together (seconds).
    code_seconds: float = bounded(60.0, POSITIVE)
    # Memory of a program with all its processes (MiB).
    code_memory_mib: int = bounded(1024, POSITIVE)
    # Rubric score from which on a sample is right.
    rubric_threshold: float = bounded(0.5, FRACTION)


@dataclass
class ActorConfig:
    """The trainer's parallel layout, precision and speed. Names are Megatron's."""

    # TP.
    tensor_model_parallel_size: int = bounded(1, POSITIVE)
    # PP.
    pipeline_model_parallel_size: int = bounded(1, POSITIVE)
    # CP.
    context_parallel_size: int = bounded(1, POSITIVE)
    # EP.
    expert_model_parallel_size: int = bounded(1, POSITIVE)
    # Split activations between tensor-parallel regions along the sequence.
    sequence_parallel: bool = False
    # Split the state of the optimizer over data-parallel ranks.
    use_distributed_optimizer: bool = True
    # Precision of parameters and activations; the optimizer keeps main parameters in fp32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Samples of a microbatch of one data-parallel rank, where max_tokens_per_microbatch is null.
    micro_batch_size: int = bounded(8, POSITIVE)
    # Token budget of a microbatch, all context-parallel ranks together, padding included. A
    # microbatch takes as many samples as fit, and data-parallel ranks get equal FLOPs. null =
    # micro_batch_size samples, shared out by length.
    max_tokens_per_microbatch: Optional[int] = bounded(None, POSITIVE)
    # Pack microbatches (THD) instead of padding them on the right.
    packing: bool = False
    # Memory of the logits of the loss, which exist for one chunk of tokens at a time (MiB per
    # rank).
    loss_memory_mib: int = bounded(768, POSITIVE)
    # Reduce gradients over DP x CP during the backward pass.
    overlap_grad_reduce: bool = False
    # Gather updated parameters during the next forward pass (distributed optimizer).
    overlap_param_gather: bool = False
    # TransformerEngine overlaps tensor-parallel collectives with matrix products (needs
    # sequence_parallel).
    tp_comm_overlap: bool = False
    # Activations that the backward pass computes again: full = whole layers | selective = the parts
    # named in recompute_modules; null = none.
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    # With granularity full: uniform = every layer, in groups of recompute_num_layers | block = only
    # the first recompute_num_layers of a stage.
    recompute_method: Literal["uniform", "block"] = "uniform"
    # Number of layers; see recompute_method.
    recompute_num_layers: int = bounded(1, POSITIVE)
    # With granularity selective: core_attn, mlp, moe.
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    # FP8 of the linear layers: hybrid = E4M3 forward, E5M2 backward | e4m3 throughout; null = bf16.
    # Loss and output layer are always bf16. Needs TransformerEngine and thus a GPU, like all that
    # follows.
    fp8: Optional[Literal["hybrid", "e4m3"]] = None
    # Megatron's fp8_recipe, the scales: delayed = from past steps (leaves no layer in bf16) |
    # tensorwise = of each tensor now ("current") | blockwise = of 128 x 128 and 1 x 128 blocks
    # (Hopper).
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    # Keep parameters in FP8 and gather them in FP8 (distributed optimizer).
    fp8_param_gather: bool = False
    # Keep the first num_layers_at_start_in_bf16 and the last num_layers_at_end_in_bf16 layers in
    # bf16.
    first_last_layers_bf16: bool = True
    # Number of first layers in bf16.
    num_layers_at_start_in_bf16: int = bounded(1, NOT_NEGATIVE)
    # Number of last layers in bf16.
    num_layers_at_end_in_bf16: int = bounded(1, NOT_NEGATIVE)
    # TransformerEngine's attention backend.
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    # Compute the rotary embedding in one kernel.
    apply_rope_fusion: bool = False
    # Replay the layers as CUDA graphs; needs padded microbatches of one length.
    cuda_graph: bool = False
    # Megatron pads the vocabulary to a multiple of this number times TP.
    make_vocab_size_divisible_by: int = bounded(128, POSITIVE)


@dataclass
class OptimizerConfig:
    """Adam and its learning rate."""

    # Learning rate after the warm-up.
    lr: float = bounded(1e-5, POSITIVE)
    # Learning rate at the end of the decay.
    min_lr: float = bounded(0.0, NOT_NEGATIVE)
    # Number of steps over which the learning rate rises from 0.
    lr_warmup_steps: int = bounded(10, NOT_NEGATIVE)
    # How the learning rate falls after the warm-up.
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    # Decoupled weight decay of Adam.
    weight_decay: float = bounded(0.01, NOT_NEGATIVE)
    # Decay rate of the first moment.
    adam_beta1: float = bounded(0.9, MOMENTUM)
    # Decay rate of the second moment.
    adam_beta2: float = bounded(0.999, MOMENTUM)
    # Number added to the denominator of Adam.
    adam_eps: float = bounded(1e-8, POSITIVE)
    # Bound of the global L2 norm of the gradient; 0 = off.
    clip_grad: float = bounded(1.0, NOT_NEGATIVE)


@dataclass
class SyncConfig:
    """How weights get from the actor into the engines, and how that is verified."""

    # How weights reach the engines: disk = a safetensors file, in shared memory where there is room
    # | group = broadcast over a process group (NCCL, gloo) | colocated = the engine reads the
    # actor's memory (CUDA IPC, shared memory; engines of this machine only).
    transport: Literal["disk", "group", "colocated"] = "disk"
    # Size of the buckets in which whole tensors are sent (MiB; rank 0 keeps two buffers); null =
    # 512 on a GPU, 24 on a CPU, where a larger receive buffer than 32 MiB is new memory each time.
    bucket_mib: Optional[int] = bounded(None, POSITIVE)
    # What happens to requests that run during a push by group or colocated: retract = taken back
    # and continued | abort = requested again | drain = waited for.
    in_flight: Literal["retract", "abort", "drain"] = "retract"
    # Send only parameters whose fingerprint has changed since the last push (group, colocated).
    delta: bool = False
    # After a push, compare checksums of the actor's tensors with those that the engine reports: off
    # | sample = an eighth of the parameters, in turn | full = all of them.
    verify: Literal["off", "sample", "full"] = "off"
    # Number of pushes between two log-prob probes of the engine; 0 = never.
    verify_every: int = bounded(1, NOT_NEGATIVE)
    # Largest |log-prob of the actor - log-prob of the engine| of a probe (nats); null = 1e-3 in
    # float32, else 0.1.
    tolerance: Optional[float] = bounded(None, POSITIVE)


@dataclass
class EvaluationConfig:
    """Evaluations on held-out rows during a run."""

    # Number of steps between evaluations; 0 = only before and after the run.
    every: int = bounded(0, NOT_NEGATIVE)
    # The k of mean@k and maj@k.
    num_samples: int = bounded(4, POSITIVE)
    # Number of held-out rows used, from the first; 0 = all.
    num_prompts: int = bounded(0, NOT_NEGATIVE)
    # Sampling temperature; 0 = greedy.
    temperature: float = bounded(1.0, Bound("must be 0 (greedy) or more", lambda v: v >= 0))
    # Share of the probability that is sampled from; 1 = all.
    top_p: float = bounded(1.0, NONZERO_FRACTION)
    # Number of most probable tokens that are sampled from; -1 = off.
    top_k: int = bounded(-1, TOP_K)
    # Value that the chat template gets for held-out prompts; null = model.enable_thinking.
    enable_thinking: Optional[bool] = None
    # Longest response (tokens); null = rollout.max_response_tokens.
    max_response_tokens: Optional[int] = bounded(None, POSITIVE)


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    # Number of steps between checkpoints; 0 = at the end only.
    every: int = bounded(0, NOT_NEGATIVE)
    # Number of newest checkpoints that are kept.
    keep: int = bounded(2, POSITIVE)
    # Save a checkpoint at the end.
    save_at_end: bool = True


@dataclass
class ClusterConfig:
    """The machines, for `megasd plan` and `megasd launch`; `megasd train` does not read it."""

    # A row of cluster/planner/hardware.py.
    gpu: str = "h100-80g"
    # GPUs of a node.
    gpus_per_node: int = bounded(8, POSITIVE)
    # Number of nodes that train.
    actor_nodes: int = bounded(1, POSITIVE)
    # Number of further nodes for engines (`megasd serve`); 0 = engines share the actor's GPUs.
    engine_nodes: int = bounded(0, NOT_NEGATIVE)
    # Name of the job.
    job_name: str = bounded("megasd", matching(r"[\w.-]+", "must be letters, digits, . _ or -"))
    # Slurm partition; null = the default.
    partition: Optional[str] = None
    # Slurm account; null = the default.
    account: Optional[str] = None
    # Time limit of the job: hh:mm:ss, or days-hh:mm:ss.
    time: str = bounded(
        "04:00:00", matching(r"(\d+-)?\d{1,3}:\d\d:\d\d", "must be hh:mm:ss or days-hh:mm:ss")
    )
    # The run is preempted this many seconds before the end of `time`: it saves and ends.
    signal_seconds: int = bounded(300, within(1, 65535))
    # How often a preempted job is queued again.
    max_requeues: int = bounded(20, NOT_NEGATIVE)
    # Image for pyxis (srun --container-image); null = no container.
    container_image: Optional[str] = None
    # Mounts of the container, each HOST:CONTAINER.
    container_mounts: list[str] = field(
        default_factory=list, metadata=bound(each_matching(r"[^:\s]+:[^\s]+", "each must be HOST:CONTAINER"))
    )
    # Names of variables that the job takes from the submitting shell; their values are never
    # written.
    env: list[str] = field(
        default_factory=list,
        metadata=bound(
            each_matching(
                r"[A-Za-z_]\w*", "each must be the name of a variable; values come from the submitting shell"
            )
        ),
    )
    # Shell lines before the program on every node, such as "source .venv/bin/activate".
    setup: list[str] = field(default_factory=list)
    # Further options of sbatch, such as "--constraint=h100".
    sbatch: list[str] = field(
        default_factory=list, metadata=bound(each_matching(r"--[^\n]+", "each must begin with --"))
    )


@dataclass
class Config:
    """A whole run."""

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
    """Number of samples of one step over all ranks: P x G rollouts, or P rows of a dataset."""
    return config.rollout.num_prompts * (
        1 if config.algorithm.source == "dataset" else config.rollout.num_samples
    )


def engine_dtype(config: Config) -> str:
    """The dtype of an engine's weights, and so of the weights that are sent to it."""
    return config.actor.dtype if config.rollout.engine.dtype == "auto" else config.rollout.engine.dtype
