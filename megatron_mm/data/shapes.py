"""The shapes of an index's samples: few different ones stand for many samples."""

from __future__ import annotations

import numpy as np

from megatron_mm.config.model import ImageConfig
from megatron_mm.data.index import ENDS, LOSS, Index
from megatron_mm.data.shape import ImagePart, Part, Shape, TextPart


def shapes_of(index: Index, task: str, image: ImageConfig) -> tuple[list[Shape], np.ndarray]:
    """The different shapes in an index, and which of them each sample has: int64 [N].

    Args:
        task: of all samples, as in `Sample`. image: size of all images.
    """
    counts = np.diff(index.segments)
    which = np.zeros(len(index), dtype=np.int64)
    shapes: list[Shape] = []
    for count in np.unique(counts).tolist():
        samples = np.flatnonzero(counts == count)
        segments = index.segments[samples][:, None] + np.arange(count)
        kinds = np.stack([index.tokens[segments], index.flags[segments]], axis=-1).reshape(len(samples), 2 * count)
        different, inverse = np.unique(kinds, axis=0, return_inverse=True)
        which[samples] = len(shapes) + inverse.reshape(-1)
        shapes += [_shape(row, task, image) for row in different.reshape(len(different), count, 2).tolist()]
    return shapes, which


def _shape(segments: list[tuple[int, int]], task: str, image: ImageConfig) -> Shape:
    parts: list[Part] = []
    for number, (tokens, flags) in enumerate(segments):
        if tokens < 0:
            parts.append(ImagePart(number, image.height, image.width, bool(flags & LOSS)))
        else:
            parts.append(TextPart(number, tokens, bool(flags & LOSS), ends=bool(flags & ENDS)))
    return Shape(tuple(parts), task)
