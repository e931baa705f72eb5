"""Short words for what tests ask of a family's documents."""

from dataclasses import replace

import numpy as np

from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape, TextPart, shape_of
from megatron_mm.documents import builder
from megatron_mm.types import IGNORE, Document, PackedBatch, Sample


def lay_out(family, sample: Sample, epoch: int = 0, seed: int = 0) -> Document:
    return builder.Builder(family).lay_out(sample, Streams(seed, sample.uid, epoch))


def length(family, sample: Sample) -> int:
    """Positions that are planned for a sample."""
    return builder.Builder(family).length(shape_of(sample))


def shape_like(family, kinds: str, tokens: int = 5) -> Shape:
    """Of a document such as "tit", each text of so many tokens."""
    image = family.config.image
    text, picture = (lambda n: TextPart(n, tokens)), (lambda n: ImagePart(n, image.height, image.width))
    return Shape(tuple(text(n) if kind == "t" else picture(n) for n, kind in enumerate(kinds)))


def finished(family, segments, drawn: bool = False) -> Document:
    """A whole document as sampling reads it; `drawn`: its last segment is an image as it stands while it is drawn."""
    sample = Sample(0, "", tuple(segments))
    shape = shape_of(sample)
    if drawn:
        shape = shape.of([*shape.parts[:-1], replace(shape.parts[-1], drawn=True)])
    return builder.Builder(family).whole(sample, shape)


def label_counts(family, batch: PackedBatch) -> dict[str, int]:
    return builder.counts(family.terms, batch)


def next_tokens(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The builder's fields of a document whose every next token is a label of the first loss term."""
    labels = np.append(tokens[1:], IGNORE)
    return {"labels": labels, "term": np.where(labels == IGNORE, builder.NO_TERM, 0).astype(np.int8)}
