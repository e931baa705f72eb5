"""What the layouts of all families share: the order of a pair, the token sequence, next-token labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mm.config.model import ImageConfig
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
    pair = pair_of(sample)
    if pair is None:
        return Arrangement(sample.segments)
    text, image = pair
    if streams.generator("order").random() >= caption_first:
        return Arrangement((image, text), image_first=True)
    if streams.generator("condition").random() < condition_dropout:
        return Arrangement((image,))
    return Arrangement((text, image))


def pair_of(sample: Sample) -> tuple[TextSegment, ImageSegment] | None:
    """Caption and image of a sample that has nothing else, in whatever order."""
    texts = [segment for segment in sample.segments if isinstance(segment, TextSegment)]
    images = [segment for segment in sample.segments if isinstance(segment, ImageSegment)]
    return (texts[0], images[0]) if len(texts) == len(images) == 1 else None


def image_codes(sample: Sample, segment: ImageSegment, image: ImageConfig, count: int) -> np.ndarray:
    """The codes of `segment`, int64 [h, w].

    Raises:
        ValueError: they are not a grid of `image`'s height and width with values below `count`.
    """
    codes = segment.data
    if codes.shape != (image.height, image.width) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"Sample {sample.key!r} has an image of {codes.dtype} {list(codes.shape)}, but model.image says "
            f"integer codes [{image.height}, {image.width}]. Change model.image or data.image_tokenizer."
        )
    if codes.min() < 0 or codes.max() >= count:
        raise ValueError(
            f"Sample {sample.key!r} has image codes from {codes.min()} to {codes.max()}, but "
            f"model.image_codes={count}. Set it to the image tokenizer's codebook size."
        )
    return codes.astype(np.int64)


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
