"""The shape of a document: kinds, sizes and roles of its segments, without their content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.types import Sample, Segment, TextSegment


@dataclass(frozen=True)
class TextPart:
    """A run of text.

    source: which segment of the sample it is. loss: whether it is learnt. blank: padding stands in its place (a
    condition that is left out). ends: EOS stands behind it (a turn of a conversation).
    """

    source: int
    tokens: int
    loss: bool = True
    blank: bool = False
    ends: bool = False


@dataclass(frozen=True)
class ImagePart:
    """An image of `height` x `width` pixels, latents or codes, in the unit of `model.image`.

    loss: whether the data lets it be learnt. drawn: whether it is what the document teaches to draw; set by a family's
    choice, and by sampling.
    """

    source: int
    height: int
    width: int
    loss: bool = True
    drawn: bool = False


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Shape:
    """Parts in the order in which they stand.

    task: as in `Sample`. begins, ends: False for a piece of a longer document that others precede or follow, which has
    no BOS or no EOS. conditioned: False where what an image is drawn from has been left out.
    """

    parts: tuple[Part, ...]
    task: str = "auto"
    begins: bool = True
    ends: bool = True
    conditioned: bool = True

    @property
    def texts(self) -> tuple[TextPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def learns_text(self) -> bool:
        return any(part.loss for part in self.texts)

    @property
    def draws(self) -> bool:
        """Whether it is text to image: one image, drawn, at the end, and only text before it."""
        return [part.drawn for part in self.images] == [True] and isinstance(self.parts[-1], ImagePart)

    @property
    def reads(self) -> bool:
        """Whether it is image to text: images to be looked at, and behind all of them text."""
        count = len(self.images)
        ordered = all(isinstance(part, ImagePart) and not part.drawn for part in self.parts[:count])
        return 0 < count < len(self.parts) and ordered

    @property
    def pair(self) -> tuple[TextPart, ImagePart] | None:
        """Caption and image of a document that has nothing else, in whatever order, and gives neither."""
        whole = self.begins and self.ends and len(self.texts) == len(self.images) == 1
        return (self.texts[0], self.images[0]) if whole and self.texts[0].loss and self.images[0].loss else None

    def of(self, parts: Iterable[Part], **changes: Any) -> Shape:
        """The same with other parts."""
        return replace(self, parts=tuple(parts), **changes)


def shape_of(sample: Sample) -> Shape:
    """The shape of a sample."""
    parts = tuple(part_of(segment, number) for number, segment in enumerate(sample.segments))
    return Shape(parts, sample.task, sample.begins, sample.ends)


def part_of(segment: Segment, number: int) -> Part:
    """The shape of a sample's segment."""
    if isinstance(segment, TextSegment):
        return TextPart(number, len(segment.ids), segment.loss, ends=segment.ends)
    height, width = segment.data.shape[-2:]
    return ImagePart(number, height, width, segment.loss)
