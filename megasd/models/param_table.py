"""The parameter table of a model: which Hugging Face tensors make up each Megatron parameter.

Loading and exporting read the same table.

    table = registry.param_table(hf_config)
    params = global_params(dict(model.named_parameters()), layer_offset=8, expert_offset=0)
    # gate_proj and up_proj of layer 9, layout `gated`
    rule = table.rule("decoder.layers.9.mlp.linear_fc1.weight")

Names are those of megatron-core's GPTModel with the local layer spec and SequentialMLP experts,
made global: layers and experts are numbered over the whole model, not over a pipeline stage, a
virtual stage or an expert-parallel rank. TransformerEngine's names (a norm fused into the linear
layer that follows it, grouped experts) are renamed first. A family is one list of rules: qwen3.py is
an example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from megasd.models import tp_layouts
from megasd.models.tp_layouts import Layout, Shape
from megasd.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

# TransformerEngine fuses the norm into the linear layer that follows it
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# the names of TransformerEngine's TEGroupedMLP
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class Rope:
    """A rotary table.

    Position p turns pair i of a head by the angle p * inverse_frequencies[i]. attention_factor
    multiplies cosines and sines.
    """

    # [head_dim / 2], float32 values
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Family:
    """Megatron's arguments for one config.json, and what Megatron has no argument for.

    The arguments: TransformerConfig(**transformer, <parallelism, dtype>) and GPTModel(config, spec,
    padded vocab, **gpt). Without an argument: the rotary tables, and `post_norm`, which means norms
    after attention and MLP, with q/k norms over all heads.
    """

    transformer: dict[str, Any]
    gpt: dict[str, Any]
    # tokens, without padding
    vocab_size: int
    ropes: tuple[Rope, ...]
    # index into `ropes` for each layer; None: all layers use ropes[0]
    layer_ropes: tuple[int, ...] | None = None
    post_norm: bool = False


@dataclass(frozen=True)
class ParamRule:
    """One parameter and the Hugging Face tensors that it is made of.

    ParamRule("self_attention.linear_proj.weight",
              {"self_attn.o_proj.weight": (hidden, heads * head_dim)}, tp_layouts.row)
    """

    # Megatron's name, without the layer's prefix
    local: str
    # Hugging Face name -> whole shape, in the order that the layout expects
    parts: Mapping[str, Shape]
    # (shapes, rank, size) -> Layout; tp_layouts.vocab also takes rows
    layout: Callable[..., Layout]
    # True: the parameter belongs to one expert, and expert-parallel ranks divide the experts
    expert: bool = False

    def is_cut(self, shape: Shape, ep_size: int) -> bool:
        """Whether tensor-parallel ranks hold parts of this parameter, given the local shape.

        Experts are whole if expert_tensor_parallel_size is 1.
        """
        if not self.expert:
            return self.layout is not tp_layouts.replicated
        return ep_size == 1 and tuple(self.layout(tuple(self.parts.values()), 0, 1).shape) != tuple(shape)

    def shard(self, shape: Shape, rank: int, size: int) -> Layout:
        """The layout of one tensor-parallel rank's part.

        UserError: the local parameter has another shape, or `size` does not divide the parameter.
        """
        function = partial(self.layout, rows=shape[0]) if self.layout is tp_layouts.vocab else self.layout
        try:
            layout = function(tuple(self.parts.values()), rank, size)
        except ValueError as error:
            raise UserError(
                f"{self.local}: {error}; choose another actor.tensor_model_parallel_size"
            ) from error
        if tuple(shape) != tuple(layout.shape):
            raise UserError(
                f"{self.local} has local shape {tuple(shape)}; {', '.join(self.parts)} make"
                f" {tuple(layout.shape)} on {size} ranks"
            )
        return layout


def key(hf: Mapping[str, Any], *names: str) -> Any:
    """The first of these keys that config.json has; UserError when it has none."""
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise UserError(f"config.json has no {names[0]}: take the config.json of the checkpoint's own repository")


def refuse(hf: Mapping[str, Any], name: str, why: str) -> NoReturn:
    """Raise the UserError of a key of config.json that is not supported."""
    raise UserError(f"config.json: {name}={hf.get(name)!r} is not supported: {why}")


def global_name(name: str, *, layer_offset: int = 0, expert_offset: int = 0) -> str:
    """The table's name of a local parameter.

    Spelled as in the local layer spec, with layers and experts numbered over the whole model.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    index, suffix = int(match[1]) + layer_offset, _TE_NAMES.get(match[2], match[2])
    grouped = _GROUPED_EXPERT.fullmatch(suffix)
    if grouped is not None:
        suffix = f"mlp.experts.local_experts.{grouped[2]}.{grouped[1]}.weight"
    expert = _EXPERT.fullmatch(suffix)
    if expert is not None:
        suffix = f"mlp.experts.local_experts.{int(expert[1]) + expert_offset}.{expert[2]}"
    return f"decoder.layers.{index}.{suffix}"


def global_params(
    params: Mapping[str, Tensor], *, layer_offset: int = 0, expert_offset: int = 0
) -> dict[str, Tensor]:
    """The parameters of one model chunk, `dict(model.named_parameters())`, under the table's names.

    `layer_offset`: global number of the first layer of the chunk. `expert_offset`: global number of
    the first expert of the rank. With a virtual pipeline, call this once a chunk and merge the dicts.
    """
    return {
        global_name(n, layer_offset=layer_offset, expert_offset=expert_offset): p for n, p in params.items()
    }


class ParamTable:
    """All rules of one model."""

    def __init__(
        self,
        hf: Mapping[str, Any],
        ends: Sequence[ParamRule],
        layer: Sequence[ParamRule],
        num_experts: int = 0,
    ) -> None:
        """Take the rules of `ends` (embedding, final norm, output layer) and of one `layer`.

        The Hugging Face names of `layer` lack the prefix `model.layers.<i>.`. In the names of
        experts, `{}` stands for the global number of the expert.
        """
        self.num_layers, self.num_experts = int(key(hf, "num_hidden_layers")), num_experts
        self.tied = bool(hf.get("tie_word_embeddings", False))
        self.ends = {rule.local: rule for rule in ends}
        self.layer = {rule.local: rule for rule in layer}

    def rule(self, name: str) -> ParamRule:
        """The rule of a global name, with full Hugging Face names. UserError if there is none."""
        if name in self.ends:
            return self.ends[name]
        if (match := _LAYER.fullmatch(name)) and int(match[1]) < self.num_layers:
            suffix, number = match[2], None
            if expert := _EXPERT.fullmatch(suffix):
                suffix, number = f"mlp.experts.local_experts.{{}}.{expert[2]}", int(expert[1])
            rule = self.layer.get(suffix)
            if rule is not None and (number is None or number < self.num_experts):
                prefix = f"model.layers.{match[1]}."
                parts = {prefix + part.format(number): shape for part, shape in rule.parts.items()}
                return ParamRule(name, parts, rule.layout, rule.expert)
        raise UserError(
            f"Megatron parameter {name} has no Hugging Face counterpart: "
            f"config.json has {self.num_layers} layers and {self.num_experts} experts"
        )

    def names(self) -> Iterator[str]:
        """Every global name, in the order of the model; with the output layer of a tied model."""
        embedding, norm, head = self.ends
        yield embedding
        for index in range(self.num_layers):
            yield from self.layer_names(index, range(self.num_experts))
        yield from (norm, head)

    def layer_names(self, index: int, experts: Sequence[int]) -> Iterator[str]:
        """The global names of one layer with these experts, expert by expert."""
        for rule in self.layer.values():
            if not rule.expert:
                yield f"decoder.layers.{index}.{rule.local}"
        for expert in experts:
            for rule in self.layer.values():
                if rule.expert:
                    yield f"decoder.layers.{index}.{rule.local.format(expert)}"

    def expected_tensors(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of a Hugging Face checkpoint, in the order of the model."""
        return {part: shape for name in self.names() for part, shape in self.rule(name).parts.items()}


# ---- rules that several families share ----


def ends_rules(hf: Mapping[str, Any]) -> list[ParamRule]:
    """The rules of embedding, final norm and output layer.

    The layout `vocab` also takes `rows`, the local number of vocabulary rows.
    """
    table, hidden = (key(hf, "vocab_size"), key(hf, "hidden_size")), key(hf, "hidden_size")
    # A tied model's last pipeline stage holds a copy of the embedding as its output layer: loaded,
    # never exported.
    head = "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"
    return [
        ParamRule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": table}, tp_layouts.vocab),
        ParamRule("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}, tp_layouts.replicated),
        ParamRule("output_layer.weight", {head: table}, tp_layouts.vocab),
    ]


def mlp_rules(local: str, prefix: str, hidden: int, width: int, expert: bool = False) -> list[ParamRule]:
    """The rules of a gated MLP; `local` and `prefix` are Megatron's and Hugging Face's prefixes."""
    gate_up: dict[str, Shape] = {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
    }
    return [
        ParamRule(f"{local}linear_fc1.weight", gate_up, tp_layouts.gated, expert),
        ParamRule(
            f"{local}linear_fc2.weight",
            {f"{prefix}down_proj.weight": (hidden, width)},
            tp_layouts.row,
            expert,
        ),
    ]
