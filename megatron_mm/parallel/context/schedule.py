"""What each rank sends, receives and multiplies, stage by stage: planned on the host, from the mask alone.

Stage by stage each rank gets keys of other ranks, as many as its queries need. Two ways to get them there:

exchange  straight from their owner: at distance t, rank r gets from r - t; distances are put together until a stage
          brings about as many keys as a rank has itself. Nothing travels that its receiver does not need.
ring      from neighbour to neighbour: at stage t, rank r gets from r - 1 what r - t owns, cut down to what it or a
          later rank on the way still needs.

Gradients of keys go straight home to their owner in both. Every rank computes the same needs, so that a message that
one rank sends is a message that another awaits; empty ones are left out by both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_mm.parallel.context.assignment import Assignment

FAR = np.iinfo(np.int64).max
Rows = Mapping[int, np.ndarray]
"""peer -> indices, int64."""


@dataclass(frozen=True)
class Stage:
    """One step of one rank. What arrives, peer after peer in order, is the stage's buffer.

    sends: rows of the source for each peer: of the rank's own keys, or with `relays` of the buffer before.
    receives: peer -> number of keys.
    keys: global positions of the keys that this rank multiplies, ascending; int64 [K]. rows: where each stands in the
      buffer.
    returns: owner -> which of `keys` are its own, whose gradients it gets.
    homes: peer -> which of this rank's own keys have gradients coming from the peer.
    """

    relays: bool
    sends: Rows
    receives: Mapping[int, int]
    keys: np.ndarray
    rows: np.ndarray
    returns: Rows
    homes: Rows


@dataclass(frozen=True)
class Needs:
    """Which keys each rank's queries need of every chunk: those before `head`, for queries that stand before the chunk,
    and those from `tail` on, for queries behind it. A rank's own chunks count as a whole.

    head, tail: int64 [ranks, chunks], positions from the chunk's start to its end.
    """

    assignment: Assignment
    head: np.ndarray
    tail: np.ndarray

    def of(self, ranks: np.ndarray | int, owner: int) -> np.ndarray:
        """Positions of `owner` that a rank needs, or any of several: int64, ascending."""
        chunks = self.assignment.chunks[owner]
        start = self.assignment.starts[owner]
        head = np.atleast_2d(self.head[ranks])[:, chunks].max(0, initial=0)
        tail = np.atleast_2d(self.tail[ranks])[:, chunks].min(0, initial=FAR)
        first = np.stack([start, np.maximum(tail, head)], axis=1)
        return ranges(first.ravel(), np.stack([head, start + self.assignment.chunk_size], axis=1).ravel())

    def counts(self) -> np.ndarray:
        """How many keys of each owner each rank needs: int64 [ranks, owners]."""
        sizes = _sizes(self.head, self.tail, self.assignment.chunk_size)
        counts: np.ndarray = sizes[:, self.assignment.chunks].sum(-1)
        return counts


def needs(mask: np.ndarray, assignment: Assignment) -> Needs:
    """What queries need of keys, by the intervals alone: a key that `until` hides from all of them counts as needed.

    Args:
        mask: int32 [B, 2 or 3, S]; keys that any of the rows needs are needed.
    """
    size = assignment.chunk_size
    # lo and hi never decrease, so a chunk's queries need the one range from the first's first key to the last's last.
    first, end = (side.astype(np.int64) for side in (mask[:, 0, ::size], mask[:, 1, size - 1 :: size]))
    empty = end <= first
    first, end = np.where(empty, FAR, first).min(0), np.where(empty, 0, end).max(0)
    start = np.arange(len(first)) * size
    owned = np.zeros((assignment.ranks, len(first)), bool)
    owned[np.arange(assignment.ranks)[:, None], assignment.chunks] = True
    reach_forward = np.maximum.accumulate(np.where(owned, end, 0), axis=1)
    reach_back = np.minimum.accumulate(np.where(owned, first, FAR)[:, ::-1], axis=1)[:, ::-1]
    head = np.where(owned, start + size, reach_forward.clip(start, start + size))
    return Needs(assignment, head, reach_back.clip(start, start + size))


def _sizes(head: np.ndarray, tail: np.ndarray, size: int) -> np.ndarray:
    """How many keys of a chunk stand before `head` or from `tail` on."""
    counts: np.ndarray = head + size - np.maximum(tail, head)
    return counts


def exchange_distances(needs: Needs) -> list[list[int]]:
    """The distances of each stage under `exchange`: together they bring no rank more keys than it has itself."""
    ranks = needs.assignment.ranks
    number = np.arange(ranks)
    counts = needs.counts()
    stages: list[list[int]] = []
    load = np.zeros(ranks, np.int64)
    for distance in range(1, ranks):
        brought = counts[number, number - distance]
        if not stages or (load + brought).max() > needs.assignment.part:
            stages.append([])
            load = np.zeros(ranks, np.int64)
        stages[-1].append(distance)
        load += brought
    return stages


def exchange(needs: Needs, rank: int) -> list[Stage]:
    """The stages of one rank under `exchange`."""
    return [_exchange_stage(needs, rank, distances) for distances in exchange_distances(needs)]


def _exchange_stage(needs: Needs, rank: int, distances: list[int]) -> Stage:
    ranks = needs.assignment.ranks
    owners = [(rank - distance) % ranks for distance in distances]
    readers = [(rank + distance) % ranks for distance in distances]
    brought = {owner: needs.of(rank, owner) for owner in owners}
    buffer = np.concatenate(list(brought.values()))
    rows = np.argsort(buffer, kind="stable")
    keys = buffer[rows]
    taken = {reader: local_rows(needs.assignment, rank, needs.of(reader, rank)) for reader in readers}
    return Stage(
        relays=False,
        sends=_filled(taken),
        receives={owner: len(positions) for owner, positions in brought.items() if len(positions)},
        keys=keys,
        rows=rows,
        returns=_filled({owner: np.searchsorted(keys, positions) for owner, positions in brought.items()}),
        homes=_filled(taken),
    )


def ring(needs: Needs, rank: int) -> list[Stage]:
    """The stages of one rank under `ring`."""
    ranks = needs.assignment.ranks
    before, after = (rank - 1) % ranks, (rank + 1) % ranks
    source = needs.assignment.positions(rank)
    stages = []
    for distance in range(1, ranks):
        owner, reader, leaving = (rank - distance) % ranks, (rank + distance) % ranks, (after - distance) % ranks
        buffer = _on_the_way(needs, rank, owner)
        keys = needs.of(rank, owner)
        taken = local_rows(needs.assignment, rank, needs.of(reader, rank))
        stages.append(
            Stage(
                relays=distance > 1,
                sends=_filled({after: np.searchsorted(source, _on_the_way(needs, after, leaving))}),
                receives={before: len(buffer)} if len(buffer) else {},
                keys=keys,
                rows=np.searchsorted(buffer, keys),
                returns=_filled({owner: np.arange(len(keys))}),
                homes=_filled({reader: taken}),
            )
        )
        source = buffer
    return stages


def _on_the_way(needs: Needs, rank: int, owner: int) -> np.ndarray:
    """Positions of `owner` that arrive at `rank` in a ring: those that it needs, or one between it and the owner."""
    ranks = needs.assignment.ranks
    return needs.of((rank + np.arange((owner - rank) % ranks)) % ranks, owner)


def relayed_counts(needs: Needs) -> np.ndarray:
    """How many keys arrive at each rank at each distance in a ring: int64 [ranks, ranks], [rank, distance]."""
    assignment = needs.assignment
    ranks = assignment.ranks
    owner = np.arange(ranks)
    counts = np.zeros((ranks, ranks), np.int64)
    head, tail = assignment.starts.copy(), assignment.starts + assignment.chunk_size
    for distance in range(ranks - 1, 0, -1):
        rank = (owner + distance) % ranks
        head = np.maximum(head, needs.head[rank[:, None], assignment.chunks])
        tail = np.minimum(tail, needs.tail[rank[:, None], assignment.chunks])
        counts[rank, distance] = _sizes(head, tail, assignment.chunk_size).sum(1)
    return counts


def ranges(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The numbers of every [first, end), one range after the other: int64."""
    sizes = (end - first).clip(0)
    offset = np.cumsum(sizes) - sizes
    return np.repeat(np.where(sizes > 0, first, 0) - offset, sizes) + np.arange(sizes.sum())


def local_rows(assignment: Assignment, rank: int, positions: np.ndarray) -> np.ndarray:
    """Where positions of a rank stand among its own: int64."""
    size = assignment.chunk_size
    return np.searchsorted(assignment.chunks[rank], positions // size) * size + positions % size


def _filled(rows: Rows) -> Rows:
    return {peer: indices for peer, indices in rows.items() if len(indices)}
