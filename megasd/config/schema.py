"""Every knob, once: OmegaConf structured dataclasses. A field's comment gives its unit and, where
it has one, its source.

What one value may be is in bounds.py, what values may be together in validate.py, how files and
overrides become a Config in load.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from megasd.types import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ConfigError(UserError):
    """A config that cannot run. One line: its source, the dotted key, what is wrong, what to do."""


DEFAULT_TEMPLATE = (
    "{prompt}\n\nA correct solution:\n\n{solution}\n\nNow solve the original question correctly."
)


@dataclass
class RunConfig:
    # run directory: resolved config, metrics, rollouts, checkpoints, export
    dir: str = "runs/default"
    # optimizer steps in all, resumed steps included
    steps: int = 100
    # prompts order, sampling, initialisation
    seed: int = 1
    # none | auto (newest whole checkpoint of run.dir, if any) | path of a checkpoint
    resume: str = "none"
    # write the final weights as a Hugging Face directory at run.dir/hf
    export: bool = True
    tensorboard: bool = True
    # ranks that `megasd train` starts; 0 = the fewest that hold the model. Under torchrun: its
    # world size
    num_processes: int = 0
    # permit a fresh run in a run.dir that already holds one
    overwrite: bool = False


@dataclass
class ModelConfig:
    # Hugging Face directory: config.json, *.safetensors, tokenizer
    path: str = "???"
    # passed to the chat template (Qwen3: false = no thinking, as SDPO); null = its default
    enable_thinking: Optional[bool] = None


@dataclass
class DataConfig:
    # JSONL, parquet or Arrow rows, or a directory of them; {"prompt": str | messages, "answer":
    # str} and optional solution, id, pass_rate, rubric, or the columns of `mapping`
    train: str = "???"
    # held-out rows, same form
    eval: Optional[str] = None
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
    max_row_bytes: int = 262144


@dataclass
class DistillTerm:
    coefficient: float = 1.0
    # mixture = KL or Jensen-Shannon by beta | adaptive = forward and reverse KL weighed by their
    # gaps at head and tail (AKL 2404.02657)
    divergence: Literal["mixture", "adaptive"] = "mixture"
    # weight of the teacher in the mixture; 0 = KL(T||S), 1 = KL(S||T) (SDPO alpha, GKD beta)
    beta: float = 0.5
    # whose top_k tokens the divergence is taken on: student (SDPO) | teacher | union of both | full
    # = the exact whole vocabulary
    support: Literal["student", "teacher", "union", "full"] = "student"
    # tokens of the support; clipped to the vocabulary (SDPO: 100)
    top_k: int = 100
    # what becomes of the mass off the support
    tail: Literal["bucket", "renormalise", "raw"] = "bucket"
    # upper bound of each token's summand (nats; OPSD: 0.05); null = off
    pointwise_clip: Optional[float] = None
    # of the teacher's softmax; null = rollout.temperature, as the student's (SDPO)
    teacher_temperature: Optional[float] = None
    # upper bound of pi_theta / pi_old, detached (SDPO); null = off
    is_clip: Optional[float] = 2.0
    # which taught samples: all | those not right (SRPO) | the longest wrong one of a group (SSOPD)
    # | those of positive advantage (SDPG)
    samples: Literal["taught", "wrong", "longest_wrong", "positive"] = "taught"
    # first response tokens left out (SDFT: 3)
    skip_tokens: int = 0
    # response tokens taken in, from the first on (SSOPD: 1024); null = all
    max_tokens: Optional[int] = None
    # factor of each token: none | exp(-scale * teacher entropy), mean 1 over the term's tokens
    # (SRPO) | backward scan (DASH 2608.06243)
    token_weight: Literal["none", "confidence", "scan"] = "none"
    # per nat (SRPO: 1; DASH kappa: 5)
    token_weight_scale: float = 1.0
    # steps over which the coefficient rises from 0
    warmup_steps: int = 0
    # step from which it falls to 0 over decay_steps; null = never
    decay_from: Optional[int] = None
    decay_steps: int = 1


@dataclass
class CreditConfig:
    """How the log-probs that teachers give the sampled tokens, held against the student's or each
    other, change each token's advantage (loss/credit.py).
    """

    kind: Literal["rlsd", "cepo", "rlcsd", "antisd", "egrsd", "log_ratio", "return", "margin"] = "rlsd"
    # weight of the token-level part (RLSD, CEPO, RLCSD, AntiSD: 0.5)
    lam: float = 0.5
    # what it falls to, linearly (RLSD, CEPO: 0); null = constant
    lam_end: Optional[float] = None
    # steps of that fall
    lam_steps: int = 50
    # half-width of the factor around 1 (RLSD, EGRSD: 0.2; CEPO: 0.5)
    clip: float = 0.2
    # scale of the contrast, nats (RLCSD)
    tau: float = 0.02
    # smallest residual that makes a token's second path (RLCSD delta)
    threshold: float = 0.02
    # weight of the second path (RLCSD)
    eta: float = 1.0
    # weight lost by a token of the highest teacher entropy (EGRSD gamma)
    entropy_scale: float = 0.3
    # tokens ahead over which the lowest entropy counts (CL-EGRSD: 3 to 5)
    window: int = 0
    # steps that set the entropy gate, without the teacher's part (AntiSD)
    gate_warmup: int = 5
    # share of the entropy of those steps below which the gate shuts (AntiSD); 0 = no gate
    gate_ratio: float = 0.93
    # smallest gap between right and wrong samples' mean log-ratio (nats; Uni-OPD)
    margin: float = 0.4
    # bound of a token's log-ratio before returns are summed (nats; MiniLLM)
    clip_return: float = 100.0


@dataclass
class PolicyGradientTerm:
    coefficient: float = 1.0
    # ppo: min of plain and clipped | gspo: the same on the sequence's ratio | cispo: clipped,
    # detached ratio times log pi | importance: ratio times advantage | reinforce: log pi times
    # advantage
    surrogate: Literal["ppo", "gspo", "cispo", "importance", "reinforce"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: Optional[float] = (
        # bound of the loss at negative advantages, as a multiple of them (PPO dual clip: 3 to 10);
        # null = off
        None
    )
    # R - mean (Dr. GRPO) | (R - mean) / std (GRPO) | whitened by running moments (EGRSD) | 0, for a
    # credit that needs no reward
    advantage: Literal["group_mean", "group_std", "whitened", "none"] = "group_mean"
    # scored ones | those that distill does not take (SRPO) | right ones (DRIFT) | all
    samples: Literal["scored", "undistilled", "right", "all"] = "scored"
    # added to the advantage of right samples (DRIFT)
    right_bonus: float = 0.0
    credit: Optional[CreditConfig] = None


@dataclass
class NLLTerm:
    coefficient: float = 1.0
    # share of dataset rows whose prompt carries the solution, as the teacher's does
    context_fraction: float = 0.0
    # of those prompts, as teacher.template
    template: str = DEFAULT_TEMPLATE
    # of sampled responses: all (SSD) | right ones (rejection sampling)
    samples: Literal["all", "right"] = "all"
    # share of a step's responses left out, the shortest ones, rows' solutions too (SSD: 0.1, of its
    # whole set)
    drop_shortest: float = 0.0


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
    num_demonstrations: int = 1
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
    num_contrasts: int = 4
    # share of the solution's lines shown by context=prefix; with adaptive_prefix, the first step's
    prefix_fraction: float = 0.5
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
    ema_rate: float = 0.05
    # steps (RLSD, RLCSD: 10); of gated: the fewest between two copies (CGTR: 30)
    refresh_every: int = 10
    # rise of the mean pass rate since the last copy that asks for the next (CGTR)
    gate_gain: float = 0.05
    # a batch whose longest response exceeds so many mean lengths is not copied after (CGTR's length
    # tail)
    gate_length: float = 3.2
    # share of the live logits (SDPO: 0.01)
    trust_mix: float = 0.01
    # Hugging Face directory of weights=separate: same tokenizer and vocabulary
    model_path: Optional[str] = None
    # the teacher's last user turn; {prompt} and {solution} each stand in it once (SDPO's order:
    # question, solution, instruction)
    template: str = DEFAULT_TEMPLATE
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
    a: float = 1.0
    b: float = 1.0
    # of band
    low: float = 0.2
    high: float = 0.8
    # factor, felt where normaliser=none (SSOPD lambda: 0.5)
    scale: float = 1.0
    # what the weights are divided by: their mean over the batch's informative questions (SC-SDPO) |
    # over all its questions | over the training rows (PACED arm of SC-SDPO; needs pass_rate=frozen)
    # | 1
    normaliser: Literal["informative", "batch", "dataset", "none"] = "informative"
    # of this step's samples | of the start model, once | averaged over visits
    pass_rate: Literal["step", "frozen", "ema"] = "step"
    # share of a new visit's pass rate
    ema_rate: float = 0.5
    # samples a row of the frozen estimate, for rows that do not bring a pass_rate
    num_samples: int = 8
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
    dataset_fraction: float = 0.5
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
    tis_clip: Optional[float] = 2.0
    # lower bound, for tis_mode=mask
    tis_low: float = 0.0
    # beyond the bounds: the bound (TIS) | 0 (IcePop)
    tis_mode: Literal["truncate", "mask"] = "truncate"
    # last tokens of a response's room over which its reward falls by overlong_penalty (DAPO); 0 =
    # off
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    # share added to a right sample's reward for being short, times 1 - length / room (EGRSD: 0.5)
    length_bonus: float = 0.0
    # optimizer steps a batch, each on its share of the questions (pi_old: the weights before the
    # first)
    minibatches: int = 1
    # times that the batch is gone through (MiniLLM: 4)
    epochs: int = 1
    # changes of this section from a step on: "50%: distill.beta=1 source=rollout"
    stages: list[str] = field(default_factory=list)


@dataclass
class EngineConfig:
    # running SGLang servers to use; empty = start one
    urls: list[str] = field(default_factory=list)
    # directory that engines start from, if not model.path: the same model in fp8 (128 x 128
    # blocks); pushes are then quantised likewise
    model_path: Optional[str] = None
    # a started engine frees its weights and KV cache while the actor trains on the same GPU (SGLang
    # needs torch_memory_saver for it)
    release_memory: bool = False
    # bind address of a started engine
    host: str = "127.0.0.1"
    # port of a started engine; 0 = a free one
    port: int = 0
    # engines that the run starts on its own machine, each on the next tensor_parallel_size GPUs
    num_engines: int = 1
    # engines on other machines, started there by `megasd serve`, that the run waits for instead of
    # starting any
    served: int = 0
    # URL of an sglang-router before the engines: samples are asked of it, everything else of the
    # engines
    router: Optional[str] = None
    # of a started engine, whatever the actor's
    tensor_parallel_size: int = 1
    # share of a GPU's memory for an engine's weights and KV cache; null = SGLang's choice
    mem_fraction_static: Optional[float] = None
    # auto = actor.dtype
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # KV pool (tokens); without it SGLang takes most of the memory
    max_total_tokens: int = 65536
    # seconds until a started engine must answer
    start_timeout: float = 240.0
    # seconds without any finished request before an engine counts as dead
    progress_timeout: float = 120.0
    max_restarts: int = 3
    # passed to sglang.launch_server as they are
    extra_args: list[str] = field(default_factory=list)


@dataclass
class RolloutConfig:
    # P, questions a step
    num_prompts: int = 32
    # G, samples a question
    num_samples: int = 8
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    # -1 = off
    top_k: int = -1
    # stop strings beside the end-of-turn token
    stop: list[str] = field(default_factory=list)
    # requests in flight
    max_concurrency: int = 256
    # a request, on 5xx, resets and restarts; a 4xx is never retried
    max_retries: int = 5
    # sample training responses from the start model throughout (SSD)
    frozen_policy: bool = False
    # sample more questions until num_prompts of them are neither all right nor all wrong (DAPO)
    dynamic_sampling: bool = False
    # batches of questions that dynamic_sampling may sample for a step
    max_batches: int = 10
    # train on samples of an older weight version (they are counted either way)
    allow_stale: bool = False
    # steps that sampling runs ahead of training: 0 = on-policy | 1 = the next batch is sampled
    # while this one is learned
    overlap: int = 0
    # run.dir of another run, whose rollouts/ are read instead of sampling
    replay_dir: Optional[str] = None
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    # math reads the last \boxed{}; code runs the last fenced program on the row's tests, in a
    # sandbox (rewards/reward_pool.py)
    verifier: Literal["math", "exact_match", "multiple_choice", "tool_use", "code", "rubric"] = "math"
    # verifier processes, or sandboxes, at once
    workers: int = 2
    # seconds a check may take before its worker is killed; of code: a test whose row gives no
    # time_limit
    timeout: float = 6.0
    # seconds that all tests of one program may take together
    code_seconds: float = 60.0
    # of a program, all its processes together
    code_memory_mib: int = 1024
    # rubric score from which on a sample is right
    rubric_threshold: float = 0.5


@dataclass
class ActorConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    # fp32 main parameters are kept by the optimizer
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # samples of a microbatch, per data-parallel rank, where max_tokens_per_microbatch is null
    micro_batch_size: int = 8
    # token budget of a microbatch (tokens of a rank, all its context-parallel ranks together,
    # padding included); as many samples as fit, shared over data-parallel ranks by FLOPs; null =
    # micro_batch_size samples, dealt by length
    max_tokens_per_microbatch: Optional[int] = None
    # packed (THD) instead of right-padded microbatches
    packing: bool = False
    # budget of the loss's logits, a chunk of tokens at a time (MiB per rank)
    loss_memory_mib: int = 768
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
    recompute_num_layers: int = 1
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
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    # TransformerEngine's
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    # rotary embedding in one kernel
    apply_rope_fusion: bool = False
    # replay the layers as CUDA graphs: padded microbatches of one length only
    cuda_graph: bool = False
    # Megatron pads the vocabulary to a multiple of this times TP
    make_vocab_size_divisible_by: int = 128


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
    # global L2 norm; 0 = off
    clip_grad: float = 1.0


@dataclass
class SyncConfig:
    # how weights reach the engines: disk (a safetensors file, in shared memory where there is room)
    # | group (broadcast over a process group: NCCL, gloo) | colocated (the engine reads the actor's
    # memory: CUDA IPC, shared memory; engines of this machine only)
    transport: Literal["disk", "group", "colocated"] = "disk"
    # whole tensors put together at a time (MiB; rank 0 keeps two buffers of it); null = 512 on a
    # GPU, 24 on a CPU, where an engine's receive buffer above 32 MiB is fresh memory each time
    bucket_mib: Optional[int] = None
    # what becomes of requests that run during a push by group or colocated: taken back and
    # continued | asked again | waited for
    in_flight: Literal["retract", "abort", "drain"] = "retract"
    # send only parameters whose fingerprint has changed since the last push (group, colocated)
    delta: bool = False
    # per-tensor checksums of the actor's weights against those that the engine reports after a
    # push: off | an eighth of the parameters, in turn | all of them
    verify: Literal["off", "sample", "full"] = "off"
    # pushes between log-prob probes of the engine; 0 = never
    verify_every: int = 1
    # largest |log-prob actor - log-prob engine| of a probe (nats); null = 1e-3 in float32, else 0.1
    tolerance: Optional[float] = None


@dataclass
class EvaluationConfig:
    # steps between evaluations; 0 = before and after only
    every: int = 0
    # k of mean@k and maj@k
    num_samples: int = 4
    # held-out rows used, the first ones; 0 = all
    num_prompts: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    # -1 = off
    top_k: int = -1
    # of the held-out prompts; null = model.enable_thinking
    enable_thinking: Optional[bool] = None
    # null = rollout.max_response_tokens
    max_response_tokens: Optional[int] = None


@dataclass
class CheckpointConfig:
    # steps between checkpoints; 0 = at the end only
    every: int = 0
    # newest checkpoints kept
    keep: int = 2
    save_at_end: bool = True


@dataclass
class ClusterConfig:
    """The machines: what `megasd plan` reckons with and `megasd launch` asks for. `megasd train`
    does not read it.
    """

    # a row of cluster/planner/hardware.py
    gpu: str = "h100-80g"
    gpus_per_node: int = 8
    # nodes that train
    actor_nodes: int = 1
    # nodes of their own for engines (`megasd serve`); 0 = engines share the actor's GPUs
    engine_nodes: int = 0
    job_name: str = "megasd"
    partition: Optional[str] = None
    account: Optional[str] = None
    # hh:mm:ss, or days-hh:mm:ss
    time: str = "04:00:00"
    # before the end of `time` at which the run is told to save and leave
    signal_seconds: int = 300
    # how often a job that saved and left is queued again
    max_requeues: int = 20
    # of pyxis (srun --container-image); null = no container
    container_image: Optional[str] = None
    # HOST:CONTAINER
    container_mounts: list[str] = field(default_factory=list)
    # names of variables that the job takes from the submitting shell; values never appear
    env: list[str] = field(default_factory=list)
    # shell lines before the program on every node, such as "source .venv/bin/activate"
    setup: list[str] = field(default_factory=list)
    # further options of sbatch, such as "--constraint=h100"
    sbatch: list[str] = field(default_factory=list)


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
