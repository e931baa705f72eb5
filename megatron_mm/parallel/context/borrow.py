"""Hidden states of borrowed positions, from the ranks that own them, and their gradients back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.parallel.context.messages import post
from megatron_mm.parallel.context.shard import Widening


def widen(hidden: torch.Tensor, widening: Widening, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, n, D] of this rank's positions -> [B, w, D] with those that it borrows; zeros that only fill a row up."""
    return _Widen.apply(hidden, widening, group)


def narrow(widened: torch.Tensor, widening: Widening) -> torch.Tensor:
    """[B, w, D] -> this rank's own positions [B, n, D]."""
    return widened.flatten(0, 1)[widening.own].view(len(widened), -1, widened.shape[-1])


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, widening: Widening, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.widening, ctx.group, ctx.shape = widening, group, hidden.shape
        batch, _, width = hidden.shape
        own = hidden.flatten(0, 1)
        sends = {peer: own[index] for peer, index in widening.sends.items()}
        arrived = post(sends, {peer: len(index) for peer, index in widening.receives.items()}, own, group).wait()
        widened = hidden.new_zeros(batch * widening.width, width)
        widened[widening.own] = own
        widened[torch.cat(list(widening.receives.values()))] = arrived
        return widened.view(batch, widening.width, width)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        widening, flat = ctx.widening, gradient.flatten(0, 1)
        sends = {peer: flat[index] for peer, index in widening.receives.items()}
        arrived = post(sends, {peer: len(index) for peer, index in widening.sends.items()}, flat, ctx.group).wait()
        own = flat[widening.own]
        parts = arrived.split([len(index) for index in widening.sends.values()])
        for index, part in zip(widening.sends.values(), parts, strict=True):  # one by one: the order of sums is fixed
            own.index_add_(0, index, part)
        return own.view(ctx.shape), None, None
