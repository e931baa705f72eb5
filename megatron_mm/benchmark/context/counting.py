"""Exact counts of what an assignment makes ranks multiply and need, key by key, from the mask alone.

Nothing here goes through `parallel.context.schedule`, whose needs are intervals a chunk: these counts are what its
figures are held against.
"""

from __future__ import annotations

import numpy as np

from megatron_mm.parallel.context.assignment import Assignment


def pairs(mask: np.ndarray, assignment: Assignment) -> np.ndarray:
    """Allowed pairs of each rank's queries with each owner's keys, over all rows: int64 [ranks, owners].

    Args:
        mask: int32 [B, 2 or 3, S].
    """
    owner = np.empty(mask.shape[2], np.int64)
    for rank in range(assignment.ranks):
        owner[assignment.positions(rank)] = rank
    total = np.zeros((assignment.ranks, assignment.ranks), np.int64)
    for lo, hi, *until in mask:
        total += _held(owner, hi, assignment) - _held(owner, lo, assignment)
        if until:
            hidden = np.flatnonzero(until[0] < len(lo))
            first, end = (side[hidden] for side in _queries(lo, hi))
            seen = np.clip(until[0][hidden], first, end)
            total -= (_held(owner[hidden], end, assignment) - _held(owner[hidden], seen, assignment)).T
    return total


def least_received(mask: np.ndarray, assignment: Assignment) -> np.ndarray:
    """How many keys of other ranks each rank cannot do without: those that at least one of its queries may see, in any
    row. int64 [ranks]; mask as in `pairs`."""
    length = mask.shape[2]
    seeing = []
    for lo, hi, *until in mask:
        first, end = _queries(lo, hi)
        seeing.append((first, np.minimum(end, until[0]) if until else end))
    counts = np.zeros(assignment.ranks, np.int64)
    for rank in range(assignment.ranks):
        mine = np.zeros(length + 1, np.int32)
        mine[assignment.positions(rank) + 1] = 1
        before = np.cumsum(mine, dtype=np.int32)  # how many of the rank's queries stand before each place
        seen = np.zeros(length, bool)
        for first, end in seeing:
            seen |= before[end] > before[first]
        counts[rank] = np.count_nonzero(seen & (mine[1:] == 0))
    return counts


def _queries(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries first .. end - 1 have a key in their interval: int64 [S] each. `lo` and `hi` never decrease."""
    key = np.arange(len(lo))
    end = np.searchsorted(lo, key, side="right")
    return np.minimum(np.searchsorted(hi, key, side="right"), end), end


def _held(group: np.ndarray, bound: np.ndarray, assignment: Assignment) -> np.ndarray:
    """How many positions of each rank stand before `bound`, summed over the bounds of each group: int64 [groups,
    ranks], as many groups as ranks."""
    ranks, size = assignment.ranks, assignment.chunk_size
    chunks = assignment.chunks.size
    holds = np.zeros((chunks, ranks), np.int64)
    for rank, numbers in enumerate(assignment.chunks):
        holds[numbers, rank] = 1
    before = np.concatenate([np.zeros((1, ranks), np.int64), np.cumsum(holds, axis=0) * size])
    chunk, rest = np.divmod(bound.astype(np.int64), size)
    place, places = group * (chunks + 1) + chunk, ranks * (chunks + 1)
    whole = np.bincount(place, minlength=places).reshape(ranks, chunks + 1)
    parts = np.bincount(place, weights=rest, minlength=places).astype(np.int64).reshape(ranks, chunks + 1)
    counted: np.ndarray = whole @ before + parts[:, :chunks] @ holds
    return counted
