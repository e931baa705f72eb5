"""Attention over some keys, joined with attention over others, by their log-sum-exps; in place, in one pass on CUDA."""

from __future__ import annotations

import torch

try:
    from mm_kernels.span_attention import merge_fused
except ImportError:  # torch's builds for CPUs come without Triton
    merge_fused = None


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Makes (out, lse) those of both sets of keys.

    Args:
        out: [B, S, H, D] and lse [B, H, S], in fp32 or fp64; any strides.
        new_out: [B, S, H, D] in any float dtype; new_lse [B, H, S]. A query without a key has 0 and -inf.
    """
    if out.device.type != "cpu" and merge_fused is not None:
        merge_fused.merge_(out, lse, new_out, new_lse)
    else:
        merge_reference_(out, lse, new_out, new_lse)


def merge_reference_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """`merge_` in plain torch."""
    total = torch.logaddexp(lse, new_lse)
    finite = total.masked_fill(total == float("-inf"), 0.0)
    weight, new_weight = ((side - finite).exp_().transpose(1, 2)[..., None] for side in (lse, new_lse))
    out.mul_(weight).add_(new_out.to(out.dtype) * new_weight)
    lse.copy_(total)
