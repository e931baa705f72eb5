"""What the layouts of all families share: the order of a pair, the token sequence, next-token labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import Vocabulary
from megatron_mm.types import IGNORE, ImageSegment, Sample, Segment, TextSegment


@dataclass(frozen=True)
class Arrangement:
    """A sample's segments in the order they are trained in; `image_first` marks a pair whose image leads."""

    segments: tuple[Segment, ...]
    image_first: bool = False


def arrange(sample: Sample, streams: Streams, caption_first: float, condition_dropout: float) -> Arrangement:
    """Draw the order of a pair (exactly one text and one image), and whether a leading caption is left out.

    Other documents keep their own order.
    """
    texts = [segment for segment in sample.segments if isinstance(segment, TextSegment)]
    images = [segment for segment in sample.segments if isinstance(segment, ImageSegment)]
    if len(texts) != 1 or len(images) != 1:
        return Arrangement(sample.segments)
    if streams.generator("order").random() >= caption_first:
        return Arrangement((images[0], texts[0]), image_first=True)
    if streams.generator("condition").random() < condition_dropout:
        return Arrangement((images[0],))
    return Arrangement((texts[0], images[0]))


def token_sequence(
    segments: tuple[Segment, ...], vocab: Vocabulary, image_tokens: Callable[[ImageSegment], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """BOS, the segments, EOS, an image standing as BOI, its tokens, EOI.

    Args:
        image_tokens: the ids int [h, w] that stand for an image's positions.

    Returns:
        tokens int64 [n]; images int32 [m, 3]: (first position, h, w) of every image's own positions.
    """
    tokens, images = [vocab.bos], []
    for segment in segments:
        if isinstance(segment, TextSegment):
            tokens.extend(segment.ids.tolist())
        else:
            grid = image_tokens(segment)
            tokens.append(vocab.boi)
            images.append((len(tokens), *grid.shape))
            tokens.extend(grid.ravel().tolist())
            tokens.append(vocab.eoi)
    tokens.append(vocab.eos)
    return np.array(tokens, dtype=np.int64), np.array(images, dtype=np.int32).reshape(-1, 3)


def open_end(tokens: np.ndarray, vocab: Vocabulary, open_image: bool) -> np.ndarray:
    """`tokens` of `token_sequence` without their EOS, int64: a prompt, which BOI ends where an image is to follow."""
    return np.append(tokens[:-1], vocab.boi) if open_image else tokens[:-1]


def next_token_labels(tokens: np.ndarray) -> np.ndarray:
    """The label of position i is token i + 1, int64 [n]; the last position has none."""
    return np.append(tokens[1:], IGNORE)
