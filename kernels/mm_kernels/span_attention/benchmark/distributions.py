"""Named, seeded masks that attention is measured on: what rows of packed training documents look like.

| name        | what                                                                                                |
|-------------|-----------------------------------------------------------------------------------------------------|
| full        | every position sees the whole row                                                                   |
| causal      | one causal document                                                                                 |
| docs        | packed causal documents, log-normal lengths (median 1024, sigma 1)                                  |
| interleaved | such documents with image spans of 256 or 1024 positions between runs of text, half of all tokens   |
| t2i         | packed pairs: a caption of 16 to 128 positions and one image of 256 or 1024                         |
| prefix      | such documents, each with a bidirectional prefix of a uniform part of it                            |
| mmada       | such documents, each bidirectional as a whole                                                       |
| window      | one causal document, every position sees 1024                                                       |
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

MEDIAN, SIGMA = 1024, 1.0
IMAGES = (256, 1024)
CAPTION = (16, 128)
WINDOW = 1024

Spans = list[tuple[int, int]]


def mask(name: str, length: int, row: int = 0) -> np.ndarray:
    """Rows lo and hi of a distribution's mask, int32 [2, length]; `row` draws another one. Nothing is hidden.

    Raises:
        ValueError: there is no such distribution.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"There is no distribution {name!r}; use one of {', '.join(DISTRIBUTIONS)}.")
    return DISTRIBUTIONS[name](length, np.random.default_rng([zlib.crc32(name.encode()), length, row]))


def documents(intervals: np.ndarray) -> np.ndarray:
    """Where documents start and the row ends, int32 [documents + 1]: nothing sees across these places."""
    lo, hi = intervals
    position = np.arange(len(lo))
    seen_before = np.maximum.accumulate(np.append(0, hi[:-1]))
    starts = np.flatnonzero((lo == position) & (seen_before <= position))
    return np.append(starts, len(lo)).astype(np.int32)


def area(intervals: np.ndarray) -> int:
    """How many (query, key) pairs are allowed."""
    return int(np.maximum(intervals[1].astype(np.int64) - intervals[0], 0).sum())


def _document(start: int, length: int, spans: Spans) -> np.ndarray:
    """A causal document with bidirectional spans, in row coordinates."""
    hi = np.arange(1, length + 1)
    for first, end in spans:
        hi[first:end] = min(end, length)
    rows: np.ndarray = np.stack([np.full(length, start), hi + start]).astype(np.int32)
    return rows


def _pack(
    length: int, rng: np.random.Generator, draw: Callable[[np.random.Generator], tuple[int, Spans]]
) -> np.ndarray:
    """Documents side by side until the row is full; the last one is cut."""
    parts, used = [], 0
    while used < length:
        n, spans = draw(rng)
        n = min(n, length - used)
        parts.append(_document(used, n, [span for span in spans if span[0] < n]))
        used += n
    return np.concatenate(parts, axis=1)


def _lognormal(rng: np.random.Generator) -> int:
    return max(16, int(rng.lognormal(np.log(MEDIAN), SIGMA)))


def _interleaved(rng: np.random.Generator) -> tuple[int, Spans]:
    wanted, used, spans = _lognormal(rng), 0, []
    while used < wanted:
        image = int(rng.choice(IMAGES))
        used += 1 + int(rng.exponential(np.mean(IMAGES)))
        spans.append((used, used + image))
        used += image
    return used, spans


def _pair(rng: np.random.Generator) -> tuple[int, Spans]:
    caption, image = int(rng.integers(CAPTION[0], CAPTION[1] + 1)), int(rng.choice(IMAGES))
    return caption + image, [(caption, caption + image)]


def _prefixed(rng: np.random.Generator) -> tuple[int, Spans]:
    n = _lognormal(rng)
    return n, [(0, int(rng.integers(1, n + 1)))]


def _bidirectional(rng: np.random.Generator) -> tuple[int, Spans]:
    n = _lognormal(rng)
    return n, [(0, n)]


def _window(length: int, rng: np.random.Generator) -> np.ndarray:
    lo, hi = _document(0, length, [])
    return np.stack([np.maximum(lo, hi - WINDOW), hi])


Draw = Callable[[int, np.random.Generator], np.ndarray]
DISTRIBUTIONS: dict[str, Draw] = {
    "full": lambda length, rng: _document(0, length, [(0, length)]),
    "causal": lambda length, rng: _document(0, length, []),
    "docs": lambda length, rng: _pack(length, rng, lambda r: (_lognormal(r), [])),
    "interleaved": lambda length, rng: _pack(length, rng, _interleaved),
    "t2i": lambda length, rng: _pack(length, rng, _pair),
    "prefix": lambda length, rng: _pack(length, rng, _prefixed),
    "mmada": lambda length, rng: _pack(length, rng, _bidirectional),
    "window": _window,
}
