"""Captioned images of a prepared MNIST, with the classes that a measurement needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.config.compose import Config, ConfigError
from megatron_mm.data.image_codec import PixelCodec
from megatron_mm.data.index import build_index
from megatron_mm.data.plan import shuffled
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.types import ImageSegment, Segment, TextSegment


@dataclass(frozen=True)
class Pair:
    """A real image uint8 [H, W, C] of class `label`, and its caption."""

    image: np.ndarray
    label: int
    caption: str


def mnist_splits(run: Config) -> tuple[Path, Path]:
    """The folders of the training and the held-out split.

    Raises:
        ConfigError: the run was trained on something else.
    """
    train = Path(run.data.path or run.data.sources[0].path)
    card, held_out = train.parent / "dataset.json", train.parent / "val"
    if not card.is_file() or json.loads(card.read_text())["kind"] != "mnist" or not held_out.is_dir():
        raise ConfigError(
            f"{run.run.dir} was trained on data.path={train}, which is not MNIST as `python -m megatron_mm.data.prepare"
            " mnist` writes it: only there are generated images told right from wrong. Use megatron_mm.generate."
        )
    return train, held_out


def read_pairs(split: Path, tokenizer: Tokenizer, codec: PixelCodec, count: int, seed: int) -> list[Pair]:
    """At most `count` captioned images of a prepared split with labels, drawn without replacement."""
    index = build_index(split, tokenizer)
    reader = SampleReader(index, tokenizer, codec)
    pairs = np.flatnonzero((index.images == 1) & (np.diff(index.segments) == 2))
    drawn = [reader.read(uid) for uid in pairs[shuffled(len(pairs), seed, split.name)[:count]].tolist()]
    return [
        Pair(codec.decode(first_image(s.segments).data), s.meta["labels"][0], read_text(tokenizer, s.segments))
        for s in drawn
    ]


def of_each_class(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The first `count` pairs of each class, class by class."""
    labels = sorted({pair.label for pair in pairs})
    return [pair for label in labels for pair in [p for p in pairs if p.label == label][:count]]


def images_of(pairs: Sequence[Pair]) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    return np.stack([pair.image for pair in pairs])


def labels_of(pairs: Sequence[Pair]) -> np.ndarray:
    """int64 [N]."""
    return np.array([pair.label for pair in pairs])


def read_text(tokenizer: Tokenizer, segments: Sequence[Segment]) -> str:
    """All text of a document, without its images."""
    return "".join(tokenizer.decode(segment.ids) for segment in segments if isinstance(segment, TextSegment))


def first_image(segments: Sequence[Segment]) -> ImageSegment:
    return next(segment for segment in segments if isinstance(segment, ImageSegment))
