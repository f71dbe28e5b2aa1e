"""A megatron-core GPTModel from a Hugging Face directory, with wrapper and optimizer.

megatron-core 0.16.1.

s sequence, b rows, h hidden, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megasd.actor.layer_spec import block_spec
from megasd.actor.layers import RotaryTables
from megasd.actor.parallel import Mesh
from megasd.config.schema import ActorConfig, OptimizerConfig
from megasd.models import registry, tp_layouts
from megasd.models.param_table import Family, global_params
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import load_hf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Backbone(GPTModel):
    """GPTModel whose last stage returns the final hidden states [s, b, h] instead of logits.

    The loss projects the rows that it needs. So prompt tokens are never projected on the
    vocabulary, and the teacher's hidden states can be kept, O(h) a token.
    """

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.post_process:
            # With overlap_param_gather a hook of the output layer's forward waits for its weight.
            # The loss reads the weight without that forward, so the hook is called here.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer)
        return hidden_states

    def output_weight(self) -> Tensor:
        """The vocabulary shard [V / TP, h] of the output layer, on the last stage.

        It has params_dtype under FP8 too: Megatron makes FP8 parameters only inside its
        TransformerBlock.
        """
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )


def transformer_config(family: Family, actor: ActorConfig, device: torch.device) -> TransformerConfig:
    """Megatron's TransformerConfig of a model family in this run's layout.

    Options that are off on the CPU need TransformerEngine, Apex or CUDA, or give wrong numbers on
    gloo without an error.
    """
    dtype, gpu = DTYPES[actor.dtype], device.type == "cuda"
    pipelined = actor.pipeline_model_parallel_size > 1
    # Apex's kernel writes weight gradients straight into their fp32 buffers. Megatron demands it
    # for its own output layer.
    fuses_gradients = gpu and find_spec("fused_weight_gradient_mlp_cuda") is not None
    return TransformerConfig(
        **family.transformer,
        tensor_model_parallel_size=actor.tensor_model_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_model_parallel_size,
        context_parallel_size=actor.context_parallel_size,
        expert_model_parallel_size=actor.expert_model_parallel_size,
        expert_tensor_parallel_size=1 if actor.expert_model_parallel_size > 1 else None,
        sequence_parallel=actor.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Microbatches differ in length, and stages send them to each other.
        variable_seq_lengths=pipelined,
        # variable_seq_lengths needs this one, also in dense models.
        moe_token_dispatcher_type="alltoall",
        # loss/normalise.py owns the normaliser: Megatron divides by nothing.
        calculate_per_token_loss=True,
        tp_comm_overlap=actor.tp_comm_overlap,
        attention_backend=AttnBackend[actor.attention_backend],
        use_cpu_initialization=not gpu,
        persist_layer_norm=gpu,
        gradient_accumulation_fusion=fuses_gradients,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=actor.apply_rope_fusion,
        # gloo gives wrong numbers with interleaved pipelines, and exit status 0.
        batch_p2p_comm=gpu,
        # On gloo the send buffer would be freed in flight.
        deallocate_pipeline_outputs=gpu,
        # TransformerEngine's ring of key-value blocks has no sliding window; "a2a" has one.
        cp_comm_type="a2a" if gpu and "window_size" in family.transformer else None,
        **_recompute(actor),
        **_fp8(actor),
        # An empty scope means whole layers.
        **({"cuda_graph_impl": "local", "cuda_graph_scope": []} if actor.cuda_graph else {}),
    )


def _recompute(actor: ActorConfig) -> dict[str, Any]:
    """TransformerConfig's arguments for actor.recompute_granularity.

    Arguments of the other granularity are left out, since it takes them only as None.
    """
    if actor.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": actor.recompute_method,
            "recompute_num_layers": actor.recompute_num_layers,
        }
    if actor.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(actor.recompute_modules)}
    return {}


def _fp8(actor: ActorConfig) -> dict[str, Any]:
    """TransformerConfig's arguments for actor.fp8.

    Delayed scaling goes by the largest value of 1,024 forwards, as TransformerEngine's default
    recipe does. Megatron's default is the largest value of the last forward.
    """
    if actor.fp8 is None:
        return {}
    return {
        "fp8": actor.fp8,
        "fp8_recipe": actor.fp8_recipe,
        "fp8_param": actor.fp8_param_gather,
        "fp8_margin": 0,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": actor.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": actor.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": actor.num_layers_at_end_in_bf16,
    }


def build_model(
    family: Family,
    config: TransformerConfig,
    actor: ActorConfig,
    mesh: Mesh,
    vp_stage: int | None = None,
    *,
    local_spec: bool = False,
) -> Backbone:
    """This rank's pipeline stage and tensor shard of the model, on its device.

    The weights are Megatron's random ones; `load_pretrained` fills them. vp_stage: which of
    config.virtual_pipeline_model_parallel_size parts of the stage, if it has several. local_spec:
    use the layers of the CPU on a GPU too (torch's attention, no FP8), for comparisons and
    benchmarks.
    """
    last = None if vp_stage is None else config.virtual_pipeline_model_parallel_size - 1
    model = Backbone(
        config,
        block_spec(family, config, mesh.device.type == "cuda" and not local_spec, vp_stage),
        vocab_size=tp_layouts.padded_vocab_size(
            family.vocab_size, actor.make_vocab_size_divisible_by, mesh.tp_size
        ),
        pre_process=mesh.is_first_stage and vp_stage in (None, 0),
        post_process=mesh.is_last_stage and vp_stage == last,
        parallel_output=True,
        vp_stage=vp_stage,
        **family.gpt,
    )
    model.rotary_pos_emb = RotaryTables(family.ropes, config)
    return model.to(mesh.device)


def named_params(
    model: Backbone, config: TransformerConfig, num_experts: int, mesh: Mesh
) -> dict[str, Tensor]:
    """This rank's live parameters under global names: layers and experts numbered over all ranks.

    num_experts: of the whole model, 0 for a dense one.
    """
    return global_params(
        dict(model.named_parameters()),
        layer_offset=layer_offset(config),
        expert_offset=num_experts // mesh.ep_size * mesh.ep_rank,
    )


def load_pretrained(model: Backbone, config: TransformerConfig, path: str, mesh: Mesh) -> None:
    """Fill this rank's parameters from the Hugging Face directory `path`. No collective.

    UserError for files that are broken or do not fit the model.
    """
    num_experts = registry.param_table(read_hf_config(path)).num_experts
    load_hf(
        named_params(model, config, num_experts, mesh),
        path,
        tp_rank=mesh.tp_rank,
        tp_size=mesh.tp_size,
        ep_rank=mesh.ep_rank,
        ep_size=mesh.ep_size,
    )


def wrap_data_parallel(
    model: Backbone, config: TransformerConfig, actor: ActorConfig
) -> DistributedDataParallel:
    """The model in Megatron's DDP, which sums gradients over DP x CP in fp32.

    A bf16 model gets Megatron's Float16Module in between.
    """
    module = Float16Module(config, model) if config.bf16 else model
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=actor.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=actor.overlap_grad_reduce,
        overlap_param_gather=actor.overlap_param_gather,
        fp8_param_gather=actor.fp8_param_gather,
        # The learner refuses a non-finite gradient norm itself.
        check_for_nan_in_grad=False,
    )
    wrapped = DistributedDataParallel(config, ddp, module)
    if actor.overlap_grad_reduce:
        # Only the last microbatch of a step starts the reduction.
        config.no_sync_func = wrapped.no_sync
    return wrapped


def whole_parameters(model: DistributedDataParallel) -> None:
    """Wait until every parameter is whole, which actor.overlap_param_gather puts off.

    A forward of the model waits by itself. All other readers need this call: the teacher's
    average, a push of weights, a checkpoint. Collectives: all-gathers over DP x CP of the
    parameters that were not yet gathered.
    """
    if not model.ddp_config.overlap_param_gather:
        return
    model.start_param_sync(force_sync=True)
    # Upstream leaves this out where the gather is forced.
    post_all_gather_processing([p for p in model.parameters() if is_float8tensor(p)])


def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, actor: ActorConfig, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's Adam and its learning-rate schedule over `num_steps`.

    A bf16 model gets fp32 main parameters.
    """
    dtype = DTYPES[actor.dtype]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=actor.use_distributed_optimizer,
            overlap_param_gather=actor.overlap_param_gather,
            # The recipe says how main parameters become FP8 ones.
            fp8_recipe=actor.fp8_recipe if actor.fp8 else None,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(num_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # After a resume the config holds: a raised run.steps or another rate must act.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def family_of(path: str) -> Family:
    """The model family of a Hugging Face directory.

    UserError names the entries of config.json that are not supported.
    """
    return registry.config_from_hf(read_hf_config(path))


def layer_offset(config: TransformerConfig, vp_stage: int | None = None) -> int:
    """Global index of the first layer of this pipeline stage, or of its virtual stage."""
    return get_transformer_layer_offset(config, vp_stage)
