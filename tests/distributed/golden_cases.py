"""One golden run under every layout: tiny Qwen3, 4 SC-SDPO steps on a fixed batch.

    golden_cases.py MODEL_DIR MOE_DIR TIED_DIR TRACE.json

test_golden.py runs it under torchrun. One rank writes the trace, other world sizes compare with it.
The first step is also compared with a float64 twin made of transformers' model and
tests/reference.py, which shares no code with the actor.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch

from megasd.actor.actor import Actor
from megasd.actor.forward import run_microbatches
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.batch.batch import Batch
from megasd.batch.microbatch import Microbatch
from megasd.batch.shard import microbatches_in_order
from megasd.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    CreditConfig,
    DistillTerm,
    NLLTerm,
    PolicyGradientTerm,
    QuestionWeightConfig,
    TeacherConfig,
)
from tests import reference

VOCAB, STEPS, TOP_K = 96, 4, 7
TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
SP = {"sequence_parallel": True}
CASES: dict[int, dict[str, dict]] = {
    1: {
        "tp1": {},
        "micro 1": {"micro_batch_size": 1},
        "micro 4": {"micro_batch_size": 4},
        "packed": {"packing": True},
        "recompute": {"recompute_granularity": "full"},
        "plain optimizer": {"use_distributed_optimizer": False},
    },
    2: {
        "tp2": {TP: 2},
        "tp2 sp": {TP: 2, **SP},
        "tp2 sp packed": {TP: 2, **SP, "packing": True},
        "pp2": {PP: 2},
        "pp2 micro 1": {PP: 2, "micro_batch_size": 1},
        "cp2": {CP: 2},
        "cp2 packed": {CP: 2, "packing": True},
        "dp2": {},
        "dp2 plain optimizer": {"use_distributed_optimizer": False},
        "dp2 overlap": {"overlap_grad_reduce": True, "micro_batch_size": 1},
        "dp2 overlap both": {
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "micro_batch_size": 1,
        },
    },
    4: {
        "tp2 pp2": {TP: 2, PP: 2},
        "tp2 dp2": {TP: 2},
        "tp2 sp cp2 packed": {TP: 2, CP: 2, **SP, "packing": True},
        "pp2 dp2": {PP: 2},
        "cp2 dp2": {CP: 2},
    },
    8: {
        "tp2 cp2 pp2 sp": {TP: 2, CP: 2, PP: 2, **SP},
        "tp2 cp2 pp2 sp packed": {TP: 2, CP: 2, PP: 2, **SP, "packing": True},
    },
}
MOE_CASES: dict[int, dict[str, dict]] = {
    1: {"moe tp1": {}},
    2: {
        "moe ep2": {EP: 2},
        "moe tp2 sp": {TP: 2, **SP},
        "moe ep2 budget": {EP: 2, "packing": True, "max_tokens_per_microbatch": 60},
    },
    4: {"moe tp2 ep2 sp": {TP: 2, EP: 2, **SP}},
}


TIED_CASES: dict[int, dict[str, dict]] = {
    1: {"tied micro 1": {"micro_batch_size": 1}},
    2: {
        "tied tp2": {TP: 2},
        "tied pp2": {PP: 2},
        "tied dp2 overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    4: {"tied tp2 pp2": {TP: 2, PP: 2}},
}
# Token budgets in place of a number of samples. The longest student sequence has 19 tokens, the
# longest teacher sequence has 27.
PACKED, PADDED = {"packing": True, "max_tokens_per_microbatch": 60}, {"max_tokens_per_microbatch": 40}
BUDGET_CASES: dict[int, dict[str, dict]] = {
    1: {"budget packed": PACKED, "budget padded": PADDED, "budget of one": {"max_tokens_per_microbatch": 1}},
    2: {
        "dp2 budget packed": PACKED,
        "dp2 budget padded": PADDED,
        "pp2 budget packed": {PP: 2, **PACKED},
        "cp2 budget": {CP: 2, **PADDED},
    },
    4: {"tp2 dp2 sp budget packed": {TP: 2, **SP, **PACKED}, "dp4 budget packed": PACKED},
    8: {
        "tp2 cp2 dp2 sp budget packed": {TP: 2, CP: 2, **SP, **PACKED},
        "tp2 pp2 dp2 budget padded": {TP: 2, PP: 2, **PADDED},
    },
}
# dtype of parameters; main parameters, gradients and the EMA teacher are fp32
BF16 = {"dtype": "bfloat16"}
BF16_CASES: dict[int, dict[str, dict]] = {
    1: {},
    2: {"bf16 tp2 sp": {TP: 2, **SP}, "bf16 pp2": {PP: 2}, "bf16 dp2": {}},
    4: {},
}


# Supports, transports, clip and temperatures, and all terms at once. Each runs in another layout
# than the golden run.
ALGORITHMS: dict[str, dict] = {
    "full": {"distill": DistillTerm(support="full", beta=0.0)},
    "full clip": {
        "distill": DistillTerm(support="full", beta=0.0, pointwise_clip=0.05, teacher_temperature=0.8)
    },
    "union": {"distill": DistillTerm(support="union", top_k=TOP_K, beta=0.1)},
    "teacher": {"distill": DistillTerm(support="teacher", top_k=TOP_K, tail="raw", beta=0.0)},
    "record": {
        "distill": DistillTerm(support="teacher", top_k=TOP_K, tail="raw", beta=0.0),
        "teacher": TeacherConfig(transport="record"),
    },
    "all terms": {"policy_gradient": PolicyGradientTerm(coefficient=0.3), "nll": NLLTerm(coefficient=0.1)},
}


def credit(kind: str, surrogate: str = "ppo", **values: object) -> dict:
    term = PolicyGradientTerm(surrogate=surrogate, credit=CreditConfig(kind=kind, **values))
    return {"policy_gradient": term, "distill": None, "tis_clip": None}


# Algorithms that read whole sequences or all ranks; each with the layout of two ranks it runs in.
METHODS: dict[str, tuple[dict, dict]] = {
    "rlsd snapshot": (
        credit("rlsd") | {"teacher": TeacherConfig(weights="snapshot", refresh_every=1)},
        {TP: 2},
    ),
    "cepo": (credit("cepo"), {PP: 2}),
    "rlcsd": (credit("rlcsd", tau=0.5) | {"aggregation": "token_mean"}, {CP: 2}),
    "antisd gate": (credit("antisd", gate_warmup=1, gate_ratio=0.9), {PP: 2}),
    "cl egrsd": (credit("egrsd", "reinforce", window=2) | {"aggregation": "token_mean"}, {}),
    "return": (credit("return") | {"epochs": 2, "minibatches": 2}, {CP: 2, "packing": True}),
    "margin": (credit("margin"), {}),
    "gspo": (
        {
            "policy_gradient": PolicyGradientTerm(surrogate="gspo"),
            "minibatches": 2,
            "distill": None,
            "teacher": None,
        },
        {PP: 2},
    ),
    "routed": (
        {
            "distill": DistillTerm(top_k=TOP_K, samples="wrong", token_weight="confidence"),
            "policy_gradient": PolicyGradientTerm(samples="undistilled"),
            "aggregation": "token_mean_of_terms",
        },
        {TP: 2, **SP},
    ),
    "scan": (
        {
            "distill": DistillTerm(
                support="full", beta=0.0, token_weight="scan", token_weight_scale=5.0, skip_tokens=1
            )
        },
        {},
    ),
    "trust region": ({"teacher": TeacherConfig(weights="trust_region", trust_mix=0.3)}, {TP: 2}),
    "adaptive": ({"distill": DistillTerm(divergence="adaptive", support="teacher", top_k=TOP_K)}, {CP: 2}),
}


def methods_batch() -> Batch:
    """The batch with verdicts, and two contrasting contexts a sample (some samples lack one)."""
    batch, g = make_batch(), torch.Generator().manual_seed(6)
    lens = torch.stack([batch.context_lens[:, 0], *torch.randint(3, 15, (2, 32), generator=g)], dim=1)
    lens[lens[:, 0] == 0] = 0
    lens[3::7, 2] = 0
    batch.context_ids, batch.context_lens = torch.randint(0, VOCAB, (int(lens.sum()),), generator=g), lens
    batch.right = torch.rand(32, generator=g) < 0.4
    routed = ~batch.right & batch.distilled
    batch.masks = {"distill": routed, "policy_gradient": ~routed}
    return batch


def run_method(config: Config, device: torch.device, steps: int = 2) -> list[list[float]]:
    actor, whole, trace = (
        Actor(config, init_model_parallel(config.actor, device, seed=1)),
        methods_batch(),
        [],
    )
    if config.algorithm.aggregation != "token_mean_of_terms":
        whole.masks = {}
    for _ in range(steps):
        batches = actor.shard(whole)
        metrics = actor.update(batches, actor.teacher_forward(batches))
        trace.append([metrics["loss"], metrics["grad_norm"]])
    return trace


def make_config(model: str, actor: dict, **algorithm: object) -> Config:
    config = Config()
    config.model.path, config.run.steps = model, STEPS
    # One rank has microbatches of 2. Several ranks have 4, since their time goes by the number of
    # collectives.
    size = 2 if os.environ.get("WORLD_SIZE", "1") == "1" else 4
    config.actor = ActorConfig(
        **({"dtype": "float32", "micro_batch_size": size, "make_vocab_size_divisible_by": 20} | actor)
    )
    weight = QuestionWeightConfig(kind="sqrt_pq")
    values = {
        "distill": DistillTerm(top_k=TOP_K),
        "teacher": TeacherConfig(),
        "question_weight": weight,
    } | algorithm
    config.algorithm = AlgorithmConfig(**values)
    config.optimizer.lr, config.optimizer.lr_warmup_steps, config.rollout.temperature = 1e-3, 2, 1.1
    return config


def make_batch() -> Batch:
    """8 questions x 4 samples of various lengths.

    Half of the questions are uninformative, and some samples have no teacher context.
    """
    g = torch.Generator().manual_seed(5)

    def draw(low: int, high: int, n: int = 32) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=g)

    prompt_lens, teacher_lens, response_lens = draw(3, 12), draw(8, 20), draw(1, 9)
    teacher_lens[::5] = 0
    pass_rates = torch.tensor([0, 1, 2, 3, 4, 0, 4, 1]) / 4
    tokens = int(response_lens.sum())
    return Batch(
        prompt_ids=draw(0, VOCAB, int(prompt_lens.sum())),
        prompt_lens=prompt_lens,
        context_ids=draw(0, VOCAB, int(teacher_lens.sum())),
        context_lens=teacher_lens[:, None],
        response_ids=draw(0, VOCAB, tokens),
        response_lens=response_lens,
        question_weight=(pass_rates * (1 - pass_rates)).sqrt().double().repeat_interleave(4),
        question_size=torch.full((32,), 4),
        scored=torch.ones(32, dtype=torch.bool),
        streams={
            "rollout_logp": -4.5 + torch.rand(tokens, generator=g),
            "advantage": torch.randn(tokens, generator=g),
        },
    )


def run(config: Config, device: torch.device, batch: Batch, steps: int = STEPS) -> list[list[float]]:
    """[[loss, gradient norm], ...] of a run."""
    actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
    trace = []
    for _ in range(steps):
        batches = actor.shard(batch)
        metrics = actor.update(batches, actor.teacher_forward(batches))
        trace.append([metrics["loss"], metrics["grad_norm"]])
    return trace


def twin(model_dir: str, batch: Batch, config: Config) -> list[float]:
    """Loss and gradient norm of the first step in float64, from the formulas.

    One sample at a time, the whole vocabulary on one device.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    temperature, term = config.rollout.temperature, config.algorithm.distill
    per_question = batch.question_weight.view(-1, 4)[:, 0]
    mean = per_question[per_question > 0].mean()
    prompts, teachers = batch.prompt_ids.split(batch.prompt_lens.tolist()), batch.context_parts(0)
    responses, mus = (
        x.split(batch.response_lens.tolist()) for x in (batch.response_ids, batch.streams["rollout_logp"])
    )
    total = torch.zeros((), dtype=torch.float64)
    for i, response in enumerate(responses):
        if len(teachers[i]) == 0 or batch.question_weight[i] == 0:
            continue
        student = model(torch.cat([prompts[i], response])[None]).logits[0, len(prompts[i]) - 1 : -1]
        with torch.no_grad():
            teacher = model(torch.cat([teachers[i], response])[None]).logits[0, len(teachers[i]) - 1 : -1]
            ids, _ = reference.topk(student, term.top_k)
            logp = reference.sampled_logp(student, response, temperature=temperature)
            tis = (logp - mus[i]).clamp(-20, 20).exp().clamp(max=config.algorithm.tis_clip)
        logq = [reference.bucket_logprobs(x, ids, temperature=temperature) for x in (student, teacher)]
        loss = reference.divergence(logq[0], logq[1], beta=term.beta)
        total = total + batch.question_weight[i] / mean * (tis * loss).sum() / len(response) / len(batch)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return [float(total), float(norm)]


def check(name: str, trace: list[list[float]], golden: list[list[float]], tolerance: float = 1e-5) -> None:
    worst = max(
        abs(a - b) / abs(b)
        for row, want in zip(trace, golden, strict=True)
        for a, b in zip(row, want, strict=True)
    )
    assert worst < tolerance, f"{name}: relative difference {worst:.2e}\n{trace}\n{golden}"
    if int(os.environ["RANK"]) == 0:
        print(f"ok {name} {worst:.1e}", flush=True)


def hf_parity(model_dir: str, config: Config, device: torch.device, name: str) -> None:
    """Compare the actor's logits and scores with transformers' logits, fp32.

    The positions are those that predict a response token.
    """
    from transformers import AutoModelForCausalLM

    batch = make_batch()
    actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
    found, whole = actor.score(batch, top_k=VOCAB), gathered_logits(actor, batch)
    if not found:
        return
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompts, responses = (
        batch.prompt_ids.split(batch.prompt_lens.tolist()),
        batch.response_ids.split(batch.response_lens.tolist()),
    )
    with torch.no_grad():
        logits = [
            model(torch.cat([p, r])[None]).logits[0, len(p) - 1 : -1]
            for p, r in zip(prompts, responses, strict=True)
        ]
    raw = (whole - torch.cat(logits)).abs().max().item()
    logp = torch.cat(logits).log_softmax(-1)
    worst = (found["logps"] - logp.gather(1, found["ids"])).abs().max().item()
    sampled = (found["logp"] - logp.gather(1, batch.response_ids[:, None])[:, 0]).abs().max().item()
    spread = (found["entropy"] + (logp.exp() * logp).sum(-1)).abs().max().item()
    worst = max(raw, worst, sampled, spread)
    assert worst < 1e-4, (
        f"{name}: logits {raw:.2e}, sampled {sampled:.2e}, entropy {spread:.2e}, all {worst:.2e}"
    )
    if actor.mesh.tp_rank == 0 and actor.mesh.cp_rank == 0:
        print(f"ok hf {name} logits {raw:.1e}, all {worst:.1e}", flush=True)


@torch.no_grad()
def gathered_logits(actor: Actor, batch: Batch) -> torch.Tensor:
    """Raw logits [R, VOCAB] on the last stage, from the actor's own forward.

    The actor never joins the vocabulary shards; this function does.
    """
    mesh, rows = actor.mesh, torch.zeros(len(batch.response_ids), VOCAB)

    def read(microbatch: Microbatch, hidden: torch.Tensor) -> None:
        shard = hidden @ actor.model.output_weight().t()
        shards = [torch.empty_like(shard) for _ in range(mesh.tp_size)]
        torch.distributed.all_gather(shards, shard, group=mesh.tp_group)
        rows[microbatch.response_index[microbatch.valid]] = torch.cat(shards, 1)[microbatch.valid, :VOCAB]

    microbatches = actor.student.microbatches(batch, microbatches_in_order(batch, actor.costs))
    run_microbatches(actor.ddp, microbatches, mesh, actor.model_config, read, forward_only=True)
    if mesh.cp_size > 1 and mesh.is_last_stage:
        torch.distributed.all_reduce(rows, group=mesh.cp_group)
    return rows


def lone_question(batch: Batch) -> Batch:
    """The batch with one informative question, of which one sample has a teacher context.

    Most data-parallel ranks have nothing to learn from.
    """
    weight = torch.zeros(32, dtype=torch.float64)
    weight[4:8] = 0.4
    chosen = batch.select(list(range(32)))
    chosen.question_weight = weight
    return chosen


def nothing_to_learn(model_dir: str, device: torch.device, batch: Batch, actor: dict) -> None:
    """No informative question: loss 0, gradient 0, and the step goes on."""
    chosen = batch.select(list(range(32)))
    chosen.question_weight = torch.zeros(32, dtype=torch.float64)
    assert run(make_config(model_dir, actor), device, chosen, steps=2) == [[0.0, 0.0]] * 2


def finish(rank: int) -> None:
    torch.distributed.barrier()
    if rank == 0:
        print("all ok", flush=True)


def main() -> None:
    model_dir, moe_dir, tied_dir, trace_file = sys.argv[1:5]
    device = init_distributed()
    world, rank, batch = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), make_batch()
    golden = json.loads(Path(trace_file).read_text()) if world > 1 else {}
    if world == 1:
        config = make_config(model_dir, {})
        golden["dense"] = run(config, device, batch)
        check("float64 twin", golden["dense"][:1], [twin(model_dir, batch, config)])
        golden["moe"] = run(make_config(moe_dir, {}), device, batch)
        golden["tied"] = run(make_config(tied_dir, {}), device, batch)
        check("tied float64 twin", golden["tied"][:1], [twin(tied_dir, batch, config)])
        golden["bf16"] = run(make_config(model_dir, BF16), device, batch)
        check("bf16 near fp32", golden["bf16"][:1], golden["dense"][:1], tolerance=5e-2)
        golden["lone"] = run(make_config(model_dir, {}), device, lone_question(batch))
        golden["token_mean"] = run(make_config(model_dir, {}, aggregation="token_mean"), device, batch)
        for name, algorithm in ALGORITHMS.items():
            golden[name] = run(make_config(model_dir, {}, **algorithm), device, batch)
        check("record near teacher", golden["record"], golden["teacher"])
        for name, (algorithm, _) in METHODS.items():
            golden[name] = run_method(make_config(model_dir, {}, **algorithm), device)
        Path(trace_file).write_text(json.dumps(golden))
    for name, actor in CASES[world].items():
        check(name, run(make_config(model_dir, actor), device, batch), golden["dense"])
    for name, actor in BUDGET_CASES[world].items():
        check(name, run(make_config(model_dir, actor), device, batch, steps=2), golden["dense"][:2])
    # Eight ranks have all dimensions of a layout at once. Fewer ranks cover the rest.
    if world == 8:
        finish(rank)
        return
    # The other models run fewer steps than the dense one on several ranks.
    steps = STEPS if world == 1 else 2
    for name, actor in MOE_CASES[world].items():
        check(name, run(make_config(moe_dir, actor), device, batch, steps=steps), golden["moe"][:steps])
    for name, actor in TIED_CASES[world].items():
        check(name, run(make_config(tied_dir, actor), device, batch, steps=steps), golden["tied"][:steps])
    for name, actor in BF16_CASES[world].items():
        check(
            name,
            run(make_config(model_dir, actor | BF16), device, batch, steps=2),
            golden["bf16"][:2],
            tolerance=5e-2,
        )
    layout = {1: {}, 2: PACKED, 4: {TP: 2}}[world]
    check(
        "lone question",
        run(make_config(model_dir, layout), device, lone_question(batch), steps=steps),
        golden["lone"][:steps],
    )
    token_mean = make_config(model_dir, layout, aggregation="token_mean")
    check("token mean", run(token_mean, device, batch, steps=steps), golden["token_mean"][:steps])
    nothing_to_learn(model_dir, device, batch, layout)
    layout = {1: {"micro_batch_size": 1}, 2: {CP: 2}, 4: {TP: 2, CP: 2, **SP}}[world]
    # four ranks have all that two have
    for name, algorithm in ALGORITHMS.items() if world != 2 else ():
        check(
            name,
            run(make_config(model_dir, layout, **algorithm), device, batch, steps=steps),
            golden[name][:steps],
        )
    for name, (algorithm, split) in METHODS.items() if world == 2 else ():
        check(name, run_method(make_config(model_dir, split, **algorithm), device), golden[name])
    for name, actor in {
        1: {"tp1": {}},
        2: {"tp2": {TP: 2}, "pp2": {PP: 2}, "cp2": {CP: 2}},
        4: {"tp2 pp2": {TP: 2, PP: 2}},
    }[world].items():
        hf_parity(model_dir, make_config(model_dir, actor), device, name)
    finish(rank)


if __name__ == "__main__":
    main()
