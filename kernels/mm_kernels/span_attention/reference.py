"""Span attention in plain torch: any device, any float dtype, differentiable by autograd.

The mask is read on the host. Every row is cut where nothing behind looks back, long pieces are cut into tiles of
queries with the one range of keys that they need, and tiles of similar size, from all rows, are padded into one call of
torch's attention. So work and memory follow the mask's area, not S x S, and a row of short documents costs a few calls
rather than one per document. The trade-off: one device synchronisation per call, and new shapes with every mask.

Shape legend: B rows, S queries, K keys, H query heads, G key/value heads, D head size; N tiles of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# Both measured on one CPU core, 4 to 8 heads of 16 to 64: within 15 % from half to twice the value.
TILE = 128
"""Queries in one tile of a long piece."""
CALL_COST = 4096
"""Score-matrix elements that take as long as one more call: where padding beats another call."""


@dataclass(frozen=True)
class TileGroup:
    """Tiles that share a call, padded to one size. Positions are flattened over rows: row * S + position.

    queries int64 [N, Q] and keys int64 [N, K], padded by repeating a tile's last position; real bool [N, Q] marks the
    queries that have an answer; allowed bool [N, Q, K] has a key for every query, real or not.
    """

    queries: np.ndarray
    keys: np.ndarray
    real: np.ndarray
    allowed: np.ndarray


def span_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    until: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the allowed keys; exactly zero, without gradient, where a query has none.

    Args:
        q: [B, S, H, D]; k, v: [B, K, G, D] with H a multiple of G (query head h reads key head h // (H / G)).
        mask: integers [B, 3, S], rows lo, hi, until, as `megatron_mm.mask` builds them.
        scale: of the scores; D ** -0.5 if None.
        until, positions: for keys that are not the queries (a KV cache): integers [B, K], and the queries' own
            positions, integers [B, S]. lo, hi and positions are then in key coordinates and `mask` may be [B, 2, S].
            Without them and with K != S no key is hidden.

    Returns:
        [B, S, H, D], in q's dtype.

    Raises:
        ValueError: the shapes do not fit together, or one of `until` and `positions` is missing.
    """
    _check(q, k, v, mask, until, positions)
    if until is not None or k.shape[1] != q.shape[1]:
        return _cache_attention(q, k, v, mask, scale, until, positions)

    groups = plan_tiles(mask.detach().cpu().numpy())
    queries = np.concatenate([group.queries.ravel() for group in groups])
    keys = np.concatenate([group.keys.ravel() for group in groups])
    real = np.concatenate([group.real.ravel() for group in groups])
    # One gather and one scatter for all groups; what the groups see are slices of it.
    packed = [
        t.flatten(0, 1).index_select(0, _tensor(index, q.device)).split([getattr(g, side).size for g in groups])
        for t, index, side in ((q, queries, "queries"), (k, keys, "keys"), (v, keys, "keys"))
    ]
    out = torch.cat(
        [
            _attend(group, q_group, k_group, v_group, scale)
            for group, q_group, k_group, v_group in zip(groups, *packed, strict=True)
        ]
    )
    out = out.index_select(0, _tensor(np.flatnonzero(real), q.device))
    empty = q.new_zeros(q.shape[0] * q.shape[1], *q.shape[2:])
    return empty.index_copy(0, _tensor(queries[real], q.device), out).view_as(q)


def plan_tiles(mask: np.ndarray) -> list[TileGroup]:
    """Cut, tile and group the queries of a mask, integers [B, 3, S]; at least one group, if of no real query."""
    batch, _, length = mask.shape
    total = batch * length
    # Rows laid end to end are one long row: no interval crosses from one into the next.
    lo, hi, until = (mask.astype(np.int64) + np.arange(batch)[:, None, None] * length).transpose(1, 0, 2).reshape(3, -1)
    sees = lo < hi
    first_key, end_key = np.where(sees, lo, total), np.where(sees, hi, 0)

    position = np.arange(total)
    cut = np.minimum.accumulate(first_key[::-1])[::-1] >= position
    piece_start = position[cut][np.cumsum(cut) - 1]
    starts = np.flatnonzero((position - piece_start) % TILE == 0)

    tiles = np.stack(
        [
            starts,
            np.append(starts[1:], total) - starts,
            np.minimum.reduceat(first_key, starts),
            np.maximum.reduceat(end_key, starts) - np.minimum.reduceat(first_key, starts),
        ],
        axis=1,
    )
    tiles = tiles[tiles[:, 3] > 0]
    if not len(tiles):
        tiles = np.array([[0, 1, 0, 1]])
    tiles = tiles[np.lexsort((-tiles[:, 1], -tiles[:, 3]))]
    bounds = _group_bounds(tiles[:, [1, 3]].tolist())
    return [_tile_group(tiles[a:b], lo, hi, until) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _group_bounds(sizes: list[list[int]]) -> list[int]:
    """Where to split tiles (queries, keys), sorted by keys downwards, so that padding costs less than calls."""
    bounds, area, height, width = [0], 0, 0, sizes[0][1]
    for i, (queries, keys) in enumerate(sizes):
        area += queries * keys
        height = max(height, queries)
        if height * width * (i + 1 - bounds[-1]) - area > CALL_COST:
            bounds.append(i)
            area, height, width = queries * keys, queries, keys
    return [*bounds, len(sizes)]


def _tile_group(tiles: np.ndarray, lo: np.ndarray, hi: np.ndarray, until: np.ndarray) -> TileGroup:
    start, height, first_key, width = (column[:, None] for column in tiles.T)
    row, column = np.arange(height.max()), np.arange(width.max())
    queries = start + np.minimum(row, height - 1)
    keys = first_key + np.minimum(column, width - 1)
    key = (first_key + column)[:, None, :]
    allowed = (lo[queries][..., None] <= key) & (key < hi[queries][..., None])
    allowed &= queries[..., None] < until[keys][:, None, :]
    answered = allowed.any(axis=-1)
    allowed[..., 0] |= ~answered  # a softmax over nothing would be NaN; the result is not used
    return TileGroup(queries, keys, answered & (row < height), allowed)


def _attend(group: TileGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attention of one group's gathered tiles: q [N * Q, H, D], k and v [N * K, G, D] -> [N * Q, H, D]."""
    q, k, v = q.unflatten(0, group.queries.shape), *(t.unflatten(0, group.keys.shape) for t in (k, v))
    return _sdpa(q, k, v, _tensor(group.allowed, q.device), scale).flatten(0, 1)


def _cache_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    until: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """Few queries against many keys: one call with a mask of S x K."""
    key = torch.arange(k.shape[1], device=q.device)
    allowed = (mask[:, 0, :, None] <= key) & (key < mask[:, 1, :, None])
    if until is not None and positions is not None:
        allowed = allowed & (positions[:, :, None] < until[:, None, :])
    unanswered = ~allowed.any(dim=-1, keepdim=True)
    return _sdpa(q, k, v, allowed | unanswered, scale).masked_fill(unanswered[..., None], 0.0)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """torch's attention with heads behind positions: q [N, Q, H, D], allowed bool [N, Q, K]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != q.shape[3] or heads % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: expected [B, S, H, D] and "
            f"[B, K, G, D] with H a multiple of G."
        )
    if (until is None) != (positions is None):
        raise ValueError("until and positions belong together: give both or neither.")
    rows = 3 if until is None and keys == queries else mask.shape[1]
    if tuple(mask.shape) != (batch, rows, queries) or rows < 2:
        raise ValueError(f"The mask is {list(mask.shape)}, expected [{batch}, 3, {queries}] for q {list(q.shape)}.")
