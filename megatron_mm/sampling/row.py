"""One document that is being continued: its randomness and what has been written so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mm.data.corrupt import Streams
from megatron_mm.types import ImageSegment, Sample, Segment, TextSegment


@dataclass(frozen=True)
class Request:
    """One continuation to sample. `streams` depend on (seed, prompt's ordinal, sample number) and on nothing else."""

    prompt: Sample
    streams: Streams


class Row:
    """A request at work in row `index` of the cache.

    `seen` holds the document's text ids, prompt included; `codes` those of an image that is written token by token.
    """

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        texts = [segment for segment in request.prompt.segments if isinstance(segment, TextSegment)]
        self.seen: list[int] = [token for text in texts for token in text.ids.tolist()]
        self.codes: list[int] | None = None
        self.new_tokens = self.images = 0
        self._segments: list[Segment] = []
        self._text: list[int] = []
        self._draws = request.streams.generator("text")

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
        self._text.append(token)
        self.seen.append(token)
        self.new_tokens += 1

    def add_image(self, data: np.ndarray) -> None:
        """See `ImageSegment`."""
        self.finish().append(ImageSegment(data))
        self.images += 1

    def finish(self) -> list[Segment]:
        """What has been written, with the text so far as a segment."""
        if self._text:
            self._segments.append(TextSegment(np.array(self._text, dtype=np.int64)))
            self._text = []
        return self._segments
