"""Compares the logits of a converted Megatron checkpoint with the logits of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from megasd.actor import cpu_backend, parallel
from megasd.config.schema import ActorConfig
from megasd.convert import torch_dist_keys
from megasd.convert.megatron_source import open_checkpoint
from megasd.models import tp_layouts
from megasd.models.param_table import global_params

TOKENS = 24
# allowed difference in float32, as a fraction of the largest logit
TOLERANCE = 1e-3


def bytes_needed(parameters: int) -> int:
    """Host memory that logits_difference needs: one float32 model at a time, and room to build it."""
    return int(parameters * 4 * 1.5) + (1 << 30)


@torch.no_grad()
def logits_difference(
    checkpoint_dir: Path, hf_dir: Path, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """The largest difference of two logits, and the largest logit, over TOKENS fixed tokens.

    Both models run in float32, one after the other. The reader of the conversion fills the GPTModel,
    from values rounded to `dtype`; transformers loads values of the same dtype. If there is no process
    group, then this function makes one of one rank. No collectives besides.
    """
    cpu_backend.install_cpu_backend()
    device = parallel.init_distributed()
    from megasd.actor import model as build

    actor = ActorConfig(dtype="float32")
    mesh = parallel.init_model_parallel(actor, device, seed=0)
    family = build.family_of(str(hf_dir))
    ids = torch.randint(0, family.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    model = build.build_model(family, build.transformer_config(family, actor, device), actor, mesh).eval()
    params = global_params(dict(model.named_parameters()))
    with ExitStack() as stack:
        checkpoint = open_checkpoint(checkpoint_dir, hf_dir, stack)
        for name in torch_dist_keys.names(checkpoint.table):
            rule = checkpoint.table.rule(name)
            values = checkpoint.read(name, 0, torch_dist_keys.shape_of(rule)[0])
            param = params[name]
            if rule.layout is tp_layouts.vocab:
                param.zero_()
            param[: len(values)].copy_(values if dtype is None else values.to(dtype))
    hidden = model(ids, torch.arange(TOKENS, device=device)[None], None)
    found = (hidden[:, 0] @ model.output_weight().t())[:, : family.vocab_size].cpu()
    del model, params, hidden
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = (
        AutoModelForCausalLM.from_pretrained(hf_dir, local_files_only=True, dtype=dtype or "auto")
        .float()
        .eval()
    )
    wanted = reference(ids.cpu()).logits[0]
    return float((found - wanted).abs().max()), float(wanted.abs().max())
