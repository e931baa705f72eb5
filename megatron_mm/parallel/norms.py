"""Norms for megatron-core's layer specs, whose own torch wrapper refuses sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_mm.nn.fusion import compiled, liger_rms_norm, norm_heads
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the hidden size. Its weight is replicated over TP; under sequence parallelism each
    rank sees other tokens, and the `sequence_parallel` mark makes megatron-core sum the gradients."""

    def __init__(self, config: TrunkTransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel
        self.liger = config.liger_rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return liger_rms_norm(x, self.weight, self.eps) if self.liger else super().forward(x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the hidden size; its weight and bias are replicated and marked as `RMSNorm`'s weight is."""

    def __init__(self, config: TrunkTransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel


NORMS: dict[str, type[nn.Module]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""By the names of `model.trunk.normalization`."""


class HeadNorm(nn.Module):
    """LayerNorm over head_dim with a weight and bias for each head, sharded over TP with the heads (Chameleon).

    Official Chameleon shares them among the heads of one model-parallel rank, which ties the model to its layout; a row
    per head does not, and is what Hugging Face's weights hold. Input and output [S, B, heads / TP, head_dim].
    """

    def __init__(self, config: TrunkTransformerConfig, hidden_size: int, eps: float, heads: int):
        super().__init__()
        shape = (heads // config.tensor_model_parallel_size, hidden_size)
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.eps = eps
        self.norm_heads = compiled(norm_heads) if config.compiled_elementwise else norm_heads
        self.weight = nn.Parameter(torch.ones(shape, **options))
        self.bias = nn.Parameter(torch.zeros(shape, **options))
        for param in (self.weight, self.bias):
            param.init_std = None  # keep ones and zeros although 2-D
            param.tensor_model_parallel = True
            param.partition_dim, param.partition_stride = 0, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_heads(x, self.weight, self.bias, self.eps)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        )
