"""The shapes of an index's samples: few different ones stand for many samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_mm.data.index import ENDS, LOSS, Index
from megatron_mm.data.shape import ImagePart, Part, Shape, TextPart

Grid = Callable[[int, int], tuple[int, int]]
"""Rows and columns of what a picture of so many pixels, height and width, becomes (`ImageCodec.grid`)."""


def shapes_of(index: Index, task: str, grid: Grid) -> tuple[list[Shape], np.ndarray]:
    """The different shapes in an index, and which of them each sample has: int64 [N].

    Args:
        task: of all samples, as in `Sample`.
    """
    counts = np.diff(index.segments)
    which = np.zeros(len(index), dtype=np.int64)
    every = np.column_stack([index.tokens, index.flags, _grids(index, grid)])
    shapes: list[Shape] = []
    for count in np.unique(counts).tolist():
        samples = np.flatnonzero(counts == count)
        segments = every[index.segments[samples][:, None] + np.arange(count)].reshape(len(samples), -1)
        different, inverse = np.unique(segments, axis=0, return_inverse=True)
        which[samples] = len(shapes) + inverse.reshape(-1)
        shapes += [_shape(row, task) for row in different.reshape(len(different), count, -1).tolist()]
    return shapes, which


def _grids(index: Index, grid: Grid) -> np.ndarray:
    """Rows and columns of each segment that is an image: int64 [T, 2], 0 of a text."""
    grids = np.zeros((len(index.tokens), 2), dtype=np.int64)
    pictures = np.ones(len(index.heights), dtype=bool)
    pictures[index.starts[:-1]] = False
    if pictures.any():
        sizes = np.column_stack([index.heights, index.widths])[pictures]
        different, inverse = np.unique(sizes, axis=0, return_inverse=True)
        grids[index.tokens < 0] = np.array([grid(*size) for size in different.tolist()])[inverse.reshape(-1)]
    return grids


def _shape(segments: list[tuple[int, int, int, int]], task: str) -> Shape:
    parts: list[Part] = []
    for number, (tokens, flags, rows, columns) in enumerate(segments):
        if tokens < 0:
            parts.append(ImagePart(number, rows, columns, bool(flags & LOSS)))
        else:
            parts.append(TextPart(number, tokens, bool(flags & LOSS), ends=bool(flags & ENDS)))
    return Shape(tuple(parts), task)
