"""The transformer layer as megatron-core specs: where our attention, RoPE, norms and dropout enter it."""

from __future__ import annotations

import functools

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from megatron_mm.nn.dropout import hash_tokens, salts
from megatron_mm.nn.fusion import add_dropped, compiled, rotate
from megatron_mm.parallel.attention import SpanAttention
from megatron_mm.parallel.context.runtime import SpreadAttention
from megatron_mm.parallel.feed_forward import BlockwiseMLP
from megatron_mm.parallel.lora import Adapted, LoraColumnParallelLinear, LoraLinear, LoraRowParallelLinear
from megatron_mm.parallel.moe import Experts, experts_spec, is_moe_layer
from megatron_mm.parallel.norms import NORMS, HeadNorm
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class ResidualAdd(nn.Module):
    """`residual + dropout(norm(x + bias))`, in megatron-core's bias-dropout-add slot; the norm is there only in `swin`
    placement, the bias only with `add_bias_linear`."""

    def __init__(self, config: TrunkTransformerConfig):
        super().__init__()
        norm = NORMS[config.normalization] if config.norm_placement == "swin" else IdentityOp
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.add_dropped = compiled(add_dropped) if config.compiled_elementwise else add_dropped
        self.token_hash: torch.Tensor | None = None

    def forward(self, training: bool, fused: bool):
        def add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, p: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            x = self.norm(x if bias is None else x + bias)
            if training and p > 0.0:
                return self.add_dropped(residual, x, p, self.token_hash)
            return residual + x

        return add


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with RoPE by `nn.fusion.rotate`: a function that can be compiled, and cosines and
    sines that all layers share. `rotary_pos_emb` is a `rotary_table` [S, B, 1, rotary_dim]."""

    def __init__(self, config: TrunkTransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.rotate = compiled(rotate) if config.compiled_elementwise else rotate
        self.table: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor, **kwargs
    ):
        self.table = rotary_pos_emb  # read below within this very call, so recompute and schedules need not know of it
        return super().forward(hidden_states, attention_mask, **kwargs)

    def get_query_key_value_tensors(self, *args, **kwargs):
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.rotate(query, self.table), self.rotate(key, self.table), value


class PackedTransformerLayer(TransformerLayer):
    """megatron-core's layer, which also tells its dropout which tokens it is looking at.

    `attention_mask` is the batch's `meta` int32 [B, 6, S] (see `types.PackedBatch`). It is a tensor argument, so it
    passes through full recompute and every pipeline schedule unchanged.
    """

    def __init__(self, config: TrunkTransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.hash_tokens = compiled(hash_tokens) if config.compiled_elementwise else hash_tokens
        first = config.dropout_seed * 2 * config.num_layers + 2 * self.layer_number
        # Of its two sites of dropout: a tensor, so that one compiled hash serves all layers.
        self.salts = salts(first, 2, torch.cuda.current_device())

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **kwargs):
        self._show_tokens(attention_mask)
        return super().forward(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)

    @functools.cached_property
    def _adapted(self) -> list[Adapted]:
        """The adapted layers that see the sequence in order: all but those of experts, and of conditions."""
        modules = [module for module in self.modules() if isinstance(module, Adapted)]
        return [m for m in modules if m.lora and not isinstance(m, LoraLinear) and not m.is_expert]

    def _show_tokens(self, attention_mask: torch.Tensor) -> None:
        if not self.training:
            return
        positions, keys = attention_mask[:, 3].t(), attention_mask[:, 4].t()  # [S, B]
        for linear in self._adapted:
            linear.show_tokens(keys, positions)
        kinds = attention_mask[:, 5].t()
        if self.config.sequence_parallel:
            rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
            positions, keys, kinds = (row.chunk(size)[rank] for row in (positions, keys, kinds))
        if isinstance(self.mlp, Experts):
            self.mlp.show_tokens(kinds)
        if self.hidden_dropout > 0.0:
            hashes = self.hash_tokens(keys, positions, self.salts)
            self.self_attn_bda.token_hash, self.mlp_bda.token_hash = hashes.unbind()


class ParallelBlockLayer(PackedTransformerLayer):
    """Attention and feed-forward side by side, behind one norm, each with its own dropout."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: SpreadAttention | None = None,
        **_unused,
    ) -> tuple[torch.Tensor, None]:
        self._show_tokens(attention_mask)
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(
            normed, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        fused = self.config.bias_dropout_fusion
        hidden_states = self.self_attn_bda(self.training, fused)(attended, hidden_states, self.hidden_dropout)
        return self.mlp_bda(self.training, fused)(self.mlp(normed), hidden_states, self.hidden_dropout), None


def block_spec(
    config: TrunkTransformerConfig, num_local_layers: int, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """Specs of this stage's layers and of the final norm."""
    first = get_transformer_layer_offset(config, virtual_stage)
    specs = [_layer_spec(config, is_moe_layer(config, first + number)) for number in range(num_local_layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=NORMS[config.normalization])


def attention_spec(q_norm: ModuleSpec | None, k_norm: ModuleSpec | None) -> ModuleSpec:
    """Self-attention, with norms of queries' and keys' heads."""
    return ModuleSpec(
        module=RotarySelfAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=LoraColumnParallelLinear,
            core_attention=SpanAttention,
            linear_proj=LoraRowParallelLinear,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def dense_spec(config: TrunkTransformerConfig) -> ModuleSpec:
    """A feed-forward without experts."""
    return ModuleSpec(
        module=BlockwiseMLP if config.feed_forward_block else MLP,
        submodules=MLPSubmodules(linear_fc1=LoraColumnParallelLinear, linear_fc2=LoraRowParallelLinear),
    )


def _layer_spec(config: TrunkTransformerConfig, experts: bool) -> ModuleSpec:
    head_norm = lambda heads: ModuleSpec(module=HeadNorm, params={"heads": heads}) if config.head_norm else None  # noqa: E731
    pre_norm = NORMS[config.normalization] if config.norm_placement == "pre" else IdentityOp
    residual = ModuleSpec(module=ResidualAdd, params={"config": config})
    return ModuleSpec(
        module=ParallelBlockLayer if config.parallel_block else PackedTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=pre_norm,
            self_attention=attention_spec(head_norm(config.num_attention_heads), head_norm(config.num_query_groups)),
            self_attn_bda=residual,
            pre_mlp_layernorm=IdentityOp if config.parallel_block else pre_norm,
            mlp=experts_spec(config) if experts else dense_spec(config),
            mlp_bda=residual,
        ),
    )
