"""What transformers computes for a tiny checkpoint on a fixed batch, stored beside it for
tests/distributed/family_cases.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from megasd.batch.batch import Batch

VOCAB = 96
# tokens; longer than the window (3) and the original length (16) of the tiny models
PROMPT_LENS, RESPONSE_LENS = (3, 1, 5), (8, 25, 12)


def make_batch() -> Batch:
    """Three samples of unequal lengths; the stream "weight" is each token's weight in the loss."""
    g = torch.Generator().manual_seed(5)
    prompt_lens, response_lens = torch.tensor(PROMPT_LENS), torch.tensor(RESPONSE_LENS)
    number = len(PROMPT_LENS)
    return Batch(
        prompt_ids=torch.randint(0, VOCAB, (sum(PROMPT_LENS),), generator=g),
        prompt_lens=prompt_lens,
        context_ids=torch.zeros(0, dtype=torch.int64),
        context_lens=torch.zeros(number, 1, dtype=torch.int64),
        response_ids=torch.randint(0, VOCAB, (sum(RESPONSE_LENS),), generator=g),
        response_lens=response_lens,
        question_weight=torch.ones(number, dtype=torch.float64),
        question_size=torch.ones(number, dtype=torch.int64),
        scored=torch.ones(number, dtype=torch.bool),
        streams={"weight": torch.rand(sum(RESPONSE_LENS), generator=g)},
    )


def write_reference(directory: Path) -> None:
    """reference.safetensors: "logits" [R, VOCAB] that predict the responses, and "grad.<name>" of
    sum(weight * -log p), float32.
    """
    from transformers import AutoModelForCausalLM

    model, batch = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True), make_batch()
    prompts, responses = (
        batch.prompt_ids.split(list(PROMPT_LENS)),
        batch.response_ids.split(list(RESPONSE_LENS)),
    )
    logits = torch.cat(
        [
            model(torch.cat([p, r])[None]).logits[0, len(p) - 1 : -1]
            for p, r in zip(prompts, responses, strict=True)
        ]
    )
    logp = logits.log_softmax(-1).gather(1, batch.response_ids[:, None])[:, 0]
    (-logp * batch.streams["weight"]).sum().backward()
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    save_file(
        {"logits": logits.detach().contiguous()} | _experts_apart(grads), directory / "reference.safetensors"
    )


def _experts_apart(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses experts, gate and up: `experts.gate_up_proj` [E, 2 width, hidden],
    `experts.down_proj` [E, hidden, width].
    """
    found = {}
    for name, grad in grads.items():
        prefix, dot, suffix = name.rpartition("experts.")
        if suffix not in ("gate_up_proj", "down_proj"):
            found[name] = grad
            continue
        for expert, of_expert in enumerate(grad):
            parts = (
                dict(zip(("gate_proj", "up_proj"), of_expert.chunk(2), strict=True))
                if suffix == "gate_up_proj"
                else {suffix: of_expert}
            )
            found |= {f"{prefix}experts.{expert}.{part}.weight": t.clone() for part, t in parts.items()}
    return found
