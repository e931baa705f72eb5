"""How long the documents of an index are, and what pieces they come in: from their shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_mm.data.corrupt import Streams
from megatron_mm.data.index import Index
from megatron_mm.data.pieces import Piece, cut_up
from megatron_mm.data.shape import Shape
from megatron_mm.data.shapes import Grid, shapes_of
from megatron_mm.types import Document, FieldSpec, Sample


class Ids(Protocol):
    """The ids that the data path needs of a vocabulary."""

    @property
    def pad(self) -> int: ...


class Layout(Protocol):
    """What the data path needs of a family's documents (`megatron_mm.documents.builder.Builder`)."""

    @property
    def vocab(self) -> Ids: ...
    @property
    def fields(self) -> Mapping[str, FieldSpec]: ...
    @property
    def image_codes(self) -> int: ...
    @property
    def encoder_side(self) -> int | None: ...
    def length(self, shape: Shape) -> int: ...
    def encoded_images(self, shape: Shape) -> float: ...
    def lay_out(self, sample: Sample, streams: Streams) -> Document: ...


def measured(shapes: Sequence[Shape], inverse: np.ndarray, measure: Callable[[Shape], float]) -> np.ndarray:
    """What `measure` says of each sample, float64 [N], asked once for each different shape (see `shapes_of`)."""
    values: np.ndarray = np.array([measure(shape) for shape in shapes], dtype=np.float64)[inverse]
    return values


@dataclass(frozen=True)
class Measured:
    """The documents of one source: of which sample each is (int64 [P]), its positions (int64 [P]) and how many images
    of it an encoder reads (float64 [P]); `cut`: those that are pieces of a sample, by their number."""

    samples: np.ndarray
    lengths: np.ndarray
    encoded: np.ndarray
    cut: dict[int, Piece]


def measure(index: Index, task: str, grid: Grid, layout: Layout, limit: int | None) -> Measured:
    """The documents of an index; samples longer than `limit` are cut up, if one is given."""
    shapes, which = shapes_of(index, task, grid)
    lengths = measured(shapes, which, layout.length).astype(np.int64)
    encoded = measured(shapes, which, layout.encoded_images)
    if limit is None or not (lengths > limit).any():
        return Measured(np.arange(len(index)), lengths, encoded, {})
    pieces = {
        number: cut_up(shapes[number], lambda shape: layout.length(shape) <= limit)
        for number in np.unique(which[lengths > limit]).tolist()
    }
    counts = np.array([max(len(pieces.get(number, ())), 1) for number in range(len(shapes))])[which]
    samples = np.repeat(np.arange(len(index)), counts)
    firsts, cut = counts.cumsum() - counts, {}
    lengths, encoded = lengths[samples], encoded[samples]
    for sample in np.flatnonzero(np.isin(which, list(pieces))).tolist():
        for uid, piece in enumerate(pieces[which[sample]], int(firsts[sample])):
            shape = piece.shape(shapes[which[sample]])
            cut[uid], lengths[uid], encoded[uid] = piece, layout.length(shape), layout.encoded_images(shape)
    return Measured(samples, lengths, encoded, cut)


def joined_documents(found: Sequence[Measured], samples: Sequence[int]) -> Measured:
    """The documents of all sources, one after the other."""
    first_samples = np.cumsum([0, *samples[:-1]])
    firsts = np.cumsum([0, *(len(each.samples) for each in found[:-1])]).tolist()
    return Measured(
        np.concatenate([each.samples + first for each, first in zip(found, first_samples, strict=True)]),
        np.concatenate([each.lengths for each in found]),
        np.concatenate([each.encoded for each in found]),
        {first + uid: piece for each, first in zip(found, firsts, strict=True) for uid, piece in each.cut.items()},
    )
