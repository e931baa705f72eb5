"""What a model understood, measured on held-out captioned images: how it draws captions, and how it names images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.image_codec import picture_of
from megatron_mm.report.classifier import ImageClassifier
from megatron_mm.report.pairs import Pair, first_image, read_text
from megatron_mm.report.summary import Score
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import TextSegment


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


def draw_images(
    model: SamplingModel, pairs: Sequence[Pair], classifier: ImageClassifier, settings: SamplingConfig
) -> list[Drawn]:
    """One image for each pair's caption."""
    if not pairs:
        return []
    prompts = [[TextSegment(model.tokenizer.encode(pair.caption))] for pair in pairs]
    drawn = generate(model, prompts, "image", settings)
    images = [model.codec.decode(first_image(segments).data) for segments in drawn]
    recognised = classifier.classify(np.stack(images)).tolist()
    return [Drawn(*each) for each in zip(pairs, images, recognised, strict=True)]


def write_captions(model: SamplingModel, pairs: Sequence[Pair], settings: SamplingConfig) -> list[Captioned]:
    """A caption for each pair's image."""
    prompts = [[model.read_image(picture_of(pair.image))] for pair in pairs]
    written = generate(model, prompts, "text", settings)
    return [Captioned(pair, read_text(model.tokenizer, text)) for pair, text in zip(pairs, written, strict=True)]


def score(results: Sequence[Drawn] | Sequence[Captioned]) -> Score:
    return Score(sum(result.right for result in results), len(results))
