"""Proof that engines hold what the actor holds.

Names and shapes are compared before a push, checksums and log-probs after it.

SGLang answers 200 to a name that it does not know, and dies of a wrong shape. So names and shapes
are checked before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megasd.engine.errors import EngineError
from megasd.models.tp_layouts import Shape
from megasd.weight_sync.engine_checksums import EngineWeights
from megasd.weights.block_fp8 import SCALE
from megasd.weights.gather_plan import GatherPlan


class VerifyError(EngineError):
    """An engine does not hold, or cannot take, the actor's weights. The message names the tensor."""


def check_shapes(plan: GatherPlan, stored: Mapping[str, Shape], *, tied: bool) -> None:
    """VerifyError unless the plan's names and shapes are `stored`.

    stored: those of the checkpoint that the engine was started from. tied: it may leave out
    lm_head.weight.
    """
    planned = plan.tensors()
    for name, shape in stored.items():
        if name not in planned and not (name == "lm_head.weight" and tied):
            raise VerifyError(
                f"the actor has no {name}, which the engine was started with; is model.path its model?"
            )
        if name in planned and planned[name].shape != tuple(shape):
            raise VerifyError(
                f"the actor holds {name} as {planned[name].shape}; the engine was started with {tuple(shape)}"
            )
    for name in planned:
        if name not in stored:
            raise VerifyError(
                f"the actor has {name}, which the engine was not started with; it would ignore it"
            )


def check_engine_names(
    plan: GatherPlan, reported: Mapping[str, Sequence[Mapping[str, str]]], place: EngineWeights
) -> None:
    """VerifyError when an engine has no parameter for a tensor of the plan.

    reported: the engines' checksums by URL and rank. place: how SGLang names parameters. The scales
    of fp8 weights have no parameter of their own.
    """
    for url, ranks in reported.items():
        for name in plan.tensors():
            if place.parameter(name) not in ranks[0] and not name.endswith(SCALE):
                raise VerifyError(
                    f"{url} has no parameter {place.parameter(name)} to take {name}; does it serve"
                    " model.path?"
                )


def compare_checksums(
    plan: GatherPlan,
    expected: Mapping[int, EngineWeights],
    reported: Mapping[str, Sequence[Mapping[str, str]]],
    skipped: Sequence[str],
) -> None:
    """VerifyError naming the first parameter whose checksum differs.

    expected: by tensor-parallel size. reported: by URL and rank. skipped: the engine left out every
    name that contains one of these.
    """
    for url, ranks in reported.items():
        for rank, found in enumerate(ranks):
            for name, checksum in expected[len(ranks)].checksums[rank].items():
                if found.get(name) == checksum or (
                    name not in found and any(part in name for part in skipped)
                ):
                    continue
                parts = [part for part in plan.tensors() if expected[len(ranks)].parameter(part) == name]
                raise VerifyError(
                    f"{url}: {name} (tensor-parallel rank {rank}; made of {', '.join(parts[:3])}) has"
                    f" checksum {found.get(name)}, the actor's {checksum}: the engine does not hold what was"
                    " sent"
                )


def max_difference(actor_logps: Sequence[Sequence[float]], engine_logps: Sequence[Sequence[float]]) -> float:
    """Largest absolute difference (nats) over all tokens of all probes.

    NaN, which no tolerance admits, if a log-prob is NaN or the lengths differ.
    """
    ours, theirs = (
        torch.tensor([x for logps in side for x in logps], dtype=torch.float64)
        for side in (actor_logps, engine_logps)
    )
    if ours.shape != theirs.shape or not ours.numel():
        return float("nan")
    return (ours - theirs).abs().max().item()
