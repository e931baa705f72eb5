"""Span attention in plain torch: any device, any float dtype.

The mask is read on the host. Every row is cut where nothing behind looks back, long pieces are cut into tiles of
queries with the one range of keys that they need, and tiles of similar size, from all rows, are padded into one call.
So work and memory follow the mask's area, not S x S, and a row of short documents costs a few calls rather than one per
document. The trade-off: one device synchronisation per call, and new shapes with every mask.

`span_attention_reference` calls torch's own attention, on a CPU three to five times as fast as a softmax written out.
`forward` and `backward` write it out, since they owe the log-sum-exp and its gradient.

Shape legend: B rows, S queries, K keys, H = G * R query heads, G key/value heads, D head size; inside a call N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from mm_kernels.span_attention.arguments import check, default_scale, split_mask
from mm_kernels.span_attention.plan import plan_tiles


def span_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The output of `op.span_attention` [B, S, H, D], differentiable by autograd. Same arguments, same errors."""
    scale = default_scale(q, scale)
    check(q, k, v, mask, until, scale)
    tiles = _Tiles(q, k, mask, until)
    outs = [
        F.scaled_dot_product_attention(
            q_tiles.transpose(1, 2),
            k_tiles.transpose(1, 2),
            v_tiles.transpose(1, 2),
            attn_mask=allowed[:, None],
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
        for q_tiles, k_tiles, v_tiles, allowed in tiles.zip(tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v))
    ]
    return tiles.scatter(outs, torch.zeros_like(q))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, H, D], lse [B, H, S] in fp32, or fp64 for fp64 inputs), without a graph."""
    tiles = _Tiles(q, k, mask, until)
    outs, sums = [], []
    for q_tiles, k_tiles, v_tiles, allowed in tiles.zip(tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v)):
        q_tiles, k_tiles, v_tiles = (_by_group(t, k.shape[2]) for t in (q_tiles, k_tiles, v_tiles))
        scores = _scores(q_tiles, k_tiles, allowed, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append(_by_position((scores - lse).exp() @ v_tiles).to(q.dtype))
        sums.append(_by_position(lse).squeeze(-1))
    out = tiles.scatter(outs, torch.zeros_like(q))
    lse = tiles.scatter(sums, torch.full(q.shape[:3], float("-inf"), dtype=sums[0].dtype, device=q.device))
    return out, lse.transpose(1, 2).contiguous()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv). `out` and `lse` may be those of more keys than these: then the result is these keys' part."""
    tiles = _Tiles(q, k, mask, until)
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse.transpose(1, 2)
    dq_tiles = []
    dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (k, v))
    sides = (tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v), tiles.of_queries(dout))
    rows = (tiles.of_queries(lse.transpose(1, 2)[..., None]), tiles.of_queries(delta[..., None]))
    for i, (*parts, allowed) in enumerate(tiles.zip(*sides, *rows)):
        q_tiles, k_tiles, v_tiles, dout_tiles, lse_tiles, delta_tiles = (_by_group(t, k.shape[2]) for t in parts)
        # Queries without a key, and those that only fill a tile up, have no weights.
        lse_tiles = lse_tiles.masked_fill(~tiles.real(i)[:, None, None, :, None], float("inf"))
        weights = (_scores(q_tiles, k_tiles, allowed, scale) - lse_tiles).exp()
        dscores = weights * (dout_tiles @ v_tiles.mT - delta_tiles) * scale
        dq_tiles.append(_by_position(dscores @ k_tiles).to(q.dtype))
        tiles.add_keys(i, dk, (dscores.mT @ q_tiles).sum(2))
        tiles.add_keys(i, dv, (weights.mT @ dout_tiles).sum(2))
    return tiles.scatter(dq_tiles, torch.zeros_like(q)), dk.to(k.dtype), dv.to(v.dtype)


class _Tiles:
    """The groups of tiles of one mask, and how tensors are cut into them: one gather and one scatter for all groups."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None):
        rows, until = split_mask(mask, until)
        hidden = None if until is None else until.detach().cpu().numpy()
        self._groups = plan_tiles(rows.detach().cpu().numpy(), hidden, k.shape[1])
        self._device = q.device
        self._queries, self._keys, self._real = (
            np.concatenate([getattr(group, name).ravel() for group in self._groups])
            for name in ("queries", "keys", "real")
        )

    def zip(self, *sides: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """One tuple a group: its part of every side, and which of its queries see which keys, bool [N, Q, K]."""
        return zip(*sides, (self._tensor(group.allowed) for group in self._groups), strict=True)

    def of_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, ...] -> [N, Q, ...] of every group."""
        return self._gather(tensor, self._queries, [group.queries for group in self._groups])

    def of_keys(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """[B, K, ...] -> [N, K, ...] of every group."""
        return self._gather(tensor, self._keys, [group.keys for group in self._groups])

    def real(self, i: int) -> torch.Tensor:
        """Which queries of group i have an answer: bool [N, Q]."""
        return self._tensor(self._groups[i].real)

    def scatter(self, parts: list[torch.Tensor], into: torch.Tensor) -> torch.Tensor:
        """[N, Q, ...] of every group -> [B, S, ...], which has the values of `into` where no query has an answer."""
        values = torch.cat([part.flatten(0, 1) for part in parts])
        values = values.index_select(0, self._tensor(np.flatnonzero(self._real)))
        return into.flatten(0, 1).index_copy(0, self._tensor(self._queries[self._real]), values).view_as(into)

    def add_keys(self, i: int, into: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values [N, G, K, D] of group i to `into` [B, K, G, D]."""
        into.flatten(0, 1).index_add_(
            0, self._tensor(self._groups[i].keys.ravel()), values.transpose(1, 2).flatten(0, 1)
        )

    def _gather(self, tensor: torch.Tensor, index: np.ndarray, shapes: list[np.ndarray]) -> list[torch.Tensor]:
        parts = tensor.flatten(0, 1).index_select(0, self._tensor(index)).split([shape.size for shape in shapes])
        return [part.unflatten(0, shape.shape) for part, shape in zip(parts, shapes, strict=True)]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, Q, G * R, D] -> [N, G, R, Q, D], in fp32 at least."""
    precise = torch.promote_types(tensor.dtype, torch.float32)
    n, queries, _, width = tensor.shape
    return tensor.to(precise).view(n, queries, groups, -1, width).permute(0, 2, 3, 1, 4)


def _by_position(tensor: torch.Tensor) -> torch.Tensor:
    """[N, G, R, Q, D] -> [N, Q, G * R, D]."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, G, R, Q, K], -inf where the mask forbids."""
    return (q @ k.mT * scale).masked_fill(~allowed[:, None, None], float("-inf"))
