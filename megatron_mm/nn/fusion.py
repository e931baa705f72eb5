"""A layer's elementwise chains as functions, which torch.compile makes one kernel each, and who fuses what.

Eager torch starts a kernel for every operation and keeps what lies between them. A compiled chain reads its inputs
once, and its backward pass recomputes what is cheap: dropout keeps no mask. The price is some seconds of compilation in
the first step, for each shape. SwiGLU and GELU behind a bias are megatron-core's own pairs of compiled functions. GELU
alone and norms over the hidden size need no compiler, since torch has kernels for them on CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import FusionConfig
from megatron_mm.nn.dropout import hashed_dropout


def select(config: FusionConfig, device: torch.device) -> tuple[FusionConfig, str]:
    """`config` without `auto`, and what that means, as a line for the log.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    obstacle = _no_compiler(device)
    if config.elementwise == "compile" and obstacle:
        raise ValueError(f"fusion.elementwise=compile cannot run: {obstacle}. Use fusion.elementwise=auto.")
    compiled = config.elementwise == "compile" or (config.elementwise == "auto" and not obstacle)
    if config.rms_norm == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            raise ValueError(
                "fusion.rms_norm=liger needs the liger-kernel package: pip install megatron_mm[liger], or use torch."
            )
        if device.type == "cpu":
            raise ValueError("fusion.rms_norm=liger cannot run: it needs CUDA. Use fusion.rms_norm=torch.")
    chains = "compiled" if compiled else f"eager ({obstacle or 'asked for'})"
    line = f"RoPE, activations, head norms and dropout {chains}; norms by {config.rms_norm}"
    return FusionConfig("compile" if compiled else "eager", config.rms_norm), line


def _no_compiler(device: torch.device) -> str | None:
    """Why torch.compile is of no use here, if it is not."""
    if device.type == "cpu":
        return "torch.compile gains nothing on a CPU"
    return "TORCHDYNAMO_DISABLE=1 is set" if os.environ.get("TORCHDYNAMO_DISABLE") == "1" else None


@functools.cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` as one kernel for each shape that it meets; all layers share them."""
    return torch.compile(function, dynamic=False)


def feed_forward_activation(trunk: TrunkConfig, compiled: bool) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """megatron-core's `activation_func` and `bias_activation_fusion`: what follows the first matrix, and whether
    megatron-core's compiled functions compute it. They know GELU only with a bias, and under the name of the exact one,
    of which they compute the tanh approximation. Weighted by a router's share they know only SwiGLU without a bias."""
    experts = trunk.num_experts is not None
    if trunk.activation == "swiglu":
        return F.silu, compiled and not (experts and trunk.add_bias_linear)
    fused = compiled and trunk.add_bias_linear and not experts
    return (F.gelu if fused else gelu_tanh), fused


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by the tanh approximation (gelu_new, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def rotary_frequencies(width: int, base: float, device: torch.device) -> torch.Tensor:
    """RoPE's angle of one position, of each of width / 2 pairs of channels: float64 [width / 2]."""
    return base ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)


def rotary_table(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `rotate` needs of positions int [...]: cosines, then sines, of their angles, [..., width] in `dtype`."""
    angles = positions[..., None].to(dtype) * frequencies.to(dtype)
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """RoPE, half-split: x [..., D], of which the first channels, as many as a `rotary_table` is wide, are turned by it.
    The table [..., W] broadcasts to them; computed in its dtype."""
    half = table.shape[-1] // 2
    cos, sin = table.split(half, -1)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)


def norm_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm of each head x [..., H, D] with its own weight and bias [H, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias


def add_dropped(residual: torch.Tensor, x: torch.Tensor, p: float, token_hash: torch.Tensor) -> torch.Tensor:
    """residual + dropout(x), both [..., D]; see `nn.dropout.hashed_dropout`."""
    return residual + hashed_dropout(x, p, token_hash)


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [..., D] by Liger's kernels, in fp32 as torch's own."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # an optional dependency

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
