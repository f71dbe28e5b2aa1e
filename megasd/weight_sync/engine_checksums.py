"""How SGLang stores a model, and the checksums that it reports.

They prove, tensor by tensor, that an engine holds what was sent.

    expected = EngineWeights(hf_config, tp_size=2)
    for name, tensor in hf_tensors:     # fused and cut as SGLang does, hashed when complete
        expected.feed(name, tensor)
    expected.checksums                  # [{"model.layers.0.self_attn.qkv_proj.weight": "9f...", ...}, ...]

SGLang fuses q, k, v and gate, up, stacks experts, pads the vocabulary to 64 and cuts all of it over
its tensor-parallel ranks (srt/models/{qwen2,qwen3,qwen3_moe,llama,mistral,olmo2}.py,
srt/layers/vocab_parallel_embedding.py, 0.5.23). On a CPU it also pads the intermediate size to 32 a
rank (srt/configs/update_config.py). Its checksum (srt/managers/mm_utils.py tensor_hash) is the head
of a SHA-256 on a CPU, and on a GPU a sum of hashed words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasd.models.tp_layouts import Shape

# the vocabulary is padded to a multiple of it
VOCAB_PADDING = 64
# on a CPU, a rank's part of the intermediate size is padded to a multiple of it
CPU_PADDING = 32
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
} | {"up_proj": ("gate_up_proj", 1)}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# 32-bit words; words of a tile
_WORD, _TILE = 0xFFFFFFFF, 8192


@dataclass(frozen=True)
class EngineSlice:
    """Where one rank of an engine puts a Hugging Face tensor.

    `parameter[expert].narrow(dim, offset, length)` takes `tensor.narrow(dim, start, length)`.
    parameter: SGLang's name. shape: of the parameter on this rank. parts: how many Hugging Face
    tensors make it up. expert: index into a stacked parameter; None for a parameter without stack.
    """

    parameter: str
    shape: Shape
    parts: int
    expert: int | None
    offset: int
    dim: int
    start: int
    length: int


@dataclass
class _Filling:
    """A parameter that still lacks `missing` of its parts."""

    tensor: Tensor
    missing: int


class EngineWeights:
    """Expected checksums of every tensor-parallel rank of an engine.

    hf: config.json of the model. only: SGLang parameters to follow, None = all. on_cpu: the engine
    runs on a CPU, which pads and hashes in its own way.
    """

    def __init__(
        self, hf: Mapping[str, Any], tp_size: int, only: Collection[str] | None = None, *, on_cpu: bool = True
    ) -> None:
        self.tp_size, self.only, self.on_cpu = tp_size, only, on_cpu
        self.width_padding = CPU_PADDING if on_cpu else 1
        self.heads = hf["num_attention_heads"]
        self.groups = hf.get("num_key_value_heads") or self.heads
        self.num_experts = hf.get("num_experts") or hf.get("num_local_experts") or 0
        self.checksums: list[dict[str, str]] = [{} for _ in range(tp_size)]
        self._filling: dict[tuple[int, str], _Filling] = {}

    def parameter(self, name: str) -> str:
        """SGLang's name of the parameter that a Hugging Face tensor goes into."""
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            return f"{expert[1]}.{'w2' if expert[3] == 'down' else 'w13'}_weight"
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        return f"{parent}.{_FUSED[leaf][0]}.{kind}" if leaf in _FUSED else name

    def place(self, name: str, shape: Shape, rank: int) -> EngineSlice:
        """Where `rank` puts a tensor of this shape."""
        size, parameter, leaf = self.tp_size, self.parameter(name), name.split(".")[-2]
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            number, stack = int(expert[2]), self.num_experts
            if expert[3] == "down":
                columns, start, length = self._rank_part(shape[1], rank, self.width_padding)
                return EngineSlice(parameter, (stack, shape[0], columns), stack, number, 0, 1, start, length)
            rows, start, length = self._rank_part(shape[0], rank, self.width_padding)
            offset = rows if expert[3] == "up" else 0
            return EngineSlice(
                parameter, (stack, 2 * rows, *shape[1:]), 2 * stack, number, offset, 0, start, length
            )
        if leaf in ("q_proj", "k_proj", "v_proj"):
            head = shape[0] // (self.heads if leaf == "q_proj" else self.groups)
            # fewer key heads than ranks: several ranks hold the same one
            groups = max(1, self.groups // size)
            q, kv = self.heads // size * head, groups * head
            offset = {"q_proj": 0, "k_proj": q, "v_proj": q + kv}[leaf]
            start = rank * q if leaf == "q_proj" else rank * self.groups // size * head
            return EngineSlice(
                parameter, (q + 2 * kv, *shape[1:]), 3, None, offset, 0, start, q if leaf == "q_proj" else kv
            )
        if leaf in ("gate_proj", "up_proj"):
            rows, start, length = self._rank_part(shape[0], rank, self.width_padding)
            return EngineSlice(
                parameter, (2 * rows, *shape[1:]), 2, None, rows if leaf == "up_proj" else 0, 0, start, length
            )
        if leaf in ("o_proj", "down_proj"):
            columns, start, length = self._rank_part(
                shape[1], rank, self.width_padding if leaf == "down_proj" else 1
            )
            return EngineSlice(parameter, (shape[0], columns), 1, None, 0, 1, start, length)
        if leaf in ("embed_tokens", "lm_head"):
            rows, start, length = self._rank_part(shape[0], rank, VOCAB_PADDING / size)
            return EngineSlice(parameter, (rows, *shape[1:]), 1, None, 0, 0, start, length)
        return EngineSlice(parameter, tuple(shape), 1, None, 0, 0, 0, shape[0])

    def _rank_part(self, total: int, rank: int, padding: float) -> tuple[int, int, int]:
        """(size of a rank's part, where this rank's begins, how much of it is no padding).

        Every part is a multiple of `padding`.
        """
        unit = round(padding * self.tp_size)
        size = -(-total // unit) * unit // self.tp_size
        start = min(rank * size, total)
        return size, start, min(size, total - start)

    @torch.no_grad()
    def feed(self, name: str, tensor: Tensor) -> None:
        """Take in one whole Hugging Face tensor (any order), in the dtype that the engine holds."""
        if self.only is not None and self.parameter(name) not in self.only:
            return
        for rank in range(self.tp_size):
            place = self.place(name, tuple(tensor.shape), rank)
            key = rank, place.parameter
            if key not in self._filling:
                self._filling[key] = _Filling(
                    torch.zeros(place.shape, dtype=tensor.dtype, device=tensor.device), place.parts
                )
            filling = self._filling[key]
            target = filling.tensor if place.expert is None else filling.tensor[place.expert]
            target.narrow(place.dim, place.offset, place.length).copy_(
                tensor.narrow(place.dim, place.start, place.length)
            )
            filling.missing -= 1
            if not filling.missing:
                self.checksums[rank][place.parameter] = checksum(
                    self._filling.pop(key).tensor, on_cpu=self.on_cpu
                )


def checksum(tensor: Tensor, *, on_cpu: bool) -> str:
    """The checksum, 16 hex digits, that an engine on a CPU or on a GPU reports of these bytes.

    The tensor may lie on any device.
    """
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if on_cpu:
        return hashlib.sha256(data.cpu().numpy().data).digest()[:8].hex()
    return f"{words_hash(data):016x}"


def words_hash(data: Tensor) -> int:
    """SGLang's GPU checksum of bytes (uint8, any device), kernels/ops/memory/gpu_tensor_hash.py:
    two murmur3 finalisers over each 32-bit word and its position, summed over tiles of 8192 words,
    finalised, summed again modulo 2**64 and finalised by splitmix64.
    """
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    count, seed = words.numel(), 0x243F6A88
    if not count:
        return 0
    seeds, positions = (
        (seed, ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD),
        ((0x27D4EB2D, 15), (0x165667B1, 13)),
    )
    total = 0
    # 64 MB of int64 at a time
    for first in range(0, count, _TILE * 1024):
        v = words[first : first + _TILE * 1024].to(torch.int64) & _WORD
        index = torch.arange(first, first + v.numel(), device=v.device, dtype=torch.int64) & _WORD
        halves = []
        for s, (factor, turn) in zip(seeds, positions, strict=True):
            rotated = ((index << turn) | (index >> (32 - turn))) & _WORD
            hashed = _fmix32(v ^ ((_times(index, factor) + s) & _WORD) ^ rotated)
            tiles = torch.nn.functional.pad(hashed, (0, -v.numel() % _TILE)).view(-1, _TILE).sum(1) & _WORD
            halves.append(_fmix32(tiles ^ (count * 4 & _WORD)))
        high, low = (int(half.sum().item()) for half in halves)
        total += (high << 32) + low
    x = total & ((1 << 64) - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & ((1 << 64) - 1)
    return x ^ (x >> 31)


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2**32, for 32-bit values in int64.

    It multiplies by the halves of the factor, since the whole product does not fit into int64.
    """
    return ((x * (factor & 0xFFFF)) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _WORD


def _fmix32(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser of values in int64."""
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)
