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


def diversity(drawn: Sequence[Drawn], real: Sequence[Pair]) -> float:
    """How far images of one class lie from each other, over how far real ones do (mean distance of pixels, classes
    weighing alike): 1 is as varied as `real`, 0 one picture a class; NaN where no class has two images."""
    ratios = []
    for label in sorted({one.pair.label for one in drawn}):
        generated = _spread([one.image for one in drawn if one.pair.label == label])
        true = _spread([pair.image for pair in real if pair.label == label])
        ratios.append(generated / true)
    return float(np.nanmean(ratios)) if not np.isnan(ratios).all() else float("nan")


def _spread(images: Sequence[np.ndarray]) -> float:
    """The mean distance between two of them; NaN of fewer."""
    if len(images) < 2:
        return float("nan")
    flat = np.stack(images).reshape(len(images), -1).astype(np.float64)
    norms = (flat**2).sum(1)
    squared = norms[:, None] + norms - 2 * flat @ flat.T
    return float(np.sqrt(squared.clip(min=0))[np.triu_indices(len(flat), 1)].mean())
