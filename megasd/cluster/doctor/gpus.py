"""Checks of torch, GPUs, links between them, FP8 and NCCL.

check_... asks the machine; judge_... is a pure function that decides what the answers mean. torch
is asked in a process of its own, since its import may fail or hang.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from megasd.cluster.doctor.nvidia_smi import (
    HEALTH,
    REASONS,
    InstalledGpu,
    parse_health,
    parse_topology,
    smi_says,
)
from megasd.cluster.doctor.report import CheckResult, Machine, command, fail, gib, ok, one_line, warn
from megasd.config.schema import Config
from megasd.config.validate_parallel import default_world_size

ASK_TORCH = """
import json, torch
c = torch.cuda
there = c.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "there": there,
    "count": c.device_count() if there else 0,
    "nccl": list(c.nccl.version()) if there else None,
}))
"""
ASK_TE = "import transformer_engine.pytorch as te; print(te.__name__)"
NVLINK = re.compile(r"NV\d+$")
# Variables that turn off NCCL's fast paths -> what is lost.
SLOW = {
    "NCCL_P2P_DISABLE": "NVLink and PCIe peer copies",
    "NCCL_SHM_DISABLE": "shared memory",
    "NCCL_IB_DISABLE": "InfiniBand",
}


@functools.cache
def torch_says() -> dict[str, Any]:
    """What ASK_TORCH prints: torch's version and view of CUDA; or {"error": ..., "late": ...}."""
    status, text = command([sys.executable, "-c", ASK_TORCH])
    if status == 0:
        return json.loads(text.splitlines()[-1])
    return {
        "error": one_line(text.splitlines()[-1] if text else f"exit status {status}"),
        "late": status == 124,
    }


def cuda_keys(config: Config | None) -> list[str]:
    """Keys of the config whose values need a GPU."""
    if config is None:
        return []
    actor = config.actor
    named = ("fp8", "fp8_param_gather", "cuda_graph", "tp_comm_overlap", "apply_rope_fusion")
    keys = [f"actor.{name}" for name in named if getattr(actor, name)]
    return keys + (["actor.attention_backend"] if actor.attention_backend in ("flash", "fused") else [])


def gpus_wanted(config: Config | None) -> int:
    """GPUs that one machine needs: for the actor's ranks, and for the engines that the run starts.

    Engines and ranks may share GPUs, so the larger number counts.
    """
    if config is None:
        return 1
    engine = config.rollout.engine
    engines = 0 if engine.urls or engine.served else engine.num_engines * engine.tensor_parallel_size
    return max(engines, min(config.cluster.gpus_per_node, default_world_size(config)))


def check_torch(machine: Machine) -> CheckResult:
    """Check that torch imports and sees the GPUs that the driver shows."""
    says, (gpus, _) = torch_says(), smi_says()
    return judge_torch(says, gpus, machine.environment.get("CUDA_VISIBLE_DEVICES"))


def judge_torch(
    says: dict[str, Any], gpus: tuple[InstalledGpu, ...], visible: str | None = None
) -> CheckResult:
    """Judge torch by torch_says, the driver's GPUs and CUDA_VISIBLE_DEVICES (None: not set)."""
    if "error" in says:
        if says.get("late"):
            return warn(
                "torch",
                says["error"],
                "run it again on an idle machine; if it stays so, put the environment on a local disk",
            )
        return fail("torch", f"does not import: {says['error']}", "make the environment again (make install)")
    detail = f"{says['version']}, CUDA {says['cuda'] or 'none (a CPU build)'}"
    if not gpus or says["count"] == len(gpus):
        return ok("torch", f"{detail}, {says['count']} GPUs")
    if says["cuda"] is None:
        return fail(
            "torch",
            f"{detail}, but the machine has {len(gpus)} GPUs",
            "install the CUDA build: pip install 'torch' from PyPI",
        )
    if says["there"] and visible is not None:
        return ok("torch", f"{detail}, {says['count']} of {len(gpus)} GPUs (CUDA_VISIBLE_DEVICES)")
    fix = (
        f"driver {gpus[0].driver} is too old for CUDA {says['cuda']}, or CUDA_VISIBLE_DEVICES hides them:"
        " update it, or unset that"
    )
    return fail("torch", f"{detail}, sees {says['count']} of {len(gpus)} GPUs", fix)


def check_gpus(machine: Machine) -> list[CheckResult]:
    """Check number, kind, memory and driver of the GPUs; then memory errors and throttling."""
    gpus, wrong = smi_says()
    found = [judge_gpus(gpus, wrong, machine.config)]
    if gpus:
        for reasons in REASONS:
            status, text = command(
                ["nvidia-smi", f"--query-gpu={HEALTH.format(reasons)}", "--format=csv,noheader,nounits"]
            )
            if status == 0:
                found.append(judge_health(parse_health(text)))
                break
    return found


def judge_gpus(gpus: tuple[InstalledGpu, ...], wrong: str, config: Config | None) -> CheckResult:
    """Judge the GPUs and the error that smi_says returns."""
    keys, wanted = cuda_keys(config), gpus_wanted(config)
    if wrong:
        return fail(
            "gpu", f"nvidia-smi: {wrong}", "repair the NVIDIA driver; in a container: docker run --gpus all"
        )
    if not gpus and keys:
        fix = (
            "take a machine with GPUs, or set"
            f" {', '.join(f'{key}=null' if key.endswith('fp8') else key for key in keys)} back"
        )
        return fail("gpu", f"none, and the config asks for {', '.join(keys)}", fix)
    if not gpus:
        return warn(
            "gpu",
            "none: a run takes the CPU path (gloo, tiny models)",
            "for GPUs: take a GPU node, or docker run --gpus all",
        )
    kinds = Counter(gpu.name for gpu in gpus)
    each = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    detail = f"{each}, {gib(min(gpu.total for gpu in gpus))} each, driver {gpus[0].driver}"
    if len(gpus) < wanted:
        fix = "lower the parallel sizes of actor or rollout.engine, or take a larger machine"
        return fail("gpu", f"{detail}; actor or engines take {wanted} on a machine", fix)
    busy = [f"GPU {gpu.index} {gib(gpu.used)}" for gpu in gpus if gpu.total and gpu.used > 0.05 * gpu.total]
    if busy:
        return warn(
            "gpu",
            f"{detail}; memory is taken already: {', '.join(busy)}",
            "end whatever nvidia-smi lists there, or take others",
        )
    if len(kinds) > 1:
        return warn(
            "gpu",
            f"{detail}; they differ, and a step waits for the slowest",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )
    return ok("gpu", detail)


def judge_health(wrong: list[str]) -> CheckResult:
    """Judge the faults that parse_health returns."""
    if not wrong:
        return ok("gpu health", "no memory errors, no throttling")
    if any("memory errors" in phrase for phrase in wrong):
        return fail(
            "gpu health",
            "; ".join(wrong),
            "drain the node; the error goes with a reset of the GPU, or the GPU is broken",
        )
    return warn("gpu health", "; ".join(wrong), "look at power and cooling (nvidia-smi -q -d PERFORMANCE)")


def check_links(machine: Machine) -> list[CheckResult]:
    """Check the links between the GPUs, and InfiniBand to other machines."""
    gpus, _ = smi_says()
    status, text = command(["nvidia-smi", "topo", "-m"]) if len(gpus) > 1 else (0, "")
    nodes = machine.config.cluster.actor_nodes + machine.config.cluster.engine_nodes if machine.config else 1
    if status:
        link = warn(
            "links",
            one_line(text),
            "nvidia-smi topo -m shows the links; without them NCCL may take a slow path",
        )
        return [link, judge_fabric(_fabric(machine.sys), nodes)]
    return [judge_links(len(gpus), parse_topology(text)), judge_fabric(_fabric(machine.sys), nodes)]


def judge_links(count: int, pairs: Counter[str]) -> CheckResult:
    """Judge the links of `count` GPUs; pairs: of parse_topology."""
    if count < 2:
        return ok("links", "fewer than two GPUs: none needed")
    shown = ", ".join(f"{kind} {number}" for kind, number in pairs.most_common())
    slow = {kind: number for kind, number in pairs.items() if not NVLINK.fullmatch(kind)}
    if not pairs:
        return warn("links", "nvidia-smi topo -m shows no pair of GPUs", "run it by hand and see")
    if slow:
        detail = f"{sum(slow.values())} of {sum(pairs.values())} pairs of GPUs are not on NVLink ({shown})"
        return warn(
            "links",
            detail,
            "keep tensor parallelism within GPUs that NVLink joins; PCIe is several times slower",
        )
    return ok("links", f"NVLink between all {sum(pairs.values())} pairs of GPUs ({shown})")


def _fabric(sys_root: Path) -> list[tuple[str, str, str]]:
    """List (device and port, state, rate) of every InfiniBand or RoCE port."""
    found = []
    for port in sorted((sys_root / "class/infiniband").glob("*/ports/*")):
        state, rate = (
            (port / name).read_text().strip() if (port / name).is_file() else "?"
            for name in ("state", "rate")
        )
        found.append((f"{port.parents[1].name}:{port.name}", state, rate))
    return found


def judge_fabric(ports: list[tuple[str, str, str]], nodes: int) -> CheckResult:
    """Judge the InfiniBand ports for a run on `nodes` machines."""
    active = [port for port in ports if "ACTIVE" in port[1]]
    if active:
        rates = ", ".join(
            f"{count} x {rate}" for rate, count in Counter(rate for _, _, rate in active).items()
        )
        return ok("fabric", f"{len(active)} of {len(ports)} InfiniBand ports active ({rates})")
    if ports:
        return warn(
            "fabric",
            f"{len(ports)} InfiniBand ports, none active",
            "ibstat says why: cable, switch or subnet manager",
        )
    if nodes > 1:
        detail = f"no InfiniBand, and the config takes {nodes} machines: NCCL falls back to TCP"
        return warn(
            "fabric",
            detail,
            "take nodes with a fast network, or hand the devices to the container (--device=/dev/infiniband)",
        )
    return ok("fabric", "no InfiniBand; one machine needs none")


def check_fp8(machine: Machine) -> CheckResult:
    """Check compute capability and CUDA for the FP8 recipe, and that TransformerEngine imports."""
    gpus, _ = smi_says()
    actor = machine.config.actor if machine.config else None
    requested = actor is not None and actor.fp8 is not None
    recipe = actor.fp8_recipe if actor is not None and requested else "tensorwise"
    try:
        version: str | None = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = None
    error = ""
    if version and gpus:
        status, text = command([sys.executable, "-c", ASK_TE])
        error = one_line(text.splitlines()[-1] if text else f"exit status {status}") if status else ""
    return judge_fp8(
        gpus,
        version,
        error,
        requested,
        recipe,
        torch_says().get("cuda") if gpus and recipe == "blockwise" else None,
    )


def judge_fp8(
    gpus: tuple[InstalledGpu, ...],
    version: str | None,
    error: str,
    requested: bool,
    recipe: str = "tensorwise",
    cuda: str | None = None,
) -> CheckResult:
    """Judge whether FP8 training works.

    version, error: TransformerEngine's version and what its import says. requested: the config has
    FP8. recipe: actor.fp8_recipe. cuda: torch's version of CUDA, read for the recipe "blockwise"
    alone; TransformerEngine's check_fp8_block_scaling_support says what that recipe needs.
    """
    bad, blockwise = fail if requested else warn, recipe == "blockwise"
    least = (9, 0) if blockwise else (8, 9)
    if not gpus and not requested:
        return ok("fp8", "no GPU, and no config asks for FP8")
    if not gpus:
        return fail(
            "fp8", "actor.fp8 is set and there is no GPU", "set actor.fp8=null, or take an H100 or newer"
        )
    old = [gpu for gpu in gpus if gpu.capability is None or gpu.capability < least]
    if old:
        capability = ".".join(map(str, old[0].capability or ("?",)))
        needs = f"{'actor.fp8_recipe=blockwise' if blockwise else 'FP8'} needs {least[0]}.{least[1]}"
        fix = (
            "set actor.fp8_recipe=tensorwise, or take a newer GPU"
            if _has_fp8(gpus)
            else "set actor.fp8=null, or take a newer GPU"
        )
        return bad("fp8", f"{old[0].name} has compute capability {capability}, {needs}", fix)
    if blockwise and (cuda is None or tuple(map(int, cuda.split(".")[:2])) < (12, 9)):
        detail = (
            f"actor.fp8_recipe=blockwise needs a torch of CUDA 12.9 or newer, this one has {cuda or 'none'}"
        )
        return bad("fp8", detail, "set actor.fp8_recipe=tensorwise, or install torch for a newer CUDA")
    if version is None:
        return bad(
            "fp8",
            "TransformerEngine is not installed",
            "pip install --no-build-isolation '.[te]' (it compiles; see Dockerfile)",
        )
    if error:
        fix = (
            f"build transformer_engine_torch {version} again, against the installed torch: pip install"
            " --no-build-isolation --no-cache-dir"
        )
        return bad("fp8", f"TransformerEngine {version} does not import: {error}", fix)
    return ok(
        "fp8",
        f"TransformerEngine {version}, compute capability {'.'.join(map(str, gpus[0].capability or ()))}",
    )


def _has_fp8(gpus: tuple[InstalledGpu, ...]) -> bool:
    return all(gpu.capability is not None and gpu.capability >= (8, 9) for gpu in gpus)


def check_nccl(machine: Machine) -> CheckResult:
    """Check NCCL's version and the variables that steer it."""
    gpus, _ = smi_says()
    return judge_nccl(torch_says().get("nccl") if gpus else None, len(gpus), dict(machine.environment))


def judge_nccl(version: list[int] | None, gpus: int, environment: dict[str, str]) -> CheckResult:
    """Judge torch's NCCL version and the variables, for a machine of `gpus` GPUs."""
    names = sorted(name for name in environment if name.startswith(("NCCL_", "TORCH_NCCL_")))
    # Names alone: a value may be secret.
    said = f"; set: {', '.join(names)}" if names else ""
    off = [name for name in SLOW if environment.get(name, "0") not in ("", "0")]
    if not gpus:
        return ok("nccl", f"no GPU: ranks talk through gloo{said}")
    if version is None:
        return fail("nccl", f"torch has no NCCL{said}", "install the CUDA build of torch from PyPI")
    detail = f"{'.'.join(map(str, version))}{said}"
    if off and gpus > 1:
        return warn(
            "nccl",
            f"{detail}; {', '.join(SLOW[name] for name in off)} switched off",
            f"unset {' '.join(off)}, unless it is meant",
        )
    return ok("nccl", detail)
