"""Layers of a family's own behind the trunk, on its last stage: they attend as the trunk's do, under every layout, and
conditions modulate them (adaLN, DiT, arXiv 2212.09748)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_mm.config.model import TrunkConfig
from megatron_mm.nn.fusion import feed_forward_activation, rotary_table
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import Conditions, Frequencies
from megatron_mm.parallel.context.runtime import SpreadAttention
from megatron_mm.parallel.layer import PackedTransformerLayer, attention_spec, dense_spec
from megatron_mm.parallel.norms import RMSNorm
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig

HEAD_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Attended:
    """meta int32 [B, 6, n] of a part; attention over the positions of all parts, None where it is the only one."""

    meta: torch.Tensor
    attention: SpreadAttention | None = None


class SharedHeadNorm(nn.Module):
    """RMSNorm over head_dim with one weight for all heads. A tensor-parallel rank sees the gradient of its own heads;
    the sum over ranks is the weight's. Input and output [S, B, heads / TP, head_dim]."""

    def __init__(self, config: TrunkTransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.ones(hidden_size, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return F.rms_norm(x, weight.shape, weight, HEAD_NORM_EPSILON)


class ModulatedLayer(PackedTransformerLayer):
    """megatron-core's layer: h + gate * f(norm(h) * (1 + scale) + shift), for attention and feed-forward."""

    def __init__(self, config: TrunkTransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.modulate = linear(config.hidden_size, 6 * config.hidden_size, std=0.0)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, conditions: Conditions, attended: Attended
    ) -> torch.Tensor:
        """[n, B, D] -> [n, B, D]."""
        self._show_tokens(attended.meta)
        number, present = conditions.number.t(), conditions.present[:, None]
        tables = self.modulate(F.silu(conditions.vectors)).chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            F.embedding(number, torch.where(present, table, unmoved))
            for table, unmoved in zip(tables, (0.0, 0.0, 1.0, 0.0, 0.0, 1.0), strict=True)
        )
        seen, _ = self.self_attention(
            modulated(self.input_layernorm(x), shift, scale),
            attended.meta,
            rotary_pos_emb=rotary,
            packed_seq_params=attended.attention,
        )
        x = x + gate * seen
        forwarded, _ = self.mlp(modulated(self.pre_mlp_layernorm(x), mlp_shift, mlp_scale))
        return x + mlp_gate * forwarded


class ModulatedLayers(nn.Module):
    """See `nn.ops.ModulatedLayers`. `config` is the trunk's, whose layers these are numbered behind."""

    def __init__(self, config: TrunkTransformerConfig, layers: TrunkConfig, frequencies: Frequencies):
        super().__init__()
        own = _config(config, layers)
        self.layers = nn.ModuleList(
            build_module(_spec(own), config=own, layer_number=config.num_layers + number)
            for number in range(1, layers.num_layers + 1)
        )
        self.frequencies = frequencies
        self.recomputes = config.recompute_granularity == "full"

    def forward(self, x: torch.Tensor, conditions: Conditions, attended: Attended) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        rotary = rotary_table(attended.meta[:, 3].t(), self.frequencies(x.device), precise).unsqueeze(2)
        x = x.transpose(0, 1).contiguous()
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                again = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(layer, x, rotary, conditions, attended, **again)
            else:
                x = layer(x, rotary, conditions, attended)
        return x.transpose(0, 1)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (1 + scale) + shift, in fp32 or wider."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return (x.to(precise) * (1 + scale.to(precise)) + shift.to(precise)).to(x.dtype)


def _config(config: TrunkTransformerConfig, layers: TrunkConfig) -> TrunkTransformerConfig:
    """The trunk's, for other layers on one pipeline stage."""
    own = copy.copy(config)
    own.num_layers, own.hidden_size, own.ffn_hidden_size = layers.num_layers, layers.hidden_size, layers.ffn_size
    own.num_attention_heads, own.num_query_groups = layers.num_attention_heads, layers.kv_heads
    own.kv_channels, own.layernorm_epsilon = layers.head_dim, layers.layernorm_epsilon
    own.gated_linear_unit = True
    own.activation_func, own.bias_activation_fusion = feed_forward_activation(layers, config.compiled_elementwise)
    own.add_bias_linear = own.add_qkv_bias = own.parallel_block = own.head_norm = False
    own.normalization, own.norm_placement, own.hidden_dropout = "RMSNorm", "pre", 0.0
    own.pipeline_model_parallel_size, own.virtual_pipeline_model_parallel_size = 1, None
    own.num_moe_experts = None
    return own


def _spec(config: TrunkTransformerConfig) -> ModuleSpec:
    head_norm = ModuleSpec(module=SharedHeadNorm)
    return ModuleSpec(
        module=ModulatedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention_spec(head_norm, head_norm),
            pre_mlp_layernorm=RMSNorm,
            mlp=dense_spec(config),
        ),
    )
