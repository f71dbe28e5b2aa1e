"""FP8 and all else that needs TransformerEngine, on one GPU.

    fp8_gpu_cases.py MODEL_DIR CASE

test_fp8_gpu.py runs it under torchrun.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasd.actor import model as build
from megasd.actor.actor import Actor
from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.batch.batch import Batch
from megasd.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DistillTerm,
    OptimizerConfig,
    QuestionWeightConfig,
    TeacherConfig,
)
from megasd.config.validate_actor import check_actor, check_sizes
from megasd.models.param_table import global_params
from megasd.weights.export import export_hf
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf
from megasd.weights.te_fp8 import is_quantised, plain

VOCAB, SAMPLES, PROMPT, RESPONSE, STEPS = 512, 8, 24, 40, 8
RECIPES = ("delayed", "tensorwise", "blockwise")
# relative: of a loss; of a weight by E4M3 with a scale of its tensor or block (half a step is 1/16)
LOSS, ROUNDING = 0.02, 2.0**-3


def small_checkpoint(directory: Path) -> Path:
    """A random Qwen3 whose every matrix is whole blocks of 128."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def fp8(recipe: str, *, parameters: bool = False) -> dict[str, Any]:
    return {
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "first_last_layers_bf16": recipe != "delayed",
        "fp8_param_gather": parameters,
    }


def make_config(model: Path, actor: dict[str, Any], **teacher: Any) -> Config:
    config = Config(
        actor=ActorConfig(**{"micro_batch_size": 4, "make_vocab_size_divisible_by": 128} | actor),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=1, clip_grad=1.0),
        algorithm=AlgorithmConfig(
            distill=DistillTerm(top_k=20, is_clip=None),
            teacher=TeacherConfig(**teacher),
            question_weight=QuestionWeightConfig(kind="none"),
            tis_clip=None,
        ),
    )
    config.model.path, config.run.steps = str(model), STEPS
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = PROMPT, RESPONSE
    check_actor(config)
    check_sizes(config, read_hf_config(model), str(model))
    return config


def make_batch() -> Batch:
    """One length per sample for the student; the teacher's contexts are longer."""
    g = torch.Generator().manual_seed(3)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(0, VOCAB, (n,), generator=g)

    def lengths(n: int) -> torch.Tensor:
        return torch.full((SAMPLES,), n)

    return Batch(
        prompt_ids=draw(SAMPLES * PROMPT),
        prompt_lens=lengths(PROMPT),
        context_ids=draw(SAMPLES * 2 * PROMPT),
        context_lens=lengths(2 * PROMPT)[:, None],
        response_ids=draw(SAMPLES * RESPONSE),
        response_lens=lengths(RESPONSE),
        question_weight=torch.ones(SAMPLES, dtype=torch.float64),
        question_size=torch.full((SAMPLES,), SAMPLES),
        scored=torch.ones(SAMPLES, dtype=torch.bool),
        streams={"rollout_logp": torch.full((SAMPLES * RESPONSE,), -6.0)},
    )


def make_actor(model: Path, actor: dict[str, Any], device: torch.device, **teacher: Any) -> Actor:
    config = make_config(model, actor, **({"weights": "frozen"} | teacher))
    return Actor(config, init_model_parallel(config.actor, device, seed=1))


def step(actor: Actor) -> dict[str, float]:
    batches = actor.shard(make_batch())
    return actor.update(batches, actor.teacher_forward(batches))


def losses(model: Path, actor: dict[str, Any], device: torch.device, steps: int = STEPS) -> list[float]:
    """The loss of each step on one batch against the frozen start model, which learning brings down."""
    made = make_actor(model, actor, device)
    return [step(made)["loss"] for _ in range(steps)]


def near(found: float, wanted: float, tolerance: float, what: str) -> None:
    difference = abs(found - wanted) / abs(wanted)
    print(f"{what}: {found:.6g} against {wanted:.6g}, {difference:.1e} relative", flush=True)
    assert difference < tolerance, what


def case_losses(model: Path, device: torch.device) -> None:
    want = losses(model, {}, device)
    assert want[-1] < want[0], want
    for recipe in RECIPES:
        for parameters in (False, True):
            found = losses(model, fp8(recipe, parameters=parameters), device)
            near(found[0], want[0], LOSS, f"{recipe}, FP8 parameters {parameters}, first loss")
            assert found[-1] < found[0], found


def case_spec(model: Path, device: torch.device) -> None:
    """The same weights give the same logits in TransformerEngine's layers and in the local ones.

    In bfloat16 also with the fused rotary embedding.
    """
    hf, family = read_hf_config(model), build.family_of(str(model))
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.03)):
        found: dict[str, torch.Tensor] = {}
        kinds: dict[str, tuple[dict, bool]] = {"local": ({}, True), "te": ({}, False)}
        if dtype == "bfloat16":
            kinds["te, rope fused"] = ({"apply_rope_fusion": True}, False)
        for name, (extra, local) in kinds.items():
            actor = ActorConfig(dtype=dtype, make_vocab_size_divisible_by=128, **extra)
            mesh = init_model_parallel(actor, device, seed=1)
            one = build.build_model(
                family, build.transformer_config(family, actor, device), actor, mesh, local_spec=local
            ).eval()
            params = global_params(dict(one.named_parameters()))
            load_hf(params, model, tp_rank=0, tp_size=1)
            ids = torch.randint(hf["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(5)).to(
                device
            )
            with torch.no_grad():
                hidden = one(ids, torch.arange(48, device=device).expand(2, -1), None)
                found[name] = (hidden @ one.output_weight().t())[..., :VOCAB].float()
        for name in list(found)[1:]:
            error = float((found[name] - found["local"]).norm() / found["local"].norm())
            print(f"{dtype} {name} against local: {error:.1e}", flush=True)
            assert error < tolerance, (dtype, name)


def peak(work: Callable[[], dict[str, float]]) -> tuple[float, int]:
    """The loss, and bytes above those at the start."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return work()["loss"], torch.cuda.max_memory_allocated() - before


def case_memory(model: Path, device: torch.device) -> None:
    """FP8 parameters take less memory than those of bf16: a byte each, and scales, instead of two."""
    sizes = {}
    for name, actor in (("bf16", {}), *((recipe, fp8(recipe, parameters=True)) for recipe in RECIPES)):
        made = make_actor(model, actor, device)
        step(made)
        params = made.params()
        layers = {n for n in params if ".linear_" in n and n.endswith(".weight")}
        # the first and the last layer stay in bf16
        inner = {n for n in layers if ".layers.1." in n or ".layers.2." in n}
        expected = {"bf16": set(), "delayed": layers}.get(name, inner)
        assert {n for n, param in params.items() if is_quantised(param)} == expected, name
        # what is gathered
        sizes[name] = sum(buffer.param_data.nbytes for buffer in made.ddp.buffers)
    print({name: f"{size / 2**20:.2f} MiB" for name, size in sizes.items()}, flush=True)
    assert all(size < sizes["bf16"] for name, size in sizes.items() if name != "bf16")


def case_graph(model: Path, device: torch.device) -> None:
    # eight samples: the last microbatch has filler rows
    fixed = {"micro_batch_size": 3}
    want = losses(model, fixed, device)
    found = losses(model, fixed | {"cuda_graph": True}, device)
    for number, (a, b) in enumerate(zip(found, want, strict=True)):
        near(a, b, 1e-2, f"loss of step {number} with graphs")


def case_recompute(model: Path, device: torch.device) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "core_attn": {"recompute_granularity": "selective"},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        "full": {"recompute_granularity": "full", "recompute_num_layers": 2},
    }
    for precision in ({}, fp8("tensorwise")) if torch.cuda.get_device_capability() >= (8, 9) else ({},):
        values, bytes_ = {}, {}
        for name, extra in kinds.items():
            made = make_actor(model, precision | extra, device)
            # optimizer states and FP8 copies are made
            step(made)
            values[name], bytes_[name] = peak(partial(step, made))
            near(values[name], values["none"], 1e-3, f"{precision or 'bf16'} {name}")
        print({name: f"{size / 2**20:.1f} MiB" for name, size in bytes_.items()}, flush=True)
        assert bytes_["full"] < bytes_["none"]


def main_parameters(actor: Actor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, the model's parameter and its fp32 main parameter (one rank: the shard is the whole)."""
    for name, param in actor.params().items():
        if getattr(param, "main_param", None) is not None:
            yield name, param, param.main_param.view(param.shape)


def case_export(model: Path, device: torch.device) -> None:
    for recipe in RECIPES:
        actor = make_actor(model, fp8(recipe, parameters=True), device)
        stored = {name: main.clone() for name, _, main in main_parameters(actor)}
        # main parameters must be the checkpoint's, not FP8's rounding of them, nor random
        fresh = make_actor(model, {}, device)
        for name, param in fresh.params().items():
            assert torch.equal(stored[name], plain(param).float()), (
                f"{recipe}: main parameter of {name} is not the checkpoint's"
            )
        for _ in range(3):
            step(actor)
        exported = {name: tensor.clone() for name, tensor in export_hf(actor.gather())}
        assert all(not is_quantised(t) and t.dtype is torch.bfloat16 for t in exported.values())
        for name, param, main in main_parameters(actor):
            error = float((plain(param).float() - main).norm() / main.norm())
            assert error < ROUNDING, f"{recipe}: {name} differs by {error:.1e}"
        own = plain(actor.params()["decoder.layers.1.mlp.linear_fc2.weight"])
        assert torch.equal(exported["model.layers.1.mlp.down_proj.weight"].to(own), own)
        print(f"ok {recipe}", flush=True)


def case_teacher(model: Path, device: torch.device) -> None:
    rate = 0.25
    for recipe in RECIPES:
        actor = make_actor(model, fp8(recipe, parameters=True), device, weights="ema", ema_rate=rate)
        weights, name = actor.teacher.weights, "decoder.layers.1.mlp.linear_fc2.weight"
        param = dict(actor.model.named_parameters())[name]
        start = weights.shadow[name].clone()
        assert torch.equal(start, plain(param).float())
        step(actor)
        student = plain(param).float()
        average = torch.lerp(start, student, rate)
        torch.testing.assert_close(weights.shadow[name], average)
        with weights.active():
            seen = plain(param).float()
            assert float((seen - average).norm() / average.norm()) < ROUNDING and param.requires_grad
        assert torch.equal(plain(param).float(), student) and param.requires_grad
        assert math.isfinite(step(actor)["loss"])
        print(f"ok {recipe}", flush=True)


def case_checkpoint(model: Path, device: torch.device) -> None:
    for actor in (fp8("delayed"), fp8("delayed", parameters=True), fp8("blockwise", parameters=True)):
        with tempfile.TemporaryDirectory() as root:
            first = make_actor(model, actor, device, weights="ema")
            step(first)
            state = {"prompts": None, "memory": None, "gate": None}
            path = first.save(Path(root), 1, state)
            want = [step(first)["loss"] for _ in range(2)]
            second = make_actor(model, actor, device, weights="ema")
            second.load(path)
            for number, value in enumerate(want):
                near(
                    step(second)["loss"], value, LOSS, f"{actor['fp8_recipe']}, step {number} after a resume"
                )


def main(model: Path, case: str) -> None:
    device = init_distributed(timeout_minutes=10)
    globals()[f"case_{case}"](model, device)
    torch.distributed.destroy_process_group()
    print("all ok", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
