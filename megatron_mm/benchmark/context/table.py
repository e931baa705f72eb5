"""Balance and bytes: what each way of spreading a row over ranks makes the slowest rank multiply, and all of them send.

| way | parts | what travels |
|---|---|---|
| ours | balanced (`assignment.assign`) | what receivers need, straight to them |
| ours, ring | the same | what receivers need, from neighbour to neighbour |
| contiguous | one after the other | what receivers need, straight to them |
| zigzag | a piece from the front, its mirror image from the back | what receivers need, straight to them |
| zigzag ring | the same | everything to everyone, from neighbour to neighbour (ring-flash-attention) |
| all-gather | the same | everything to everyone, at once (torchtitan, PyTorch) |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_mm.benchmark.context.arguments import Study
from megatron_mm.benchmark.context.counting import least_received
from megatron_mm.benchmark.context.masks import Masks
from megatron_mm.parallel.context.assignment import Assignment, assign, chunk_areas, contiguous, zigzag
from megatron_mm.parallel.context.predict import Hardware
from megatron_mm.parallel.context.schedule import Needs, exchange, needs, relayed_counts, ring

IMBALANCE, RATIO = 1.03, 1.1
"""Goals of `ours`: largest area over the mean, and keys received over the fewest possible."""
REPEATS = 5
"""Of a clock reading; the best counts."""


@dataclass(frozen=True)
class Line:
    """A line of table.csv. Shares are of the row's positions; times are None where nothing is planned."""

    distribution: str
    length: int
    ranks: int
    way: str
    chunk_size: int
    chunks: int
    """Of a rank."""
    imbalance: float
    """Largest area (allowed pairs) of a rank over the mean."""
    received: float
    """Share of the row whose keys come from other ranks, mean over ranks."""
    received_most: float
    least: float
    """The mean share that this assignment cannot do without, key by key."""
    ratio: float
    """received / least; 1 where both are 0."""
    assign_ms: float | None = None
    plan_ms: float | None = None
    """Needs of all ranks and stages of one."""

    @property
    def misses(self) -> bool:
        return self.imbalance > IMBALANCE or self.ratio > RATIO


def measure(study: Study, masks: Masks) -> Iterator[Line]:
    for length in study.lengths:
        for name in study.names:
            mask = masks.draw(name, length)
            for ranks in study.ranks:
                yield from lines(name, mask, ranks)


def lines(name: str, mask: np.ndarray, ranks: int) -> Iterator[Line]:
    """All ways of spreading rows with this mask, int32 [B, 2 or 3, S], over so many ranks."""
    length = mask.shape[2]
    balanced, assign_ms = _timed(partial(assign, mask, ranks, Hardware.node_size))
    for way, assignment in (
        ("ours", balanced),
        ("contiguous", contiguous(length, ranks)),
        ("zigzag", zigzag(length, ranks)),
    ):
        least = least_received(mask, assignment)
        needed = needs(mask, assignment)
        line = partial(_line, name, assignment, chunk_areas(mask, assignment.chunk_size), least)
        plan_ms = _timed(lambda spread=assignment: exchange(needs(mask, spread), ranks // 2))[1]
        yield line(way, _exchanged(needed), assign_ms if way == "ours" else None, plan_ms)
        if way == "ours":
            plan_ms = _timed(lambda spread=assignment: ring(needs(mask, spread), ranks // 2))[1]
            yield line("ours, ring", relayed_counts(needed).sum(1), assign_ms, plan_ms)
        if way == "zigzag":
            everything = np.full(ranks, length - assignment.part)
            yield line("zigzag ring", everything)
            yield line("all-gather", everything)


def _exchanged(needed: Needs) -> np.ndarray:
    """Keys that arrive at each rank: int64 [ranks]."""
    counts = needed.counts()
    arriving: np.ndarray = counts.sum(1) - counts.diagonal()
    return arriving


def _line(
    name: str,
    assignment: Assignment,
    areas: np.ndarray,
    least: np.ndarray,
    way: str,
    received: np.ndarray,
    assign_ms: float | None = None,
    plan_ms: float | None = None,
) -> Line:
    loads = areas[assignment.chunks].sum(1)
    length = assignment.part * assignment.ranks
    total, fewest = int(received.sum()), int(least.sum())
    return Line(
        distribution=name,
        length=length,
        ranks=assignment.ranks,
        way=way,
        chunk_size=assignment.chunk_size,
        chunks=assignment.chunks.shape[1],
        imbalance=float(loads.max() / loads.mean()),
        received=float(received.mean() / length),
        received_most=float(received.max() / length),
        least=float(least.mean() / length),
        ratio=total / fewest if fewest else (np.inf if total else 1.0),
        assign_ms=assign_ms,
        plan_ms=plan_ms,
    )


def _timed(call: Callable[[], object]) -> tuple:
    """(what it returns, milliseconds of the fastest of some calls)."""
    best = np.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return result, 1e3 * best
