"""Weight pushes from an actor under TP 2 into a real SGLang server; run by test_train.py under torchrun.

push_cases.py MODEL_DIR RUN_DIR: rank 0 prints "ok ..." lines with the figures it saw.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from megasd.actor.actor import Actor  # noqa: E402
from megasd.actor.parallel import broadcast_tensors, init_distributed, init_model_parallel  # noqa: E402
from megasd.batch import Batch  # noqa: E402
from megasd.config import RolloutConfig, SyncConfig  # noqa: E402
from megasd.data.chat import Chat  # noqa: E402
from megasd.rollout.generate import Rollout  # noqa: E402
from megasd.sync import SyncError, WeightSync  # noqa: E402
from tests.distributed.golden_cases import TP, make_batch, make_config  # noqa: E402

TOLERANCE = 1e-3  # nats
PROMPTS = [[4, 55, 17, 90, 2, 5], [4, *range(20, 60), 2, 5], [127, 101, 102, 0, 3]]  # padding rows of the vocabulary too
TOKENS = 24
CHANGED = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


class Spoiled:
    """The actor, but for `change` between its export and the engine."""

    def __init__(self, actor: Actor, change: Callable[[Tensors], Tensors]) -> None:
        self.actor, self.change = actor, change

    def export_hf(self) -> Tensors | None:
        tensors = self.actor.export_hf()
        return None if tensors is None else self.change(tensors)

    def score_tokens(self, ids: list[int]) -> list[float]:
        return self.actor.score_tokens(ids)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"ok {text}", flush=True)


def compare(actor: Actor, rollout: Rollout | None) -> float:
    """The engine's greedy tokens are those the actor holds most likely; returns the largest difference of their log-probs (nats)."""
    worst = 0.0
    for prompt in PROMPTS:
        found = None
        if rollout is not None:
            ids, logps = rollout.greedy(prompt, TOKENS)
            found = {"ids": torch.tensor(ids), "logps": torch.tensor(logps)}
        engine = broadcast_tensors(found)
        length = len(engine["ids"])
        none = torch.zeros(0, dtype=torch.int64)
        batch = Batch(
            prompt_ids=torch.tensor(prompt),
            prompt_lens=torch.tensor([len(prompt)]),
            teacher_ids=none,
            teacher_lens=torch.tensor([0]),
            response_ids=engine["ids"],
            response_lens=torch.tensor([length]),
            question_weight=torch.ones(1, dtype=torch.float64),
            question_size=torch.ones(1, dtype=torch.int64),
            scored=torch.ones(1, dtype=torch.bool),
        )
        scored = actor.score(batch, top_k=1)
        assert torch.equal(scored["ids"][:, 0], engine["ids"]), f"actor {scored['ids'][:, 0].tolist()}, engine {engine['ids'].tolist()}"
        worst = max(worst, (scored["logp"] - engine["logps"]).abs().max().item())
    assert worst < TOLERANCE, worst
    return worst


def refused(sync: WeightSync, version: int) -> str:
    """What a push that must fail said; it fails with SyncError on every rank."""
    message = None
    try:
        sync.push(version)
    except SyncError as error:
        message = str(error)
    everywhere = torch.tensor([message is not None], dtype=torch.int32)
    dist.all_reduce(everywhere)
    assert everywhere.item() == dist.get_world_size(), f"only {everywhere.item()} ranks raised SyncError"
    if dist.get_rank() != 0:
        assert f"version {version}" in message
    return message


def main() -> None:
    model_dir, run_dir = sys.argv[1], Path(sys.argv[2])
    device = init_distributed()
    rollout, chat = None, Chat(model_dir)
    if dist.get_rank() == 0:
        rollout = Rollout(
            RolloutConfig(), model_path=model_dir, device="cpu", dtype="float32", run_dir=run_dir, seed=1,
            stop_token_ids=chat.eos_token_ids, vocab_size=chat.vocab_size,
        )  # fmt: skip
        rollout.launch()
    try:
        cases(model_dir, run_dir, rollout, device)
    finally:
        if rollout is not None:
            rollout.close()


def cases(model_dir: str, run_dir: Path, rollout: Rollout | None, device: torch.device) -> None:
    config = make_config(model_dir, {TP: 2})
    actor = Actor(config, init_model_parallel(config.actor, device, seed=1))
    if rollout is not None:
        rollout.wait_ready()
    with WeightSync(actor, rollout, SyncConfig(tolerance=TOLERANCE), run_dir, model_path=model_dir, probes=PROMPTS, device=device) as sync:
        for version in range(3):
            probe = sync.push(version)
            worst = compare(actor, rollout)
            if rollout is not None:
                assert rollout.version == version
                say(f"push {version}: greedy tokens equal, log-probs within {worst:.1e} nats, probe {probe['sync/probe_max_diff']:.1e}")
            share = actor.take(make_batch())
            actor.train_step(share, actor.teach(share))

        # The engine still holds version 2; the actor has gone a step further.
        for name, change, words in (
            ("shape", lambda t: t | {CHANGED: t[CHANGED][:-1]}, f"exported {CHANGED} as"),
            ("missing", lambda t: {k: v for k, v in t.items() if k != CHANGED}, f"exported no {CHANGED}"),
            ("unknown", lambda t: t | {CHANGED + "_scale": torch.ones(1)}, f"exported {CHANGED}_scale, which the model does not have"),
        ):
            sync.actor = Spoiled(actor, change)
            message = refused(sync, 3)
            if rollout is not None:
                assert words in message, message
                assert rollout.version == 2
                rollout.score(PROMPTS[0])  # raises if the engine says that it holds another version
            say(f"{name}: {message}")

        for scale in (1.5, 1.02):
            sync.actor = Spoiled(actor, lambda t, scale=scale: t | {CHANGED: t[CHANGED] * scale})
            message = refused(sync, 3)
            if rollout is not None:
                assert "differ by" in message and "sync.tolerance=0.001" in message, message
            say(f"one tensor x {scale}: {message}")
        sync.actor = actor
        sync.push(3)
        say(f"the next push is right again: within {compare(actor, rollout):.1e} nats")


if __name__ == "__main__":
    main()
