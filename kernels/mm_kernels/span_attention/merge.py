"""Attention over some keys, joined with attention over others, by their log-sum-exps."""

from __future__ import annotations

import torch


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Makes (out, lse) those of both sets of keys, in place.

    Args:
        out: [B, S, H, D] and lse [B, H, S], in fp32 or fp64; any strides.
        new_out: [B, S, H, D] in any float dtype; new_lse [B, H, S]. A query without a key has 0 and -inf.
    """
    total = torch.logaddexp(lse, new_lse)
    finite = total.masked_fill(total == float("-inf"), 0.0)
    weight, new_weight = ((side - finite).exp_().transpose(1, 2)[..., None] for side in (lse, new_lse))
    out.mul_(weight).add_(new_out.to(out.dtype).mul_(new_weight))
    lse.copy_(total)
