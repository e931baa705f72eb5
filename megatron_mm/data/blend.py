"""A blend: the plan of several sources, each of which walks its own endless sequence of shuffled passes.

Window k takes from a source what lies between k and k + 1 times its quota, counted in tokens or in documents along its
sequence; a document belongs where its middle lies. So every document of a source comes exactly once in a pass, and a
window follows from its number alone: there are no counters to carry, and windows have no end, and no epochs.
Memory: 24 bytes a document for the pass of each source that is under way, and the packs of one window, which holds
data.window documents on average.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from megatron_mm.data.plan import Pack, Plan, best_fit, shuffled


class Blend(Plan):
    """As `Plan`, over the concatenation of sources.

    sizes: documents of each source; their sum is N. weights: shares of the sources, of any sum.
    by: "tokens" or "samples", what the weights are shares of.
    """

    def __init__(
        self, lengths: np.ndarray, seq_length: int, seed: int, window: int, sizes: Sequence[int],
        weights: Sequence[float], by: str, images: np.ndarray | None = None,
    ):  # fmt: skip
        super().__init__(lengths, seq_length, seed, window, images)
        self.windows = math.inf
        ends = np.cumsum(sizes)
        self._weights, self._by = tuple(weights), by
        self._sources = [
            _Source(number, int(end) - size, lengths[end - size : end], seq_length, seed, by)
            for number, (end, size) in enumerate(zip(ends, sizes, strict=True))
        ]
        # Documents that a unit of weight brings, so that a window holds `window` of them on average.
        rate = sum(w * source.documents / source.total for w, source in zip(weights, self._sources, strict=True))
        self._quotas = [w * window / rate for w in weights]
        self._rows: tuple[int, list[tuple[Pack, Pack]]] = (-1, [])

    @property
    def fingerprint(self) -> str:
        sizes = [len(source.lengths) for source in self._sources]
        identity = f"{super().fingerprint}/{sizes}/{self._weights}/{self._by}"
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def packs(self, epoch: int, window: int) -> list[Pack]:
        return [uids for uids, _ in self.rows(epoch, window)]

    def rows(self, epoch: int, window: int) -> list[tuple[Pack, Pack]]:
        assert epoch == 0, "the windows of a blend have no end"
        if self._rows[0] != window:
            self._rows = (window, self._plan_window(window))
        return self._rows[1]

    def _plan_window(self, window: int) -> list[tuple[Pack, Pack]]:
        taken = [
            source.between(window * quota, (window + 1) * quota)
            for source, quota in zip(self._sources, self._quotas, strict=True)
        ]
        uids, passes = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
        mixed = shuffled(len(uids), self.seed, window, "blend")
        uids, passes = uids[mixed], passes[mixed]
        # A document may come twice in a window, from two passes: it is packed by its place here.
        packs = best_fit(np.arange(len(uids)), self.lengths[uids], self.seq_length)
        rows = [(tuple(uids[list(pack)].tolist()), tuple(passes[list(pack)].tolist())) for pack in packs]
        return [rows[i] for i in shuffled(len(rows), self.seed, window, "blended packs")]


class _Source:
    """One source's endless sequence. `total`: tokens or documents of a pass; overlong documents are in none."""

    def __init__(self, number: int, first: int, lengths: np.ndarray, seq_length: int, seed: int, by: str):
        self.lengths = lengths
        self._number, self._first, self._seed = number, first, seed
        fits = lengths <= seq_length
        self._spans = np.where(fits, lengths if by == "tokens" else 1, 0)
        self.documents, self.total = int(fits.sum()), int(self._spans.sum())
        assert self.documents, "no document of the source fits"
        self._pass: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0))

    def between(self, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """(uids, their passes), int64, of the documents whose middles lie in [start, end)."""
        uids, passes = [], []
        for number in range(int(start // self.total), int(end // self.total) + 1):
            order, middles = self._walk(number)
            low, high = np.searchsorted(middles, [start - number * self.total, end - number * self.total])
            uids.append(order[low:high])
            passes.append(np.full(high - low, number))
        return np.concatenate(uids), np.concatenate(passes)

    def _walk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """uids of a pass in its order, and the middles of their spans."""
        if self._pass[0] != number:
            order = shuffled(len(self.lengths), self._seed, number, "source", self._number)
            order = order[self._spans[order] > 0]
            spans = self._spans[order]
            self._pass = (number, order + self._first, np.cumsum(spans) - spans / 2)
        return self._pass[1], self._pass[2]
