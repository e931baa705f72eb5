"""Documents longer than a row, cut into pieces: at the borders of segments, and inside a text that is too long itself
at the borders of its tokens; never inside an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mm.data.shape import ImagePart, Part, Shape
from megatron_mm.types import Sample, Segment, TextSegment

Cut = tuple[int, int, int]
"""(segment of the sample, its first token, the one behind its last); both are 0 for an image."""


@dataclass(frozen=True)
class Piece:
    """Segments, or parts of them, of a longer document; begins, ends: whether the document begins or ends with them."""

    cuts: tuple[Cut, ...]
    begins: bool
    ends: bool

    def of(self, sample: Sample) -> Sample:
        """The piece as a sample of its own."""
        segments: list[Segment] = []
        for source, first, end in self.cuts:
            segment = sample.segments[source]
            if isinstance(segment, TextSegment):
                last = end == len(segment.ids)
                segment = replace(segment, ids=segment.ids[first:end], ends=segment.ends and last)
            segments.append(segment)
        return replace(sample, segments=tuple(segments), begins=self.begins, ends=self.ends)

    def shape(self, whole: Shape) -> Shape:
        """The piece's shape, of the whole document's."""
        parts = [
            _part(whole.parts[source], number, first, end) for number, (source, first, end) in enumerate(self.cuts)
        ]
        return whole.of(parts, begins=self.begins, ends=self.ends)


@dataclass(frozen=True)
class Pieces:
    """What the documents of a plan are where some samples are cut up.

    samples int64 [P]: the sample that a document is of. cut: documents that are pieces, by their number.
    """

    samples: np.ndarray
    cut: dict[int, Piece]

    def read(self, uid: int, read: Callable[[int, Collection[int] | None], Sample]) -> Sample:
        """Document `uid`, of the sample that `read` gives, with the segments that are wanted (None: all)."""
        piece = self.cut.get(uid)
        wanted = {source for source, _, _ in piece.cuts} if piece else None
        sample = replace(read(int(self.samples[uid]), wanted), uid=uid)
        return piece.of(sample) if piece else sample


def cut_up(shape: Shape, fits: Callable[[Shape], bool]) -> list[Piece]:
    """The pieces of a document of this shape that teach anything, each as long as it `fits`; none where one of its
    images does not."""
    rest = deque((number, 0, getattr(part, "tokens", 0)) for number, part in enumerate(shape.parts))
    pieces: list[Piece] = []
    current: list[Cut] = []

    def piece(cuts: Sequence[Cut], behind: bool) -> Piece:
        return Piece(tuple(cuts), shape.begins and not pieces, shape.ends and not behind)

    while rest:
        number, first, end = rest.popleft()
        if fits(piece([*current, (number, first, end)], bool(rest)).shape(shape)):
            current.append((number, first, end))
        elif current:
            pieces.append(piece(current, True))
            current = []
            rest.appendleft((number, first, end))
        else:
            most = _most(lambda n: fits(piece([(number, first, first + n)], True).shape(shape)), end - first - 1)  # noqa: B023
            if most == 0 or isinstance(shape.parts[number], ImagePart):
                return []
            pieces.append(piece([(number, first, first + most)], True))
            rest.appendleft((number, first + most, end))
    pieces.append(piece(current, False))
    return [each for each in pieces if any(part.loss for part in each.shape(shape).parts)]


def _part(part: Part, number: int, first: int, end: int) -> Part:
    if isinstance(part, ImagePart):
        return replace(part, source=number)
    return replace(part, source=number, tokens=end - first, ends=part.ends and end == part.tokens)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
