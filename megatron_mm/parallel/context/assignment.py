"""Which chunks of a sequence each context-parallel rank has: equal token counts, the mask's area balanced.

From contiguous parts, which need the fewest keys of others, heavy ranks swap chunks with light ones until no rank has
more than `TARGET` times the mean area. Chunks start at half of a rank's part and are halved only when swaps of that
size no longer help, so that a row that is balanced already (or by mirrored halves, as a causal one is) stays in large
pieces. Among swaps that suffice, those of chunks that see few keys are taken, since their keys must follow them.

All on the host, in numpy over chunks: areas come from a sample of the positions, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TARGET = 1.025
"""Largest area of a rank over the mean, where chunks permit."""
FINEST, MOST = 64, 32
"""Fewest positions of a chunk (a tile of queries), and most chunks of a rank."""
SAMPLES = 64
"""Positions of a finest chunk whose number of keys is looked at."""
KEYS_WEIGHT = 0.05
"""What a swap's keys weigh against what it leaves unbalanced."""


@dataclass(frozen=True)
class Assignment:
    """A sequence cut into equal chunks. `chunks` int64 [ranks, chunks of a rank]: chunk numbers, ascending in a row."""

    chunk_size: int
    chunks: np.ndarray

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @property
    def part(self) -> int:
        """Positions of one rank."""
        return self.chunks.shape[1] * self.chunk_size

    @cached_property
    def starts(self) -> np.ndarray:
        """First position of each chunk, int64 [ranks, chunks of a rank]."""
        return self.chunks * self.chunk_size

    def positions(self, rank: int) -> np.ndarray:
        """Every position of a rank, ascending: int64 [part]."""
        positions: np.ndarray = self.starts[rank][:, None] + np.arange(self.chunk_size)
        return positions.ravel()


def contiguous(length: int, ranks: int) -> Assignment:
    """One part after the other."""
    return Assignment(length // ranks, np.arange(ranks)[:, None])


def zigzag(length: int, ranks: int) -> Assignment:
    """The part from the front and its mirror image from the back: balanced where one causal document fills a row."""
    number = np.arange(ranks)
    return Assignment(length // (2 * ranks), np.stack([number, 2 * ranks - 1 - number], axis=1))


def assign(mask: np.ndarray, ranks: int) -> Assignment:
    """The balanced assignment of rows with this mask, one for all of them. Deterministic; every rank gets the same.

    Args:
        mask: int32 [B, 2 or 3, S] as `megatron_mm.mask`; the third row, if any, hides keys.

    Raises:
        ValueError: `ranks` does not divide the length.
    """
    length = mask.shape[2]
    if length % ranks:
        raise ValueError(f"{length} positions cannot be cut into {ranks} equal parts.")
    part = length // ranks
    most = 1
    while part % (2 * most) == 0 and part // (2 * most) >= FINEST and most < MOST:
        most *= 2
    if ranks == 1 or most == 1:
        return contiguous(length, ranks)
    chunk = part // most
    area = chunk_areas(mask, chunk, max(1, chunk // SAMPLES)).astype(float)
    first_key, end_key = mask[:, 0, ::chunk], mask[:, 1, chunk - 1 :: chunk]

    count = 2
    held = np.arange(2 * ranks).reshape(ranks, 2)
    while True:
        coarser = most // count
        areas = area.reshape(-1, coarser).sum(1)
        keys = (end_key[:, coarser - 1 :: coarser] - first_key[:, ::coarser]).clip(0).sum(0)
        if _swap_in_pairs(held, areas, keys * (KEYS_WEIGHT * area.sum() / length / count / len(mask))):
            break
        if count == most:
            _swap_one_by_one(held, areas)
            break
        held = np.concatenate([2 * held, 2 * held + 1], axis=1)
        count *= 2
    return Assignment(part // count, np.sort(held, axis=1))


def chunk_areas(mask: np.ndarray, chunk: int, step: int = 1) -> np.ndarray:
    """Allowed pairs of each chunk's queries, summed over rows: int64 [S / chunk]; exact for step 1, else from every
    `step`-th position."""
    batch, rows, length = mask.shape
    sample = slice(step // 2, None, step)
    lo, hi = (mask[:, side].reshape(batch, -1, chunk)[..., sample] for side in (0, 1))
    areas: np.ndarray = (hi - lo).clip(0).sum((0, 2), dtype=np.int64) * step
    if rows == 3:
        areas -= np.stack([_hidden(*row) for row in mask]).reshape(batch, -1, chunk).sum((0, 2))
    return areas


def _hidden(lo: np.ndarray, hi: np.ndarray, until: np.ndarray) -> np.ndarray:
    """How many keys within each query's interval are hidden from it: int64 [S]."""
    keys = np.flatnonzero(until < len(lo))
    end = np.searchsorted(lo, keys, side="right")
    first = np.minimum(np.maximum(until[keys], np.searchsorted(hi, keys, side="right")), end)
    change = np.bincount(first, minlength=len(lo) + 1) - np.bincount(end, minlength=len(lo) + 1)
    hidden: np.ndarray = np.cumsum(change)[:-1]
    return hidden


def _swap_in_pairs(held: np.ndarray, areas: np.ndarray, price: np.ndarray) -> bool:
    """The heaviest rank swaps a chunk with the lightest, the second heaviest with the second lightest, and so on, all
    at once and again, until the loads are even (True) or no swap helps. Changes `held`; `price` of moving each chunk.
    """
    half = len(held) // 2
    mean = areas.sum() / len(held)
    tolerance = (TARGET - 1) * mean
    for _ in range(12):
        mine = areas[held]
        load = mine.sum(1)
        if load.max() <= TARGET * mean:
            return True
        order = np.argsort(load, kind="stable")
        low, high = order[:half], order[: -half - 1 : -1]
        gap = load[high] - load[low]
        uneven = gap > tolerance
        low, high, gap = low[uneven], high[uneven], gap[uneven]
        left = np.abs(gap[:, None, None] - 2 * (mine[high][:, :, None] - mine[low][:, None, :]))
        total = np.maximum(left, tolerance) + price[held[high]][:, :, None] + price[held[low]][:, None, :]
        i, j = np.divmod(total.reshape(len(low), -1).argmin(1), held.shape[1])
        helps = left[np.arange(len(low)), i, j] < 0.9 * gap
        if not helps.any():
            return False
        high, low, i, j = high[helps], low[helps], i[helps], j[helps]
        held[high, i], held[low, j] = held[low, j], held[high, i]
    return False


def _swap_one_by_one(held: np.ndarray, areas: np.ndarray) -> None:
    """The heaviest rank swaps with whichever rank it fits best, until the loads are even or nothing helps."""
    limit = TARGET * areas.sum() / len(held)
    for _ in range(8 * len(held)):
        mine = areas[held]
        load = mine.sum(1)
        heavy = int(load.argmax())
        if load[heavy] <= limit:
            return
        less = mine[heavy][:, None, None] - mine  # what it loses by giving chunk i for chunk (rank, j): [m, ranks, m]
        worse = np.maximum(load[heavy] - less, load[:, None] + less)
        worse[:, heavy] = np.inf
        i, other, j = np.unravel_index(worse.argmin(), worse.shape)
        if worse[i, other, j] >= load[heavy]:
            return
        held[heavy, i], held[other, j] = held[other, j], held[heavy, i]
