"""What the layers keep for the backward, in bytes of a rank, by recompute setting.

The formulas follow Korthikanti et al. (2205.05198, section 4), with what differs here: RMSNorm,
rotary embedding, grouped key heads, a gated MLP, no dropout, flash attention (no scores are kept),
and Megatron's unfused SiLU. All bytes are per token of a context-parallel rank. h: hidden size.
q, k: widths of this rank's query and key heads. f: width of its MLP. a: number of its query heads.
w: bytes of a number. t: tensor-parallel ranks if sequence parallelism is on, else 1. d: head size.

    norm before attention and before the MLP    each (w h + w h + 4) / t: input, output,
                                                1/rms (fp32)
    attention                                   w (q + 2 k): the fused projection, of which the
                                                values are a view
                                                w (q + k): queries and keys after the rotary
                                                embedding
                                                w q + 4 a: output, log-sum-exp
    norms of queries and keys (Qwen3)           w q + 4 (a + key heads): a copy of the queries; the
                                                keys are a view
    MLP                                         5 w f: gate and up; silu(gate); up + 0; product
    rotary embedding, per position              4 w d: cosine and sine, twice; none with
                                                apply_rope_fusion

On the CPU (hardware.py: cpu; actor/cpu_layers.py) a norm keeps its input, its normalised input in
fp32, and its output, whatever the model's dtype: 8 h + w h + 4 instead. The norms of queries and
keys do likewise. Attention outputs of packed sequences are joined by a copy (w q more). The CPU
variant is compared with measurement (tests/unit/cluster/test_planner_measured.py).
TransformerEngine's is taken from its source, and unmeasured until a GPU runs
tests/gpu/test_planner_gpu.py.

FP8 (TransformerEngine): inputs of the linear layers are kept as FP8, one byte. The attention's
output is kept in bf16 too.

    full, uniform, groups of n layers   ceil(layers / n) inputs of w h / t, and what n layers keep
                                        while one group is recomputed
    full, block, n layers               n inputs; the other layers keep what they keep without
                                        recomputing
    selective                           without what the modules keep; one layer's worth of that
                                        while it is recomputed

A pipeline stage holds min(pp - stage, microbatches) microbatches at once (1F1B; Narayanan et al.
2104.04473, section 2.2.1), and never more tokens than the samples of its rank have.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner.job import PlannedRun


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer keeps, by part.

    input: the layer's input, which recompute=full keeps. attention: attention with its norm,
    without `core`. core: what only core attention keeps. mlp: the MLP without its norm's input.
    norm: input and statistics of the MLP's norm.
    """

    input: float
    attention: float
    core: float
    mlp: float
    norm: float

    @property
    def total(self) -> float:
        """Bytes that the layer keeps without recomputing."""
        return self.attention + self.core + self.mlp + self.norm


def layer(job: PlannedRun, tokens: int, positions: int) -> Layer:
    """What one layer keeps for `tokens` tokens of a context-parallel rank.

    positions: rows of the rotary tables that the layer computes.
    """
    model, actor, word, tp = job.model, job.config.actor, job.word, job.tp
    h, d, local = model.hidden, model.head_dim, job.gpu.local_spec
    heads, groups = model.heads / tp, max(1.0, model.groups / tp)
    q, k = heads * d, groups * d
    # Bytes of a number in the kept input of a linear layer.
    narrow = word if actor.fp8 is None or local else 1
    statistics = (8 * h if local else word * h) + 4
    # Sequence parallelism cuts norms and residuals.
    own_tokens = tokens / job.sp
    attention = own_tokens * (statistics + narrow * h)
    attention += tokens * word * ((q + 2 * k) + (q + k) + q) + (tokens * q if narrow < word else 0)
    # Keys and values of all context-parallel ranks, and a mask over the positions.
    if local and job.cp > 1:
        attention += tokens * word * k * (2 * job.cp - 1) + 4 * positions * positions * job.cp
    if model.qk_norm and local:
        # If the model is in fp32, a view serves in place of an fp32 copy.
        view = word == 4
        attention += tokens * ((4 if view and heads == groups else 8) * q + (4 if view else 8) * k)
    elif model.qk_norm and heads != groups:
        attention += tokens * word * q
    if model.qk_norm:
        attention += tokens * 4 * (heads + groups)
    if local or not actor.apply_rope_fusion:
        attention += 4 * word * d * positions
    mlp = _experts(job, tokens, narrow) if model.experts else tokens * (4 * word + narrow) * model.width / tp
    mlp += own_tokens * narrow * h
    return Layer(
        input=own_tokens * word * h,
        attention=attention,
        core=tokens * (4 * heads + (word * q if local and actor.packing else 0)),
        mlp=mlp,
        norm=own_tokens * statistics,
    )


def _experts(job: PlannedRun, tokens: int, narrow: int) -> float:
    """Bytes that a mixture of experts keeps; tokens are taken to be spread evenly over the experts.

    Kept are: the router in fp32, permuted inputs, what the experts keep, their products times the
    router's weight in fp32 and cast back, and outputs in the order of the experts.
    """
    model, word = job.model, job.word
    tp = 1 if job.ep > 1 else job.tp
    visits = tokens / job.sp * int(model.hf["num_experts_per_tok"]) * tp
    router = tokens / job.sp * 4 * 3 * model.experts
    return router + visits * ((narrow + word) * model.hidden + (4 * word + 4 + narrow) * model.width / tp)


def held(job: PlannedRun, stage: int, tokens: int, positions: int) -> float:
    """Bytes of activations at the worst moment of a training step, on a rank of the stage.

    That moment lies between the end of the last forward in flight and the middle of its backward.
    """
    actor, one = job.config.actor, layer(job, tokens, positions)
    layers, flight = job.model.layers // job.pp, job.in_flight(stage)
    final = (
        tokens / job.sp * ((8 if job.gpu.local_spec else job.word) * job.model.hidden + 4)
        if stage == job.pp - 1
        else 0.0
    )
    if actor.recompute_granularity is None:
        return flight * layers * one.total + final
    if actor.recompute_granularity == "selective":
        dropped = _dropped(job, one)
        return flight * layers * (one.total - dropped) + max(final, dropped)
    n = min(actor.recompute_num_layers, layers)
    # The rotary angles, which every group of layers is given.
    tables = 4 * job.model.head_dim * positions * flight
    # The input of a group is also what its first norm keeps, unless the norm makes an fp32 copy.
    shared = 0.0 if job.gpu.local_spec and job.word == 2 else one.input
    if actor.recompute_method == "block":
        rest = (layers - n) * one.total
        return flight * (n * one.input + rest) + max(final, one.total - shared - rest) + tables
    return flight * -(-layers // n) * one.input + max(final, n * one.total - shared) + tables


def _dropped(job: PlannedRun, one: Layer) -> float:
    """Bytes of a layer that recompute=selective does not keep.

    Modules other than core_attn, mlp and moe count nothing.
    """
    modules = job.config.actor.recompute_modules
    dropped = one.core if "core_attn" in modules else 0.0
    if ("moe" if job.model.experts else "mlp") in modules:
        # TransformerEngine's first linear layer begins with the norm, whose output then goes too.
        dropped += one.mlp - (one.input if job.gpu.local_spec else 0.0)
    return dropped


def backward(job: PlannedRun, tokens: int) -> float:
    """Bytes of gradients of activations at the worst moment of one layer's backward. An estimate.

    Counted are the gradients of the MLP's three products, of gate and up, and of the residual
    stream.
    """
    tp = 1 if job.model.experts and job.ep > 1 else job.tp
    visits = int(job.model.hf.get("num_experts_per_tok") or 1) if job.model.experts else 1
    return tokens * job.word * (5 * visits * job.model.width / tp + 3 * job.model.hidden / job.sp)


def forward_only(job: PlannedRun, tokens: int) -> float:
    """Bytes of activations in a forward without gradient, which frees each layer's. An estimate.

    Counted are the largest layer's tensors: gate, up, silu, product, and four of width h.
    """
    tp = 1 if job.model.experts and job.ep > 1 else job.tp
    visits = int(job.model.hf.get("num_experts_per_tok") or 1) if job.model.experts else 1
    return tokens * job.word * (5 * visits * job.model.width / tp + 4 * job.model.hidden)
