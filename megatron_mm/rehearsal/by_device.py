"""Functions of torch that choose their kernels by device: what they run, and keep, on CUDA and on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mm.rehearsal.costs import Cost, nbytes
from megatron_mm.rehearsal.recorder import Recorder


def cpu_functions() -> dict[Callable, Callable]:
    """Function of torch -> what stands in for it where its first argument is on the device, as on a CPU."""
    return {F.scaled_dot_product_attention: cpu_attention}


def cuda_functions(recorder: Recorder) -> dict[Callable, Callable]:
    """The same as on CUDA."""

    class FusedRMSNorm(torch.autograd.Function):
        """One kernel forward; backward one for the input's gradient and two for the weight's."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            with recorder.quiet():
                out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(x, weight, scale)
            moved = sum(map(nbytes, (x, weight, out, scale)))
            recorder.launch(Cost("rms_norm", "norm", 0, moved), (out, scale))
            return out

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight, scale = ctx.saved_tensors
            with recorder.quiet():
                dx, dweight = torch.empty_like(x), torch.empty_like(weight)
            moved = 2 * (nbytes(x) + nbytes(grad)) + nbytes(scale) + nbytes(weight) + nbytes(dx) + nbytes(dweight)
            recorder.launch(Cost("rms_norm backward", "norm", 0, moved, launches=3), (dx, dweight))
            return dx, dweight

    def rms_norm(x, normalized_shape, weight=None, eps=None) -> torch.Tensor:
        return FusedRMSNorm.apply(x, weight)

    return {F.rms_norm: rms_norm, F.scaled_dot_product_attention: cuda_attention}


def cpu_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """torch's attention on a CPU, which takes fewer key heads as they are."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def cuda_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """torch's attention in half precision: FlashAttention without a mask, the memory-efficient kernel with one."""
    if enable_gqa:
        k, v = (side.repeat_interleave(q.shape[-3] // side.shape[-3], -3) for side in (k, v))
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    differentiated = any(side.requires_grad for side in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, differentiated, dropout_p, is_causal, scale=scale
    )[0]
