"""One document that is being continued: its randomness, and what stands in it so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Part, Shape, TextPart, part_of
from megatron_mm.types import ImageSegment, Sample, Segment, TextSegment

AUTO, TEXT, IMAGE = "auto", "text", "image"
"""What may be written."""


@dataclass(frozen=True)
class Request:
    """One continuation to sample. `write`: what, in order. `streams` depend on (seed, prompt's ordinal, sample number)
    and on nothing else. `grid`: rows and columns of images to be drawn, in the unit of `model.image`."""

    prompt: Sample
    write: tuple[str, ...]
    streams: Streams
    grid: tuple[int, int]


class Row:
    """A request at work in row `index` of the cache.

    `document`: the prompt with what has been written. `plan`: what is still to be written; `auto` goes on until the
    model ends the document. `text`: ids of the text at work, of which `seen` has all that the document holds.
    """

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.document = request.prompt
        self.plan = list(request.write)
        self.text: list[int] = []
        texts = [segment for segment in request.prompt.segments if isinstance(segment, TextSegment)]
        self.seen: list[int] = [token for text in texts for token in text.ids.tolist()]
        self.new_tokens = self.images = 0
        self._draws = request.streams.generator("text")

    @property
    def auto(self) -> bool:
        return self.plan[-1:] == [AUTO]

    @property
    def written(self) -> list[Segment]:
        """What has been written, in order."""
        return list(self.document.segments[len(self.request.prompt.segments) :])

    def shape(self, following: str) -> Shape:
        """The document so far, with the text or image that comes next."""
        given = len(self.request.prompt.segments)
        parts: list[Part] = []
        for number, segment in enumerate(self.document.segments):
            parts.append(replace(part_of(segment, number), loss=number >= given))
        last = len(parts)
        image = ImagePart(last, *self.request.grid, drawn=True)
        return Shape((*parts, image if following == IMAGE else TextPart(last, 0)))

    def draw(self) -> float:
        """The row's next draw from [0, 1)."""
        return self._draws.random()

    def draws(self, count: int) -> np.ndarray:
        """The next `count` of them: float64 [count]."""
        return self._draws.random(count)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 for the image that comes next."""
        return self.image_stream().standard_normal(shape, dtype=np.float32)

    def image_stream(self) -> np.random.Generator:
        """All randomness of the image that comes next, from its start."""
        return self.request.streams.generator("image", self.images)

    def add_text(self, token: int) -> None:
        self.text.append(token)
        self.seen.append(token)
        self.new_tokens += 1

    def finish_text(self) -> None:
        """The text at work, if it has any token, becomes a segment; the plan goes on."""
        if self.text:
            self._append(TextSegment(np.array(self.text, dtype=np.int64)))
        self.text = []
        if not self.auto:
            self.new_tokens = 0
            self.plan = self.plan[1:]

    def add_image(self, segment: ImageSegment) -> None:
        self._append(segment)
        self.images += 1
        self.plan = self.plan[1:]

    def _append(self, segment: Segment) -> None:
        self.document = replace(self.document, segments=(*self.document.segments, segment))
