"""Our trunk and parallel groups translated to megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import FusionConfig, LoraConfig, ParallelConfig, TrainConfig
from megatron_mm.nn.fusion import feed_forward_activation

EAGER = FusionConfig("eager", "torch")
NO_LORA = LoraConfig()


@dataclass
class TrunkTransformerConfig(TransformerConfig):
    """megatron-core's config plus what our layers need. Not frozen, since megatron-core writes to it."""

    norm_placement: str = "pre"
    parallel_block: bool = False
    head_norm: bool = False
    """Per-head QK LayerNorm. Not megatron-core's `qk_layernorm`, which would sum its gradients over TP ranks."""
    dropout_seed: int = 0
    attention_backend_name: str = "reference"
    hides_keys: bool = True
    compiled_elementwise: bool = False
    liger_rms_norm: bool = False
    feed_forward_block: int | None = None
    lora: LoraConfig = LoraConfig()
    grouped_experts: bool = False
    """Not megatron-core's `moe_grouped_gemm`, which needs Transformer Engine or a library of its own."""
    router_balance_scale: float = 0.0
    """Weight of a row's balancing loss in one layer with experts."""


def transformer_config(
    trunk: TrunkConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    attention_backend: str,
    hides_keys: bool = True,
    fusion: FusionConfig = EAGER,
    lora: LoraConfig = NO_LORA,
) -> TrunkTransformerConfig:
    """The one place where our configuration becomes megatron-core's. `fusion` is one that `nn.fusion.select` chose, and
    `parallel` one that `overlap.select` did, or nothing in it overlaps."""
    full = parallel.recompute_granularity == "full"
    compiled = fusion.elementwise == "compile"
    activation, fused = feed_forward_activation(trunk, compiled)
    return TrunkTransformerConfig(
        num_layers=trunk.num_layers,
        hidden_size=trunk.hidden_size,
        num_attention_heads=trunk.num_attention_heads,
        num_query_groups=trunk.kv_heads,
        kv_channels=trunk.head_dim,
        ffn_hidden_size=trunk.ffn_size,
        gated_linear_unit=trunk.activation == "swiglu",
        activation_func=activation,
        bias_activation_fusion=fused,
        add_bias_linear=trunk.add_bias_linear,
        add_qkv_bias=trunk.add_qkv_bias,
        normalization=trunk.normalization,
        layernorm_epsilon=trunk.layernorm_epsilon,
        hidden_dropout=trunk.hidden_dropout,
        attention_dropout=0.0,
        norm_placement=trunk.norm_placement,
        parallel_block=trunk.parallel_block,
        head_norm=trunk.qk_layernorm,
        dropout_seed=train.seed,
        attention_backend_name=attention_backend,
        hides_keys=hides_keys,
        compiled_elementwise=compiled,
        liger_rms_norm=fusion.rms_norm == "liger",
        feed_forward_block=parallel.feed_forward_block,
        lora=lora,
        # parallel/init.py draws the weights; megatron-core marks sharded parameters only where it "initialises" them.
        init_method=_leave_as_built,
        output_layer_init_method=_leave_as_built,
        embedding_init_method=_leave_as_built,
        init_method_std=trunk.init_method_std,
        params_dtype=train.dtype,
        pipeline_dtype=train.dtype,
        bf16=train.dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        num_moe_experts=trunk.num_experts,
        moe_ffn_hidden_size=trunk.ffn_size if trunk.num_experts else None,
        moe_layer_freq=trunk.moe_layer_freq,
        moe_router_topk=trunk.moe_router_topk,
        moe_token_dispatcher_type=trunk.moe_token_dispatcher_type,
        moe_router_load_balancing_type="none",
        grouped_experts=trunk.moe_grouped_gemm,
        router_balance_scale=trunk.moe_aux_loss_coeff / (train.global_batch_size * max(trunk.moe_layers, 1)),
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        recompute_modules=["core_attn"],
        # Each loss term is normalised by its own global count before backward, so nothing may be averaged after it.
        calculate_per_token_loss=True,
        # Batched P2P is silently wrong for interleaved schedules at PP=2 (megatron-core 0.16).
        batch_p2p_comm=False,
        overlap_p2p_comm=bool(parallel.overlap_p2p_comm),
        # Overlapped, it would free an output while that is still being sent (mended in megatron-core after 0.16).
        deallocate_pipeline_outputs=not parallel.overlap_p2p_comm,
        variable_seq_lengths=False,
        gradient_accumulation_fusion=bool(parallel.gradient_accumulation_fusion),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _leave_as_built(weight: torch.Tensor) -> torch.Tensor:
    return weight
