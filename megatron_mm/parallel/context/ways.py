"""The ways in which ranks may meet each other's keys, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.config.validate import heads_divide
from megatron_mm.parallel.context.assignment import Assignment, assign, chunk_areas, contiguous
from megatron_mm.parallel.context.predict import Hardware, Prediction, Work, estimated_pairs, predict
from megatron_mm.parallel.context.schedule import Needs, Stage, exchange, needs, ring


@dataclass(frozen=True)
class Meeting:
    """How the ranks of one micro-batch meet: `inner` neighbours swap positions for heads and share one rank of `needs`,
    whose keys travel by `ring` (relays) or `exchange`."""

    needs: Needs
    relays: bool
    inner: int

    def stages(self, rank: int) -> list[Stage]:
        """What a rank of `needs` does."""
        return (ring if self.relays else exchange)(self.needs, rank)

    def digest(self) -> bytes:
        """The same on two ranks if they would meet."""
        cut = self.needs.assignment
        decided = [[self.inner, self.relays, cut.chunk_size], cut.chunks, self.needs.head, self.needs.tail]
        return blake2b(b"".join(np.asarray(each, np.int64).tobytes() for each in decided), digest_size=16).digest()


@dataclass(frozen=True)
class Ways:
    """Those that a run may choose from, a pair (inner, relays) each, for `ranks` context-parallel ranks."""

    ranks: int
    options: tuple[tuple[int, bool], ...]
    work: Work
    hardware: Hardware

    @staticmethod
    def of(parallel: ParallelConfig, works: Sequence[Work], hardware: Hardware) -> Ways:
        """Those of `parallel.context_parallel_comm`; for `auto` all that the heads permit. `works`: of all kinds of
        layers that attend, the trunk's first, whose time counts."""
        ranks = parallel.context_parallel_size
        named = {
            "ring": [(1, True)],
            "exchange": [(1, False)],
            "ulysses": [(ranks, False)],
            "hybrid": [(parallel.ulysses_size or 1, True)],
        }
        inners = [
            inner
            for inner in sorted({min(hardware.node_size, ranks), ranks})
            if 1 < inner <= ranks
            and ranks % inner == 0
            and all(heads_divide(work.heads, work.key_heads, 1, inner) for work in works)
        ]
        every = [(1, False), (1, True), *((inner, relays) for inner in inners for relays in (False, True))]
        return Ways(ranks, tuple(named.get(parallel.context_parallel_comm, every)), works[0], hardware)

    @property
    def inner_sizes(self) -> list[int]:
        return sorted({inner for inner, _ in self.options})

    def describe(self) -> str:
        """A line for the log."""
        names = list(dict.fromkeys(self.name(*option) for option in self.options))
        return names[0] if len(names) == 1 else f"the fastest by prediction of {', '.join(names)}"

    def name(self, inner: int, relays: bool) -> str:
        if inner == self.ranks:
            return "ulysses"
        return ("ring" if relays else "exchange") + (f" over ulysses of {inner}" if inner > 1 else "")

    def best(self, mask: np.ndarray) -> Meeting:
        """The way that is predicted to take the least time for rows with this mask, int32 [B, 2 or 3, S]; the same on
        every rank. Where there is a choice, contiguous parts are one too: out of balance, but little has to travel."""
        balanced = {inner: needs(mask, self.assign(mask, inner)) for inner in self.inner_sizes}
        meetings = [Meeting(balanced[inner], relays, inner) for inner, relays in self.options]
        if len(meetings) == 1:
            return meetings[0]
        meetings.append(Meeting(needs(mask, contiguous(mask.shape[2], self.ranks)), False, 1))
        return min(meetings, key=lambda meeting: self.predict(mask, meeting).total)

    def assign(self, mask: np.ndarray, inner: int) -> Assignment:
        """Balanced parts for groups of `inner` neighbours, which keep to nodes where whole groups fill them."""
        return assign(mask, self.ranks // inner, max(self.hardware.node_size // inner, 1))

    def predict(self, mask: np.ndarray, meeting: Meeting) -> Prediction:
        assignment = meeting.needs.assignment
        loads = chunk_areas(mask, assignment.chunk_size)[assignment.chunks].sum(1)
        pairs = estimated_pairs(meeting.needs, loads)
        return predict(meeting.needs, pairs, meeting.relays, self.work, self.hardware, meeting.inner)


def positions(assignment: Assignment, inner: int) -> list[np.ndarray]:
    """Positions of every context rank, ascending: `inner` neighbours have one part of the assignment, cut in a row."""
    return [share for rank in range(assignment.ranks) for share in np.split(assignment.positions(rank), inner)]
