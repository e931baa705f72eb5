"""The interval mask: three integers per position say all that any family's attention allows, packed or not.

    allowed(q, k) = lo[q] <= k < hi[q]  and  q < until[k]

A mask is an int32 array [3, n] with rows lo, hi, until. lo and hi never decrease, so the keys that a block of queries
needs form one range and nothing of size n x n is ever built (`dense` is for tests and pictures). Constructors make the
mask of one document in coordinates of its own; `concatenate` packs documents into a row.

Spans are half-open pairs (first, end), in order and not overlapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Spans = Iterable[tuple[int, int]]


def causal(n: int) -> np.ndarray:
    """Every position sees itself and what comes before it: int32 [3, n]."""
    position = np.arange(n, dtype=np.int32)
    return np.stack([np.zeros_like(position), position + 1, np.full_like(position, n)])


def with_spans(n: int, spans: Spans) -> np.ndarray:
    """Causal text with bidirectional spans: a position in [a, b) sees everything before b. int32 [3, n]."""
    mask = causal(n)
    for first, end in spans:
        mask[1, first:end] = end
    return mask


def full(n: int) -> np.ndarray:
    """Every position sees the whole document: int32 [3, n]."""
    return with_spans(n, [(0, n)])


def prefix(n: int, length: int) -> np.ndarray:
    """A bidirectional prefix of `length` positions, causal behind it: int32 [3, n]."""
    return with_spans(n, [(0, length)])


def window(mask: np.ndarray, width: int) -> np.ndarray:
    """`mask` with no key further back than `width - 1` positions: int32 [3, n]."""
    lo, hi, until = mask
    reach = np.arange(mask.shape[1], dtype=np.int32) - (width - 1)
    return np.stack([np.minimum(np.maximum(lo, reach), hi), hi, until])


def hide_after(mask: np.ndarray, spans: Spans) -> np.ndarray:
    """`mask` in which nothing behind a span sees the span (noised copies): int32 [3, n]."""
    hidden = mask.copy()
    for first, end in spans:
        hidden[2, first:end] = end
    return hidden


def concatenate(masks: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Documents side by side in a row of `length` positions; the rest is padding, which sees and is seen by nothing.

    Returns int32 [3, length]; keys that nothing hides have until = length.

    Raises:
        ValueError: the documents do not fit.
    """
    used = sum(mask.shape[1] for mask in masks)
    if used > length:
        raise ValueError(f"{len(masks)} documents of {used} tokens in all do not fit into a row of {length}.")
    row = np.empty((3, length), dtype=np.int32)
    row[:2, used:] = used
    row[2] = length
    offset = 0
    for mask in masks:
        n = mask.shape[1]
        row[:2, offset : offset + n] = mask[:2] + offset
        row[2, offset : offset + n] = np.where(mask[2] < n, mask[2] + offset, length)
        offset += n
    return row


def dense(mask: np.ndarray) -> np.ndarray:
    """The mask written out: bool [n, n], rows are queries. For tests and pictures."""
    lo, hi, until = mask
    position = np.arange(mask.shape[1])
    query, key = position[:, None], position[None, :]
    allowed: np.ndarray = (lo[:, None] <= key) & (key < hi[:, None]) & (query < until[None, :])
    return allowed


def area(mask: np.ndarray) -> int:
    """How many (query, key) pairs the mask allows, exactly, in O(n log n)."""
    lo, hi, until = mask
    key = np.arange(mask.shape[1])
    # lo and hi never decrease, so the queries whose interval holds a key are a range as well.
    first = np.searchsorted(hi, key, side="right")
    end = np.minimum(np.searchsorted(lo, key, side="right"), until)
    return int(np.maximum(end - first, 0).sum())


def validate(mask: np.ndarray) -> None:
    """Check what every reader of a mask relies on.

    Raises:
        ValueError: `mask` is not int32 [3, n], leaves [0, n], has lo > hi, or lo or hi decreases somewhere.
    """
    if mask.dtype != np.int32 or mask.ndim != 2 or mask.shape[0] != 3:
        raise ValueError(f"A mask is int32 [3, n], this is {mask.dtype} {list(mask.shape)}.")
    lo, hi, _ = mask
    n = mask.shape[1]
    for name, broken in (
        (f"a value outside [0, {n}]", (mask < 0).any(axis=0) | (mask > n).any(axis=0)),
        ("lo > hi", lo > hi),
        ("lo smaller than the position before", np.diff(lo, prepend=0) < 0),
        ("hi smaller than the position before", np.diff(hi, prepend=0) < 0),
    ):
        if broken.any():
            raise ValueError(f"The mask has {name} at position {int(np.argmax(broken))}.")
