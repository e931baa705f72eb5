"""Attention whose keys and values are spread over ranks (RingAttention, arXiv 2310.01889): exact, overlapped, any mask.

Queries stay. Keys and values of other ranks arrive step by step (see `schedule`), the next ones under way while the
present ones are multiplied; outputs are merged by their log-sum-exps in fp32. The backward pass fetches them once
more, and sends the gradients of each step's keys home while the next step is computed. So memory is that of two steps,
however long the sequence.

Keys and values travel together, token by token: [n, 2, B, G, D], so that any rows of them are a message.

Shape legend: n positions of this rank, K keys of a step, B rows, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from mm_kernels.span_attention.merge import merge_

from megatron_mm.parallel.context.messages import Messages, post
from megatron_mm.parallel.context.plan import AttentionPlan, Part, Step


class PartialAttention(Protocol):
    """Attention over some of the keys, with its log-sum-exp, and the share of the gradients that these keys have."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `mm_kernels.span_attention.reference.forward`."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        dlse: None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        mask: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `mm_kernels.span_attention.reference.backward`."""
        ...


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    group: dist.ProcessGroup,
    attend: PartialAttention,
) -> torch.Tensor:
    """q [n, B, H, D], k and v [n, B, G, D] of this rank's positions -> out [n, B, H, D] over the keys of all ranks.

    Every rank of `group` calls this as often as the others, and differentiates the calls in the same order.
    """
    return _Ring.apply(q, k, v, plan, group, attend)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        group: dist.ProcessGroup,
        attend: PartialAttention,
    ) -> torch.Tensor:
        own = torch.stack([k, v], dim=1)
        scale = q.shape[-1] ** -0.5
        length, batch, heads, _ = q.shape
        precise = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=precise)
        lse = q.new_full((batch, heads, length), float("-inf"), dtype=precise)
        for part, _, kv in _arrivals(plan, own, group):
            if part is not None:
                piece = slice(part.first, part.first + part.count)
                new = attend.forward(_rows(q[piece]), *_sides(kv), part.mask, part.until, scale)
                merge_(_rows(out[piece]), lse[..., piece], *new)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.plan, ctx.group, ctx.attend, ctx.scale = plan, group, attend, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):
        q, own, out, lse = ctx.saved_tensors
        dq, dkv = (torch.zeros_like(t, dtype=lse.dtype) for t in (q, own))
        homing: tuple[Step, Messages] | None = None
        for part, step, kv in _arrivals(ctx.plan, own, ctx.group):
            gradient = None
            if part is not None:
                piece = slice(part.first, part.first + part.count)
                dq_part, dk, dv = ctx.attend.backward(
                    _rows(dout[piece]), None, _rows(q[piece]), *_sides(kv), _rows(out[piece]), lse[..., piece],
                    part.mask, part.until, ctx.scale,
                )  # fmt: skip
                _rows(dq[piece]).add_(dq_part)
                gradient = torch.stack([_rows(dk), _rows(dv)], dim=1)
            if step is not None:
                _collect(homing, dkv)
                homing = step, _return_home(step, gradient, own, ctx.group)
            elif gradient is not None:
                dkv += gradient
        _collect(homing, dkv)
        dk, dv = dkv.to(own.dtype).unbind(1)
        return dq.to(q.dtype), dk, dv, None, None, None


def _arrivals(
    plan: AttentionPlan, own: torch.Tensor, group: dist.ProcessGroup
) -> Iterator[tuple[Part | None, Step | None, torch.Tensor]]:
    """(part, its step, keys and values [K, 2, B, G, D]), this rank's own first, while the next ones are under way."""
    under_way = _fetch(plan.steps[0], own, group) if plan.steps else None
    yield plan.own, None, own
    for number, step in enumerate(plan.steps):
        buffer = under_way.wait()
        if number + 1 < len(plan.steps):
            following = plan.steps[number + 1]
            under_way = _fetch(following, buffer if following.relays else own, group)
        yield step.part, step, buffer if step.rows is None else step.rows.take(buffer)


def _fetch(step: Step, source: torch.Tensor, group: dist.ProcessGroup) -> Messages:
    sends = {peer: rows.take(source) for peer, rows in step.sends.items()}
    return post(sends, step.receives, source, group)


def _return_home(step: Step, gradient: torch.Tensor | None, like: torch.Tensor, group: dist.ProcessGroup) -> Messages:
    """Gradients of a step's keys to their owners, and others' gradients of this rank's keys, in the keys' dtype."""
    sends = {} if gradient is None else {owner: rows.take(gradient) for owner, rows in step.returns.items()}
    return post(sends, {peer: rows.count for peer, rows in step.homes.items()}, like, group)


def _collect(homing: tuple[Step, Messages] | None, into: torch.Tensor) -> None:
    """Adds what came home in a step to the gradients of this rank's keys."""
    if homing is None:
        return
    step, messages = homing
    arrived = messages.wait().split([rows.count for rows in step.homes.values()])
    for rows, values in zip(step.homes.values(), arrived, strict=True):
        rows.add(into, values)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[n, B, ...] <-> [B, n, ...]."""
    return tensor.transpose(0, 1)


def _sides(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [B, K, G, D] of [K, 2, B, G, D]."""
    k, v = kv.unbind(1)
    return _rows(k), _rows(v)
