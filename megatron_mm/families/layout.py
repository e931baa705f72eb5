"""What the layouts of all families share: the order of a pair, the token sequence, next-token labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Other documents, and those that begin with a prompt, keep their own order.
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
    """Caption and image of a sample that has nothing else, in whatever order, and gives neither."""
    texts = [segment for segment in sample.segments if isinstance(segment, TextSegment)]
    images = [segment for segment in sample.segments if isinstance(segment, ImageSegment)]
    return (texts[0], images[0]) if len(texts) == len(images) == 1 and not prompt_segments(sample) else None


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


def task_of(sample: Sample, streams: Streams, generation_share: float) -> str:
    """What a sample teaches: `text` (there is no image), `understanding` or `generation` (a pair of one text and one
    image; drawn where the sample does not say), or `interleaved` (any other document). An image whose question is given
    teaches understanding too."""
    images = [number for number, segment in enumerate(sample.segments) if isinstance(segment, ImageSegment)]
    if not images:
        return "text"
    if prompt_segments(sample):
        return "understanding" if images == [0] else "interleaved"
    if pair_of(sample) is None:
        return "interleaved"
    if sample.task != "auto":
        return sample.task
    return "generation" if streams.generator("task").random() < generation_share else "understanding"


def prompt_segments(sample: Sample) -> int:
    """How many leading segments of a sample are given and have no loss: `prompt_segments` of its meta data.

    Raises:
        ValueError: it is no whole number, or leaves no segment to learn.
    """
    count = sample.meta.get("prompt_segments", 0)
    if type(count) is not int or not 0 <= count < max(len(sample.segments), 1):
        raise ValueError(
            f"Sample {sample.key!r} has prompt_segments={count!r} in its meta data: it must be a whole number that "
            f"leaves at least one of its {len(sample.segments)} segments to learn."
        )
    return count


def prompt_end(sample: Sample, sequence: Callable[[tuple[Segment, ...]], np.ndarray]) -> int:
    """Where what is given ends: its position in the sample's tokens. `sequence` makes tokens, EOS included."""
    count = prompt_segments(sample)
    return len(sequence(sample.segments[:count])) - 1 if count else 0


def drop_condition(
    segments: tuple[Segment, ...], task: str, streams: Streams, condition_dropout: float
) -> tuple[Segment, ...]:
    """The segments of a pair, without its text where it is drawn to be drawn from nothing."""
    if task != "generation" or streams.generator("condition").random() >= condition_dropout:
        return segments
    return tuple(segment for segment in segments if isinstance(segment, ImageSegment))


def in_task_order(segments: tuple[Segment, ...], task: str) -> tuple[Segment, ...]:
    """A pair with its image last where it is to be drawn, and first where it is to be understood."""
    if task not in ("generation", "understanding"):
        return segments
    return tuple(sorted(segments, key=lambda segment: isinstance(segment, ImageSegment) == (task == "generation")))


def open_task(segments: Sequence[Segment], open_image: bool) -> tuple[str, bool]:
    """(task of a prompt, whether it is to be continued before its EOS), by what stands in it and what is to follow."""
    images = [number for number, segment in enumerate(segments) if isinstance(segment, ImageSegment)]
    if open_image and not images:
        return "generation", False
    return ("understanding" if images == [0] and len(segments) <= 2 else "interleaved"), True


def token_sequence(
    segments: Sequence[Segment],
    vocab: Vocabulary,
    image_tokens: Callable[[ImageSegment], np.ndarray],
    before_image: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """BOS, the segments, EOS, an image standing as BOI, its tokens, EOI.

    Args:
        image_tokens: the ids int [h, w] that stand for an image's positions.
        before_image: ids between BOI and these.

    Returns:
        tokens int64 [n]; images int32 [m, 3]: (first position, h, w) of every image's own positions.
    """
    tokens, images = [vocab.bos], []
    for segment in segments:
        if isinstance(segment, TextSegment):
            tokens.extend(segment.ids.tolist())
        else:
            grid = image_tokens(segment)
            tokens.extend([vocab.boi, *before_image])
            images.append((len(tokens), *grid.shape))
            tokens.extend(grid.ravel().tolist())
            tokens.append(vocab.eoi)
    tokens.append(vocab.eos)
    return np.array(tokens, dtype=np.int64), np.array(images, dtype=np.int32).reshape(-1, 3)


def task_sequence(
    task: str, segments: Sequence[Segment], vocab: Vocabulary, image_tokens: Callable[[ImageSegment], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A document that names its task first, for families with the special ids `t2i` and `mmu`. As `token_sequence`.

    generation: T2I, BOS text EOS, BOI codes EOI. understanding: MMU, BOI codes EOI, BOS text EOS. Others name nothing.
    """
    if task not in ("generation", "understanding"):
        return token_sequence(segments, vocab, image_tokens)
    texts = [segment for segment in segments if isinstance(segment, TextSegment)]
    text, _ = token_sequence(texts, vocab, image_tokens)
    wrapped, images = token_sequence([s for s in segments if isinstance(s, ImageSegment)], vocab, image_tokens)
    image = wrapped[1:-1]
    if task == "generation":
        return np.concatenate([[vocab.special["t2i"]], text, image]), images + [len(text), 0, 0]
    return np.concatenate([[vocab.special["mmu"]], image, text]), images


def open_end(tokens: np.ndarray, vocab: Vocabulary, open_image: bool) -> np.ndarray:
    """`tokens` of `token_sequence` without their EOS, int64: a prompt, which BOI ends where an image is to follow."""
    return np.append(tokens[:-1], vocab.boi) if open_image else tokens[:-1]


def next_token_labels(tokens: np.ndarray) -> np.ndarray:
    """The label of position i is token i + 1, int64 [n]; the last position has none."""
    return np.append(tokens[1:], IGNORE)
