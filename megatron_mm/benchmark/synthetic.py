"""Packed batches without data: documents are drawn, and laid out, planned and packed by a run's own code.

Lengths and kinds are seeded, so every variant of an experiment sees the same batches, of real masks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_mm.config.compose import Config
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.loader import StepLoader
from megatron_mm.data.plan import Plan
from megatron_mm.data.shape import ImagePart, Shape, shape_of
from megatron_mm.documents.builder import Builder
from megatron_mm.families.base import Family
from megatron_mm.types import ImageSegment, PackedBatch, Sample, Segment, TextSegment

KINDS = {"pair": 0.5, "interleaved": 0.3, "text": 0.2}
MEDIAN_TOKENS = {"pair": 32, "interleaved": 128, "text": 512}
"""Of a run of text; lengths are log-normal with sigma 0.8."""
MOST_IMAGES = 5
"""Of an interleaved document; at least 2."""


class SyntheticSamples:
    """A reader, as `data.sample.SampleReader`, of documents that are drawn from their number alone: a caption and an
    image, text with 2 to 5 images in it, or plain text. Images are noise in the form that the family takes."""

    def __init__(self, config: Config, family: Family, text_vocab_size: int):
        self._image, self._family, self._seed = config.model.image, family, config.train.seed
        self._words = min(text_vocab_size, family.vocab.text_size)

    def read(self, uid: int) -> Sample:
        rng = Streams(self._seed, uid, 0).generator("synthetic")
        kind = rng.choice(list(KINDS), p=list(KINDS.values()))
        images = {"pair": 1, "text": 0}.get(kind, int(rng.integers(2, MOST_IMAGES + 1)))
        segments: list[Segment] = []
        for _ in range(max(images, 1)):
            length = 1 + int(rng.lognormal(np.log(MEDIAN_TOKENS[kind]), 0.8))
            segments.append(TextSegment(rng.integers(self._words, size=length)))
            if images:
                segments.append(self._draw_image(rng))
        return Sample(uid, f"{kind}-{uid}", tuple(segments))

    def length(self, sample: Sample) -> int:
        return Builder(self._family).length(shape_of(sample))

    def _draw_image(self, rng: np.random.Generator) -> ImageSegment:
        side = self._family.encoder_side
        seen = rng.uniform(-1, 1, (3, side, side)).astype(np.float32) if side else None
        if codes := self._family.image_codes:
            return ImageSegment(rng.integers(codes, size=(self._image.height, self._image.width)), seen)
        shape = (self._image.channels, self._image.height, self._image.width)
        return ImageSegment(rng.standard_normal(shape, dtype=np.float32), seen)


def rank_steps(
    config: Config, family: Family, text_vocab_size: int, replicas: int, most: int | None = None
) -> list[PackedBatch]:
    """The micro-batches that one of `replicas` data-parallel ranks has in a step, at most so many: drawn for it alone.

    Raises:
        ValueError: see `synthetic_steps`.
    """
    train = config.train
    count = train.global_batch_size // train.micro_batch_size // replicas
    rows = min(count, most or count) * train.micro_batch_size
    alone = replace(config, train=replace(train, global_batch_size=rows))
    return synthetic_steps(alone, family, text_vocab_size, 1)[0]


def synthetic_steps(config: Config, family: Family, text_vocab_size: int, count: int) -> list[list[PackedBatch]]:
    """The micro-batches of `count` optimizer steps, on the host.

    Raises:
        ValueError: hardly a document fits into data.seq_length.
    """
    samples = SyntheticSamples(config, family, text_vocab_size)
    train, seq_length = config.train, config.data.seq_length
    # Twice what is needed, since the last rows of a plan stay half empty.
    wanted = 2 * count * train.global_batch_size * seq_length
    lengths: list[int] = []
    fitting = 0
    while fitting < wanted:
        lengths.append(samples.length(samples.read(len(lengths))))
        fitting += lengths[-1] * (lengths[-1] <= seq_length)
        if len(lengths) >= 100 and fitting == 0:
            one_image = Shape((ImagePart(0, config.model.image.height, config.model.image.width),))
            raise ValueError(
                f"None of 100 documents fits into data.seq_length={seq_length}: an image alone takes "
                f"{Builder(family).length(one_image)} positions. Raise it."
            )
    plan = Plan(np.array(lengths), seq_length, train.seed, len(lengths))
    loader = StepLoader(
        plan, samples, Builder(family), config.data, train.seed, train.global_batch_size, train.micro_batch_size, 0, 1
    )  # fmt: skip
    steps = [next(loader).batches for _ in range(count)]
    loader.close()
    return steps
