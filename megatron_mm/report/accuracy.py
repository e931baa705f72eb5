"""What a model understood, measured on held-out captioned images: how it draws captions, and how it names images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.image_codec import PixelCodec
from megatron_mm.data.index import build_index
from megatron_mm.data.plan import shuffled
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.report.classifier import ImageClassifier
from megatron_mm.report.samples import picture_of
from megatron_mm.report.summary import Score
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import ImageSegment, Segment, TextSegment


@dataclass(frozen=True)
class Pair:
    """A real image uint8 [H, W, C] of class `label`, and its caption."""

    image: np.ndarray
    label: int
    caption: str


@dataclass(frozen=True)
class Drawn:
    """The image uint8 [H, W, C] generated for a pair's caption, and the class that the classifier sees in it."""

    pair: Pair
    image: np.ndarray
    recognised: int

    @property
    def right(self) -> bool:
        return self.recognised == self.pair.label


@dataclass(frozen=True)
class Captioned:
    """The caption generated for a pair's image."""

    pair: Pair
    caption: str

    @property
    def right(self) -> bool:
        return self.caption == self.pair.caption


def read_pairs(split: Path, tokenizer: Tokenizer, codec: PixelCodec, count: int, seed: int) -> list[Pair]:
    """At most `count` captioned images of a prepared split with labels, drawn without replacement."""
    index = build_index(split, tokenizer)
    reader = SampleReader(index, tokenizer, codec)
    pairs = np.flatnonzero((index.images == 1) & (index.texts == 1))
    samples = [reader.read(uid) for uid in pairs[shuffled(len(pairs), seed, split.name)[:count]].tolist()]
    return [
        Pair(codec.decode(_image(sample.segments).data), sample.meta["labels"][0], read_text(tokenizer, sample.segments))
        for sample in samples
    ]


def of_each_class(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The first `count` pairs of each class, class by class."""
    labels = sorted({pair.label for pair in pairs})
    return [pair for label in labels for pair in [p for p in pairs if p.label == label][:count]]


def draw(
    model: SamplingModel, pairs: Sequence[Pair], classifier: ImageClassifier, settings: SamplingConfig
) -> list[Drawn]:
    """One image for each pair's caption."""
    prompts = [[TextSegment(model.tokenizer.encode(pair.caption))] for pair in pairs]
    drawn = generate(model, prompts, "text_to_image", settings)
    images = [model.codec.decode(_image(segments).data) for segments in drawn]
    recognised = classifier.classify(np.stack(images)).tolist()
    return [Drawn(*each) for each in zip(pairs, images, recognised, strict=True)]


def name(model: SamplingModel, pairs: Sequence[Pair], settings: SamplingConfig) -> list[Captioned]:
    """A caption for each pair's image."""
    prompts = [[ImageSegment(model.codec.encode(picture_of(pair.image)))] for pair in pairs]
    written = generate(model, prompts, "image_to_text", settings)
    return [Captioned(pair, read_text(model.tokenizer, text)) for pair, text in zip(pairs, written, strict=True)]


def score(results: Sequence[Drawn] | Sequence[Captioned]) -> Score:
    return Score(sum(result.right for result in results), len(results))


def read_text(tokenizer: Tokenizer, segments: Sequence[Segment]) -> str:
    """All text of a document, without its images."""
    return "".join(tokenizer.decode(segment.ids) for segment in segments if isinstance(segment, TextSegment))


def _image(segments: Sequence[Segment]) -> ImageSegment:
    return next(segment for segment in segments if isinstance(segment, ImageSegment))
