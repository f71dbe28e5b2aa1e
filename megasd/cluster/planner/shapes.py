"""How many weights a rank holds, counted from the model's config.json.

The shapes come from the table of parameters (models/param_table.py), as those of Megatron's model
do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megasd.config.schema import ActorConfig
from megasd.models import registry, tp_layouts
from megasd.models.dense import head_dim
from megasd.models.param_table import ParamRule, ParamTable


@dataclass(frozen=True)
class Count:
    """A number of weights. dense: held by all data-parallel ranks. expert: held by fewer ranks."""

    dense: int
    expert: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert)

    def times(self, n: int) -> Count:
        """n times as many weights."""
        return Count(self.dense * n, self.expert * n)

    @property
    def total(self) -> int:
        """Dense and expert weights together."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Model:
    """The sizes of a model, read from its config.json `hf` and its table of parameters.

    Each property is one size that the planner's formulas name; that is why there are many.
    """

    hf: Mapping[str, Any]
    table: ParamTable = field(compare=False, repr=False)
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(hf: Mapping[str, Any]) -> Model:
        """The sizes of a config.json. UserError if megasd does not train such a model."""
        return Model(hf, registry.param_table(hf))

    @property
    def hidden(self) -> int:
        """Width h of the residual stream."""
        return int(self.hf["hidden_size"])

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return self.table.num_layers

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.hf["num_attention_heads"])

    @property
    def groups(self) -> int:
        """Number of key heads."""
        return int(self.hf.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Width d of a head."""
        return head_dim(self.hf)

    @property
    def experts(self) -> int:
        """Number of experts of a layer; 0 for a dense model."""
        return self.table.num_experts

    @property
    def width(self) -> int:
        """Width f of the MLP, or of one expert."""
        return int(self.hf["moe_intermediate_size"] if self.experts else self.hf["intermediate_size"])

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return any("q_layernorm" in name for name in self.table.layer)

    @property
    def weights(self) -> int:
        """Weights of the whole model as in its checkpoint: no padding, tied weights once."""
        if "weights" not in self._cache:
            layer = self._count(range(self.experts), 1, 1)
            ends = sum(
                self._size(self.table.rule(name), 1, None) for name in self._end_names(tied_twice=False)
            )
            self._cache["weights"] = layer.times(self.layers).total + ends
        return self._cache["weights"]

    @property
    def vocabulary_weights(self) -> int:
        """Weights of the embedding and the output layer, without padding; tied weights once."""
        return int(self.hf["vocab_size"]) * self.hidden * (1 if self.table.tied else 2)

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of all layers."""
        return self._count(range(self.experts), 1, 1).expert * self.layers

    def rank(self, actor: ActorConfig, stage: int) -> Count:
        """Weights of one rank of a pipeline stage; tensor-parallel ranks hold equally many."""
        pp = actor.pipeline_model_parallel_size
        first, last = stage == 0, stage == pp - 1
        key = ("rank", actor.tensor_model_parallel_size, actor.expert_model_parallel_size, pp, first, last)
        if key not in self._cache:
            embedding, norm, head = (
                self._size(self.table.rule(name), actor.tensor_model_parallel_size, actor)
                for name in self._end_names()
            )
            # A tied model's output layer is the embedding. A last stage that is not the first
            # holds a copy of it.
            ends = embedding * first + norm * last + head * (last and not (self.table.tied and first))
            self._cache[key] = self.layer(actor).times(self.layers // pp) + Count(ends)
        return self._cache[key]

    def layer(self, actor: ActorConfig) -> Count:
        """Weights of one layer on a rank."""
        tp, ep = actor.tensor_model_parallel_size, actor.expert_model_parallel_size
        if (tp, ep) not in self._cache:
            self._cache[(tp, ep)] = self._count(range(self.experts // ep), tp, ep)
        return self._cache[(tp, ep)]

    def vocabulary(self, actor: ActorConfig) -> int:
        """Rows of the embedding and of the output layer on a rank, padding included."""
        tp = actor.tensor_model_parallel_size
        return (
            tp_layouts.padded_vocab_size(int(self.hf["vocab_size"]), actor.make_vocab_size_divisible_by, tp)
            // tp
        )

    def buckets(self, limit: int, word: int, stages: int) -> list[list[int]]:
        """For each bucket of a weight push, its bytes by the pipeline stage that holds them.

        Parameters are grouped as in weights/gather_plan.py: a bucket has at most `limit` bytes,
        unless it is a single larger parameter. word: bytes of a number.
        """
        key = ("buckets", limit, word, stages)
        if key not in self._cache:
            found: list[list[int]] = [[0] * stages]
            for name in self._sent_names():
                size = word * sum(map(math.prod, self.table.rule(name).parts.values()))
                if sum(found[-1]) and sum(found[-1]) + size > limit:
                    found.append([0] * stages)
                found[-1][self._stage(name, stages)] += size
            self._cache[key] = found
        return self._cache[key]

    def _stage(self, name: str, stages: int) -> int:
        if name.startswith("decoder.layers."):
            return int(name.split(".")[2]) * stages // self.layers
        return 0 if name.startswith("embedding.") else stages - 1

    def _sent_names(self) -> list[str]:
        return [
            name for name in self.table.names() if not (self.table.tied and name == "output_layer.weight")
        ]

    def _end_names(self, *, tied_twice: bool = True) -> list[str]:
        names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
        return names if tied_twice or not self.table.tied else names[:-1]

    def _count(self, experts: Sequence[int], tp: int, ep: int) -> Count:
        dense = expert = 0
        for name in self.table.layer_names(0, experts):
            rule = self.table.rule(name)
            if rule.expert:
                expert += self._size(rule, 1 if ep > 1 else tp, None)
            else:
                dense += self._size(rule, tp, None)
        return Count(dense, expert)

    def _size(self, rule: ParamRule, tp: int, actor: ActorConfig | None) -> int:
        shapes = tuple(rule.parts.values())
        if rule.layout is tp_layouts.vocab:
            rows = shapes[0][0] if actor is None else self.vocabulary(actor)
            return rows * shapes[0][1]
        return math.prod(rule.layout(shapes, 0, tp).shape)
