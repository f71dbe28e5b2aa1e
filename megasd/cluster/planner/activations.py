"""What the layers keep for the backward, in bytes a rank, by recompute setting.

After Korthikanti et al. (2205.05198, section 4), with what differs here: RMSNorm, rotary embedding,
grouped key heads, a gated MLP, no dropout, flash attention (no scores are kept), and Megatron's
unfused SiLU. Per token of a context-parallel rank, with h hidden, q and k the widths of this rank's
query and of its key heads, f of its MLP, a its query heads, w bytes of a word, t the
tensor-parallel ranks if sequence parallelism is on, else 1:

    norm before attention, and before the MLP   (w h + w h + 4) / t       its input, its output, its 1/rms (fp32)
    attention                                   w (q + 2 k)               the fused projection,
                                                which the values are a view of
                                                w (q + k) + w q + 4 a     queries and keys after the rotary embedding; output; log-sum-exp
    norms of queries and keys (Qwen3)           w q + 4 (a + key heads)   a copy of the queries; the keys' is a view
    MLP                                         5 w f                     gate and up; silu(gate);
                                                up + 0; their product
    rotary embedding, per position              4 w d                     cosine and sine, twice; not with apply_rope_fusion

On the CPU (hardware.py: cpu; actor/cpu_layers.py) a norm keeps its input and its normalised input
in fp32 beside its output, whatever the model's dtype: 8 h + w h + 4 instead; of queries and keys
likewise; packed sequences' attention outputs are joined by a copy (w q more). That variant is held
against measurement (tests/unit/cluster/test_planner_measured.py); TransformerEngine's is from its
source and unmeasured until a GPU runs tests/gpu/test_planner_gpu.py.

FP8 (TransformerEngine): inputs of the linear layers are kept as FP8, one byte; the attention's
output is kept in bf16 beside that.

    full, uniform, groups of n layers   ceil(layers / n) inputs w h / t, and n layers' worth while one group is computed anew
    full, block, n layers               n inputs; the other layers as without
    selective                           without what the modules keep; one layer's worth of it while
                                        it is computed anew

A pipeline stage holds min(pp - stage, microbatches) microbatches at once (1F1B; Narayanan et al.
2104.04473, section 2.2.1), and never more tokens than its rank's share of a step.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from megasd.cluster.planner.job import PlannedRun


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer keeps, by part."""

    # of the layer: what recompute=full keeps
    input: float
    # with its norm, without `core`
    attention: float
    # what core attention keeps and nothing outside it does
    core: float
    # without the layer norm's input
    mlp: float
    # of the MLP: input and statistics
    norm: float

    @property
    def total(self) -> float:
        return self.attention + self.core + self.mlp + self.norm


def layer(job: PlannedRun, tokens: int, positions: int) -> Layer:
    """One layer of `tokens` tokens of this context-parallel rank; `positions`: rows of the rotary
    tables that it makes.
    """
    model, actor, word, tp = job.model, job.config.actor, job.word, job.tp
    h, d, local = model.hidden, model.head_dim, job.gpu.local_spec
    heads, groups = model.heads / tp, max(1.0, model.groups / tp)
    q, k = heads * d, groups * d
    # bytes of a kept input of a linear layer
    narrow = word if actor.fp8 is None or local else 1
    statistics = (8 * h if local else word * h) + 4
    # norms and residuals are cut over it
    fixed = job.sp
    attention = tokens / fixed * (statistics + narrow * h)
    attention += tokens * word * ((q + 2 * k) + (q + k) + q) + (tokens * q if narrow < word else 0)
    # keys and values of all ranks, and a mask that names the positions
    if local and job.cp > 1:
        attention += tokens * word * k * (2 * job.cp - 1) + 4 * positions * positions * job.cp
    if model.qk_norm and local:
        # then a view serves where a copy in fp32 is made else
        shared = word == 4
        attention += tokens * ((4 if shared and heads == groups else 8) * q + (4 if shared else 8) * k)
    elif model.qk_norm and heads != groups:
        attention += tokens * word * q
    if model.qk_norm:
        attention += tokens * 4 * (heads + groups)
    if local or not actor.apply_rope_fusion:
        attention += 4 * word * d * positions
    mlp = _experts(job, tokens, narrow) if model.experts else tokens * (4 * word + narrow) * model.width / tp
    mlp += tokens / fixed * narrow * h
    return Layer(
        input=tokens / fixed * word * h,
        attention=attention,
        core=tokens * (4 * heads + (word * q if local and actor.packing else 0)),
        mlp=mlp,
        norm=tokens / fixed * statistics,
    )


def _experts(job: PlannedRun, tokens: int, narrow: int) -> float:
    """A mixture of experts, tokens spread evenly over them: router in fp32, permuted inputs,
    experts, their products times the router's weight in fp32 and back, outputs in the experts'
    order.
    """
    model, word = job.model, job.word
    tp = 1 if job.ep > 1 else job.tp
    visits = tokens / job.sp * int(model.hf["num_experts_per_tok"]) * tp
    router = tokens / job.sp * 4 * 3 * model.experts
    return router + visits * ((narrow + word) * model.hidden + (4 * word + 4 + narrow) * model.width / tp)


def held(job: PlannedRun, stage: int, tokens: int, positions: int) -> float:
    """At the worst moment of a training step, on a rank of that pipeline stage: from the end of the
    last forward in flight to the middle of its backward.
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
    # the rotary angles, which every group is given
    tables = 4 * job.model.head_dim * positions * flight
    # What a group keeps as its input is what its first norm keeps, unless that makes a copy in fp32.
    shared = 0.0 if job.gpu.local_spec and job.word == 2 else one.input
    if actor.recompute_method == "block":
        rest = (layers - n) * one.total
        return flight * (n * one.input + rest) + max(final, one.total - shared - rest) + tables
    return flight * -(-layers // n) * one.input + max(final, n * one.total - shared) + tables


def _dropped(job: PlannedRun, one: Layer) -> float:
    """Bytes of a layer that the modules of recompute=selective do not keep; modules that are not
    named here count nothing.
    """
    modules = job.config.actor.recompute_modules
    dropped = one.core if "core_attn" in modules else 0.0
    if ("moe" if job.model.experts else "mlp") in modules:
        # TransformerEngine's first linear layer begins with the norm, whose output then goes too.
        dropped += one.mlp - (one.input if job.gpu.local_spec else 0.0)
    return dropped


def backward(job: PlannedRun, tokens: int) -> float:
    """Gradients of activations at the worst moment of one layer's backward: those of the MLP's
    three products, of gate and up, and of the residual stream. An estimate.
    """
    tp = 1 if job.model.experts and job.ep > 1 else job.tp
    visits = int(job.model.hf.get("num_experts_per_tok") or 1) if job.model.experts else 1
    return tokens * job.word * (5 * visits * job.model.width / tp + 3 * job.model.hidden / job.sp)


def forward_only(job: PlannedRun, tokens: int) -> float:
    """A pass without gradient: the largest layer's tensors, freed as it goes. An estimate: gate,
    up, silu, product, and four of h.
    """
    tp = 1 if job.model.experts and job.ep > 1 else job.tp
    visits = int(job.model.hf.get("num_experts_per_tok") or 1) if job.model.experts else 1
    return tokens * job.word * (5 * visits * job.model.width / tp + 4 * job.model.hidden)
