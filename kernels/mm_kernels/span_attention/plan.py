"""Which queries and keys the reference multiplies in one call: on the host, from the mask alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def plan_tiles(mask: np.ndarray, until: np.ndarray | None = None, keys: int | None = None) -> list[TileGroup]:
    """Cut, tile and group the queries of a mask; at least one group, if of no real query.

    Args:
        mask: integers [B, 2, S], rows lo and hi; until: integers [B, keys], None where nothing is hidden.
        keys: length of a row of keys, S if None.
    """
    batch, _, queries = mask.shape
    keys = queries if keys is None else keys
    total = batch * queries
    # Rows laid end to end are one long row: no interval crosses from one into the next.
    row = np.arange(batch)[:, None]
    lo, hi = ((mask[:, side].astype(np.int64) + row * keys).ravel() for side in (0, 1))
    until = np.full(batch * keys, total) if until is None else (until.astype(np.int64) + row * queries).ravel()
    sees = lo < hi
    first_key, end_key = np.where(sees, lo, batch * keys), np.where(sees, hi, 0)

    position = np.arange(total)
    seen_before = np.maximum.accumulate(np.append(0, end_key[:-1]))
    cut = np.minimum.accumulate(first_key[::-1])[::-1] >= seen_before
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
