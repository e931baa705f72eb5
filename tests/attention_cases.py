"""What every implementation of span attention is held against: masks, inputs, and a dense softmax written out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from devices import KERNEL_DEVICE
from hypothesis import strategies as st

from megatron_mm import mask as masks

DEVICE = KERNEL_DEVICE
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One attention problem. mask int32 [B, 3, S]; heads: query heads and key heads."""

    mask: np.ndarray
    heads: tuple[int, int] = (2, 1)
    width: int = 16
    scale: float | None = None

    @property
    def allowed(self) -> torch.Tensor:
        """bool [B, S, S]."""
        return torch.from_numpy(np.stack([masks.dense(row) for row in self.mask]))

    def inputs(self, dtype: torch.dtype, device: torch.device = DEVICE) -> dict[str, torch.Tensor]:
        """q, k, v and the gradients of both results, rounded to `dtype` (dlse is always fp32 or more)."""
        (batch, _, length), (heads, groups) = self.mask.shape, self.heads
        generator = torch.Generator().manual_seed(batch * length)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        values = {
            "q": draw(batch, length, heads, self.width),
            "k": draw(batch, length, groups, self.width),
            "v": draw(batch, length, groups, self.width),
            "dout": draw(batch, length, heads, self.width),
        }
        return {name: t.to(dtype).to(device) for name, t in values.items()} | {
            "dlse": draw(batch, heads, length).to(torch.promote_types(dtype, torch.float32)).to(device)
        }


def dense(q, k, v, allowed, scale=None):
    """(out, lse) by writing the softmax out over allowed [B, S, K]: 0 and -inf where a query sees nothing."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = allowed[:, None].to(q.device)
    scores = scores.masked_fill(~allowed, float("-inf"))
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.where(allowed, (scores - peak).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + peak).squeeze(-1).masked_fill(~allowed.any(-1), float("-inf"))
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def with_gradients(function, inputs):
    """(out, lse, dq, dk, dv) of a function of q, k, v that returns (out, lse)."""
    qkv = [inputs[name].detach().clone().requires_grad_() for name in "qkv"]
    out, lse = function(*qkv)
    # -inf has no gradient to speak of: those rows take part in no loss.
    dead = torch.isinf(lse)
    loss = (out * inputs["dout"].to(out.dtype)).sum()
    loss = loss + (lse.masked_fill(dead, 0.0) * inputs["dlse"].to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, qkv)


def exact(case, inputs):
    """The five results in fp64, from the same rounded inputs."""
    precise = {name: t.double() for name, t in inputs.items()}
    return with_gradients(lambda q, k, v: dense(q, k, v, case.allowed, case.scale), precise)


def error(result, truth) -> float:
    """Largest absolute difference; both must be infinite at the same places."""
    infinite = torch.isinf(truth)
    assert torch.equal(infinite, torch.isinf(result)), "infinite elsewhere"
    difference = (result.double() - truth)[~infinite].abs()
    assert not difference.isnan().any(), "not a number"
    return difference.max().item() if difference.numel() else 0.0


@st.composite
def packs(draw, longest=30, rows=3):
    """Masks [B, 3, S] of random documents with spans, windows, hidden keys (even from everyone) and padding."""
    packed = []
    for _ in range(draw(st.integers(1, rows))):
        parts = []
        for n in draw(st.lists(st.integers(1, longest), max_size=4)):
            points = sorted(draw(st.lists(st.integers(0, n), max_size=4, unique=True)))
            spans = list(zip(points[::2], points[1::2], strict=False))
            part = masks.window(masks.with_spans(n, spans), draw(st.integers(1, n)))
            if draw(st.booleans()):
                part[2] = draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
            parts.append(part)
        packed.append(parts)
    length = max(1, *(sum(p.shape[1] for p in parts) for parts in packed)) + draw(st.integers(0, 5))
    return np.stack([masks.concatenate(parts, length) for parts in packed])
