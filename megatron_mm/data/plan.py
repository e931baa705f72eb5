"""The plan: which documents stand in which pack, a pure function of (document lengths, seed, epoch, window).

An epoch's documents are shuffled globally, cut into windows, and each window is packed best-fit into rows of seq_length
tokens. No rank, worker or file enters, so the place in the data is three small integers and resuming costs nothing.
Memory: an epoch's order is 8 bytes a document (16 while it is made); packs exist for one window at a time. A window's
last rows stay partly empty, so a window should be many times seq_length / mean length.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

Pack = tuple[int, ...]
"""uids of the documents in one row."""


@dataclass(frozen=True, order=True)
class Position:
    """Place of a pack in the endless sequence of packs."""

    epoch: int = 0
    window: int = 0
    pack: int = 0


def shuffled(n: int, *identity: object) -> np.ndarray:
    """A permutation of 0 .. n-1, int64, that depends on `identity` only.

    Sorts raw Philox output, whose stream numpy guarantees across versions (unlike `Generator.permutation`).
    """
    key = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=16).digest()
    draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(draws, kind="stable")


def epoch_order(lengths: np.ndarray, seq_length: int, seed: int, epoch: int) -> np.ndarray:
    """uids of the documents that fit into seq_length, in the epoch's order."""
    order = shuffled(len(lengths), seed, epoch, "documents")
    fitting: np.ndarray = order[lengths[order] <= seq_length]
    return fitting


def best_fit(uids: np.ndarray, lengths: np.ndarray, seq_length: int) -> list[Pack]:
    """Best-fit decreasing: each document, longest first, goes to the fullest row with room for it.

    `lengths` is indexed by uid. O(n log seq_length): rows are kept by the room left in them.
    """
    packs: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted keys of rows_by_room
    decreasing = uids[np.argsort(-lengths[uids], kind="stable")]
    for uid, length in zip(decreasing.tolist(), lengths[decreasing].tolist(), strict=True):
        i = bisect_left(rooms, length)
        if i == len(rooms):
            row, room = len(packs), seq_length
            packs.append([])
        else:
            room = rooms[i]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[i], rows_by_room[room]
        packs[row].append(uid)
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            rooms.insert(bisect_left(rooms, left), left)
        rows_by_room[left].append(row)
    return [tuple(pack) for pack in packs]


def pack_window(
    order: np.ndarray, lengths: np.ndarray, seq_length: int, seed: int, epoch: int, window: int, size: int
) -> list[Pack]:
    """Packs of one window of an epoch's order, themselves shuffled: best-fit puts the longest documents first."""
    packs = best_fit(order[window * size : (window + 1) * size], lengths, seq_length)
    return [packs[i] for i in shuffled(len(packs), seed, epoch, window, "packs")]


def plan_window(
    lengths: np.ndarray, seq_length: int, seed: int, epoch: int, window: int, window_size: int
) -> list[Pack]:
    """The packs of one window from nothing but its coordinates; `Plan` gives the same, and keeps the epoch's order."""
    order = epoch_order(lengths, seq_length, seed, epoch)
    return pack_window(order, lengths, seq_length, seed, epoch, window, window_size)


class Plan:
    """The endless sequence of packs. `lengths` int64 [N]: tokens of each document, indexed by uid.

    `images` float64 [N]: how many images of each a vision encoder reads; None where there is none.
    Documents longer than `seq_length` are left out (`megatron_mm.data.dataset` writes them to the ledger or refuses).
    """

    def __init__(self, lengths: np.ndarray, seq_length: int, seed: int, window: int, images: np.ndarray | None = None):
        assert (lengths <= seq_length).any(), "no document fits"
        self.images = images
        self.lengths, self.seq_length, self.seed, self.window = lengths, seq_length, seed, window
        self.documents = int((lengths <= seq_length).sum())
        self.windows: float = -(-self.documents // window)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._packs: tuple[tuple[int, int], list[Pack]] = ((-1, -1), [])

    @property
    def fingerprint(self) -> str:
        """Equal for two plans only if they yield the same packs: what a data state must be resumed with."""
        digest = hashlib.blake2b(f"{self.seq_length}/{self.seed}/{self.window}/".encode(), digest_size=8)
        digest.update(self.lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def packs(self, epoch: int, window: int) -> list[Pack]:
        """All packs of one window."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.lengths, self.seq_length, self.seed, epoch))
        if self._packs[0] != (epoch, window):
            args = self.lengths, self.seq_length, self.seed, epoch, window, self.window
            self._packs = ((epoch, window), pack_window(self._epoch[1], *args))
        return self._packs[1]

    def rows(self, epoch: int, window: int) -> list[tuple[Pack, Pack]]:
        """All packs of one window, each with the epochs that its documents' random streams are of."""
        return [(pack, (epoch,) * len(pack)) for pack in self.packs(epoch, window)]

    def walk(self, start: Position) -> Iterator[tuple[Pack, Pack, Position]]:
        """(pack, epochs of its documents, position of the next pack) from `start` on, across windows and epochs, for
        ever."""
        at = start
        while True:
            rows = self.rows(at.epoch, at.window)
            last = at.window + 1 >= self.windows
            following = Position(at.epoch + 1) if last else Position(at.epoch, at.window + 1)
            for i in range(at.pack, len(rows)):
                at = replace(at, pack=i + 1) if i + 1 < len(rows) else following
                yield *rows[i], at
            at = following
