"""Heads for positions (DeepSpeed-Ulysses, arXiv 2309.14509): between two exchanges each rank of a small group has all
of the group's positions, and its share of the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_positions(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, B, H, D] of this rank's positions -> [U * n, B, H / U, D]: rank after rank, this rank's share of the heads.

    Where there are fewer heads than ranks, as many ranks as needed get the same head.
    """
    size, heads = group.size(), tensor.shape[2]
    if size == 1:
        return tensor
    if heads < size:
        tensor = tensor.repeat_interleave(size // heads, dim=2)
    shares = torch.stack(tensor.chunk(size, dim=2))  # [U, n, B, H / U, D]
    return _AllToAll.apply(shares, group).flatten(0, 1)


def gather_heads(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: [U * n, B, H / U, D] -> [n, B, H, D]."""
    size = group.size()
    if size == 1:
        return tensor
    shares = tensor.unflatten(0, (size, -1)).contiguous()
    return torch.cat(_AllToAll.apply(shares, group).unbind(0), dim=2)


class _AllToAll(torch.autograd.Function):
    """Block i of the first dimension goes to rank i."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient.contiguous(), ctx.group), None
