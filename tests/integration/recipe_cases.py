"""Every recipe for three steps, one after the other in one process, on one SGLang server that each
of them finds by URL; run by test_recipes.py.

    recipe_cases.py START_DIR OUT_DIR [NAME...]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megasd import cli
from megasd.algo.recipes import RECIPES
from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.engine.sampler import make_sampler

STEPS = 3
COMMON = [
    "rollout.num_prompts=6",
    "rollout.num_samples=8",
    "rollout.max_prompt_tokens=64",
    "rollout.max_response_tokens=16",
    "actor.dtype=float32",
    "actor.micro_batch_size=48",
    "optimizer.lr=1e-4",
    "optimizer.lr_warmup_steps=1",
    "run.overwrite=true",
    f"run.steps={STEPS}",
    "run.export=false",
    "run.tensorboard=false",
    "checkpoint.save_at_end=false",
    "sync.verify_every=1",
]
# What a method needs beside its row: a teacher model, what its file in configs/algo sets, or a
# smaller constant, to act within three steps.
MORE: dict[str, list[str]] = {
    "sft": ["actor.micro_batch_size=6"],
    "akl": ["actor.micro_batch_size=6"],
    "ssd": ["rollout.frozen_policy=true"],
    "dapo": [
        "rollout.dynamic_sampling=true",
        "rollout.max_batches=4",
        "algorithm.overlong_buffer=8",
        "algorithm.minibatches=2",
    ],
    "gspo": ["algorithm.minibatches=3"],
    "cispo": ["algorithm.minibatches=3"],
    "paced": ["actor.micro_batch_size=6", "algorithm.question_weight.num_samples=4"],
    "sdpo_paced": ["algorithm.question_weight.num_samples=4"],
    "rlsd": ["algorithm.teacher.refresh_every=2"],
    "rlcsd": ["algorithm.teacher.refresh_every=2"],
    "antisd": ["algorithm.policy_gradient.credit.gate_warmup=1"],
    "ropd": ["reward.verifier=rubric"],
    "minillm": ["algorithm.epochs=2"],
}


def arguments(name: str, start: Path, out: Path, url: str) -> list[str]:
    row = RECIPES[name]
    given = [
        f"algorithm.recipe={name}",
        f"model.path={start}/warm",
        f"data.train={start}/solved.jsonl",
        f"run.dir={out}/{name}",
        f"rollout.engine.urls=[{url}]",
        *COMMON,
    ]
    more = MORE.get(name, [])
    if not any(item.startswith("reward.verifier=") for item in more):
        given.append("reward.verifier=exact_match")
    if row.teacher is not None:
        given.append("algorithm.teacher.template={prompt}({solution})")
        if row.teacher.weights == "separate":
            given.append(f"algorithm.teacher.model_path={start}/warm")
    return given + more


def main() -> None:
    start, out = Path(sys.argv[1]), Path(sys.argv[2])
    names = sys.argv[3:] or list(RECIPES)
    settings = RolloutConfig(engine=EngineConfig(dtype="float32"))
    engine = make_sampler(
        settings,
        model_path=str(start / "warm"),
        device="cpu",
        dtype="float32",
        run_dir=out,
        seed=1,
        stop_token_ids=[],
        vocab_size=128,
    )
    with engine:
        engine.pool.wait_ready()
        url = engine.pool.engines[0].url
        for name in names:
            began = time.perf_counter()
            code = cli.main(["train", *arguments(name, start, out, url)])
            print(
                json.dumps({"recipe": name, "code": code, "seconds": round(time.perf_counter() - began, 1)}),
                flush=True,
            )


if __name__ == "__main__":
    main()
