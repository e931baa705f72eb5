"""Which chunks of a sequence each context-parallel rank has: equal token counts, the mask's area balanced.

From contiguous parts, which need the fewest keys of others, heavy ranks swap chunks with light ones, all pairs at once
and again, until no rank has more than `TARGET` times the mean area. A swap is of one chunk or of a run of 2, 4, ... of
them, up to half of a rank's part; the largest that suffices is taken, so that a row that is balanced already, or by
mirrored halves as a causal one is, stays in large pieces. Whole nodes swap first, then the ranks of each node among
themselves: few keys have to cross nodes then.

All on the host, in numpy over chunks: areas come from a sample of the positions, the same on every rank. What every
possible swap of a pair would change is one small matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

TARGET = 1.02
"""Largest area of a rank over the mean, where chunks permit; as sampled, so that the true one stays below 1.03."""
NODES_SHARE = 0.5
"""How much of what `TARGET` allows may be left between nodes."""
FINEST, MOST = 64, 32
"""Fewest positions of a chunk (a tile of queries), and most chunks of a rank."""
SAMPLES = 32
"""Positions of a finest chunk whose number of keys is looked at."""
PLACES = 8
"""Of a rank's part, from which a swap may take chunks of one size."""
HALVING = 0.2
"""What a swap of runs half as long costs, in allowed imbalances."""
SWEEPS = 16
"""Most swaps of a rank in each round."""


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


def assign(mask: np.ndarray, ranks: int, node_size: int = 1) -> Assignment:
    """The balanced assignment of rows with this mask, one for all of them. Deterministic; every rank gets the same.

    Args:
        mask: int32 [B, 2 or 3, S] as `megatron_mm.mask`; the third row, if any, hides keys.
        node_size: neighbours that share a node; 1, or what does not divide the ranks, if nodes make no difference.

    Raises:
        ValueError: `ranks` does not divide the length.
    """
    length = mask.shape[2]
    if length % ranks:
        raise ValueError(f"{length} positions cannot be cut into {ranks} equal parts.")
    part, most = length // ranks, 1
    while part % (2 * most) == 0 and part // (2 * most) >= FINEST and most < MOST:
        most *= 2
    if ranks == 1 or most == 1:
        return contiguous(length, ranks)
    chunk = part // most
    areas = chunk_areas(mask, chunk, max(1, chunk // SAMPLES)).astype(np.float32)
    allowed = (TARGET - 1) * areas.sum() / ranks

    group = ranks
    held = np.arange(ranks * most).reshape(ranks, most)
    if 1 < node_size < ranks and ranks % node_size == 0:
        group = node_size
        of_nodes = np.arange(len(areas) // node_size).reshape(-1, most)
        _even_out(of_nodes, areas.reshape(-1, node_size).sum(1), len(of_nodes), NODES_SHARE * allowed * node_size)
        held = (np.sort(of_nodes)[..., None] * node_size + np.arange(node_size)).reshape(ranks, most)
    _even_out(held, areas, group, allowed)
    _relieve(held, areas, allowed)
    return _in_largest_chunks(np.sort(held), chunk)


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


def _even_out(held: np.ndarray, areas: np.ndarray, group: int, allowed: float) -> None:
    """In each `group` of neighbours the heaviest swaps chunks with the lightest, the second heaviest with the second
    lightest, and so on, until none exceeds the mean by more than `allowed` or no swap helps.

    Args:
        held: chunk numbers [ranks, chunks of a rank], changed in place.
        areas: of each chunk.
    """
    ranks, slots = held.shape
    swaps = _swaps(slots)
    limit = areas.sum() / ranks + allowed
    firsts, half = np.arange(0, ranks, group)[:, None], group // 2
    rows = np.arange(len(firsts) * half)[:, None]
    fixed_price, shift = allowed * HALVING * swaps.halvings, 0
    for _ in range(SWEEPS):
        loads = areas[held].sum(1)
        if loads.max() <= limit or shift == half:
            return
        order = firsts + loads.reshape(-1, group).argsort(1, kind="stable")
        heavy, light = order[:, : -half - 1 : -1].ravel(), order[:, (np.arange(half) + shift) % half].ravel()
        pair = np.concatenate([held[heavy], held[light]], axis=1)
        left = np.abs((loads[heavy] - loads[light])[:, None] - 2 * (areas[pair] @ swaps.given))
        best = (np.maximum(left, allowed / 2) + fixed_price).argmin(1)
        pair = pair[rows, swaps.order[best]]
        held[heavy], held[light] = pair[:, :slots], pair[:, slots:]
        shift += bool(((best == 0) & (loads[heavy] > limit)).any())


def _relieve(held: np.ndarray, areas: np.ndarray, allowed: float) -> None:
    """What is left where few chunks make loads coarse: the heaviest rank swaps with whichever rank it fits best, until
    none exceeds the mean by more than `allowed` or nothing helps. Arguments as `_even_out`."""
    ranks, slots = held.shape
    swaps = _swaps(slots)
    limit = areas.sum() / ranks + allowed
    for _ in range(8 * ranks):
        loads = areas[held].sum(1)
        heavy = int(loads.argmax())
        if loads[heavy] <= limit:
            return
        pair = np.concatenate([np.broadcast_to(held[heavy], held.shape), held], axis=1)
        given = areas[pair] @ swaps.given
        worse = np.maximum(loads[heavy] - given, loads[:, None] + given)
        worse[heavy] = np.inf
        other, swap = divmod(int(worse.argmin()), worse.shape[1])
        if worse[other, swap] >= loads[heavy]:
            return
        pair = pair[other, swaps.order[swap]]
        held[heavy], held[other] = pair[:slots], pair[slots:]


@dataclass(frozen=True)
class _Swaps:
    """All swaps that two ranks may make, the first of them none; columns of the chunks of both, the giver's first."""

    order: np.ndarray
    """Where the chunks come from afterwards: int64 [swaps, 2 x slots]."""
    given: np.ndarray
    """1 for chunks that the giver gives, -1 for those that it gets: float32 [2 x slots, swaps]."""
    halvings: np.ndarray
    """How often its runs were halved: float32 [swaps]."""


@cache
def _swaps(slots: int) -> _Swaps:
    """Of ranks with so many chunks, a power of two."""
    order, given, halvings = [np.arange(2 * slots)], [np.zeros(2 * slots)], [0]
    size = slots // 2
    while size:
        starts = range(0, slots, max(size, slots // PLACES))
        for mine, other in ((slice(i, i + size), slice(slots + j, slots + j + size)) for i in starts for j in starts):
            after, moved = np.arange(2 * slots), np.zeros(2 * slots)
            after[mine], after[other] = order[0][other], order[0][mine]
            moved[mine], moved[other] = 1, -1
            order.append(after)
            given.append(moved)
            halvings.append((slots // size).bit_length() - 1)
        size //= 2
    return _Swaps(np.array(order), np.array(given, np.float32).T.copy(), np.array(halvings, np.float32))


def _in_largest_chunks(held: np.ndarray, chunk: int) -> Assignment:
    """Neighbouring chunks put together where every rank permits it."""
    while held.shape[1] > 1:
        first, second = held[:, ::2], held[:, 1::2]
        if (first % 2).any() or (second != first + 1).any():
            break
        held, chunk = first // 2, 2 * chunk
    return Assignment(chunk, held)
