"""What every implementation of span attention takes, checked before anything runs. Shapes only: no device is asked."""

from __future__ import annotations

import torch


def default_scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def split_mask(mask: torch.Tensor, until: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(lo and hi, until): the third row of a mask [B, 3, S] is `until` where the keys are the queries' own."""
    return (mask[:, :2], mask[:, 2]) if mask.shape[1] == 3 else (mask, until)


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None, scale: float
) -> None:
    """Raises ValueError where shapes, dtypes or the scale do not fit together (see `op.span_attention`)."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: expected [B, S, H, D] and "
            f"[B, K, G, D]."
        )
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads over {k.shape[2]} key heads: expected H a multiple of G.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: expected one dtype.")
    if mask.ndim != 3 or mask.shape[0] != batch or mask.shape[1] not in (2, 3) or mask.shape[2] != queries:
        raise ValueError(
            f"The mask is {list(mask.shape)}, expected [{batch}, 2 or 3, {queries}] for q {list(q.shape)}."
        )
    if mask.shape[1] == 3 and (until is not None or keys != queries):
        raise ValueError(
            f"A mask of three rows says `until` of {queries} keys itself; for {keys} keys give its first two rows, and "
            f"`until` separately."
        )
    if until is not None and tuple(until.shape) != (batch, keys):
        raise ValueError(f"until is {list(until.shape)}, expected [{batch}, {keys}] for k {list(k.shape)}.")
    for name, tensor in (("mask", mask), ("until", until)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}, expected int32.")
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive.")
