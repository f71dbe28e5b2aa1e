"""Run by test_conversion.py on 4 gloo ranks; its argument: a directory with hf/<family> and the
converted megatron/<family>.

Each case fills NaN models of one layout with plain dist_checkpointing.load and compares them with
load_hf; some save theirs to saved/.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file

from megasd.actor.parallel import init_distributed, init_model_parallel
from megasd.config.schema import ActorConfig
from tests.distributed.family_cases import EP, PP, SP, TP, FamilyModel, same
from tests.te_stand_ins import transformer_engine_spec
from tests.tiny_weights import MODELS

ALL, MOE, FEW = tuple(MODELS), ("qwen3_moe",), ("qwen2_tied", "llama_mqa", "olmo3")
# name -> layout, virtual stages, families
CASES: dict[str, tuple[dict, int | None, tuple[str, ...]]] = {
    "tp2 pp2": ({TP: 2, PP: 2}, None, ALL),
    "tp4": ({TP: 4}, None, FEW),
    "pp2 x 2 virtual stages": ({PP: 2}, 2, FEW),
    "tp2 ep2": ({TP: 2, EP: 2, **SP}, None, MOE),
    "pp2 ep2": ({PP: 2, EP: 2}, None, MOE),
}
# cut over ranks again; the test converts them back
SAVING = {"tp2 pp2": ("qwen2_tied", "olmo3"), "pp2 ep2": MOE}
TE_NAMES, TE_FAMILIES = "tp2 pp2, names of TransformerEngine", ("qwen2", "qwen3_moe", "olmo3")


def run_case(
    root: Path, name: str, layout: dict, virtual: int | None, chosen: tuple[str, ...], device: torch.device
) -> None:
    mesh = init_model_parallel(ActorConfig(**layout), device, seed=1)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for family in chosen:
        # filled by load_hf
        model = FamilyModel(root / "hf" / family, layout, mesh, virtual_stages=virtual)
        wanted = {key: param.detach().clone() for key, param in model.params.items()}
        with torch.no_grad():
            for param in model.params.values():
                param.fill_(torch.nan)
        state = {
            f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model.chunks)
        }
        loaded = dist_checkpointing.load(state, str(root / "megatron" / family))
        for i, chunk in enumerate(model.chunks):
            # The stand-in of grouped experts saves them under local names of its own; the tensors
            # were filled in place.
            chunk.load_state_dict(loaded[f"model{i}"], strict=name != TE_NAMES)
        for key, param in model.params.items():
            assert torch.equal(param, wanted[key]), f"{family} {name}: {key}"
        exported = model.export()
        if mesh.rank == 0:
            same(exported, load_file(root / "hf" / family / "model.safetensors"), f"{family} {name}")
        if family in SAVING.get(name, ()):
            directory = root / "saved" / family
            if mesh.rank == 0:
                directory.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(
                {
                    f"model{i}": chunk.sharded_state_dict(metadata=metadata)
                    for i, chunk in enumerate(model.chunks)
                },
                str(directory),
            )
        if mesh.rank == 0:
            print(f"ok {family} {name}", flush=True)


def main(root: Path) -> None:
    device = init_distributed(timeout_minutes=20)
    for name, (layout, virtual, chosen) in CASES.items():
        run_case(root, name, layout, virtual, chosen, device)
    with transformer_engine_spec():
        run_case(root, TE_NAMES, {TP: 2, PP: 2, **SP}, None, TE_FAMILIES, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
