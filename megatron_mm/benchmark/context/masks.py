"""Masks of whole rows by name: the kernel benchmark's distributions, and the documents of a prepared dataset."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count

import numpy as np
from mm_kernels.span_attention.benchmark import distributions
from PIL import Image

from megatron_mm.benchmark.context.arguments import DATA, Study
from megatron_mm.config.compose import Config, ConfigError, compose
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.index import build_index
from megatron_mm.data.measure import measured
from megatron_mm.data.plan import epoch_order
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.shapes import shapes_of
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.documents.builder import Builder
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.mask import concatenate


class Masks:
    """int32 [1, 2 or 3, length] of one row; the third row is there where it hides keys."""

    def __init__(self, study: Study):
        self._seed = study.config.seed
        self._dataset = _Dataset(study) if DATA in study.names else None

    def draw(self, name: str, length: int) -> np.ndarray:
        """
        Raises:
            ValueError: the dataset has no document that fits.
        """
        if self._dataset and name == DATA:
            return self._dataset.row(length)[None]
        return distributions.mask(name, length, self._seed)[None]


class _Dataset:
    """Rows of a prepared dataset's documents as a family lays them out, in shuffled order, epoch after epoch."""

    def __init__(self, study: Study):
        config = compose([f"experiment={study.config.experiment}", f"data.path={study.config.data}", *study.overrides])
        tokenizer = load_tokenizer(config.data.tokenizer)
        family = build_family(config.model, tokenizer.size)
        self._documents_of, self._hides_keys = Builder(family), MaskTraits.of(family).hides_keys
        index = build_index(config.data.path, tokenizer)
        blank = _Blank(config, family)
        self._reader = SampleReader(index, tokenizer, blank, family.encoder_side)
        self._lengths = measured(*shapes_of(index, "auto", blank.grid), self._documents_of.length)
        self._seed = study.config.seed

    def row(self, length: int) -> np.ndarray:
        """Documents until the next one does not fit; the rest is padding. int32 [2 or 3, length]."""
        if not (self._lengths <= length).any():
            raise ConfigError(
                f"No document of data= fits into lengths={length}: the shortest of {len(self._lengths)} has "
                f"{self._lengths.min() if len(self._lengths) else 0} positions."
            )
        masks: list[np.ndarray] = []
        used = 0
        for document in self._documents(length):
            if used + document.shape[1] > length:
                break
            masks.append(document)
            used += document.shape[1]
        return concatenate(masks, length)[: 3 if self._hides_keys else 2]

    def _documents(self, length: int) -> Iterator[np.ndarray]:
        for epoch in count():
            for uid in epoch_order(self._lengths, length, self._seed, epoch).tolist():
                yield self._documents_of.lay_out(self._reader.read(uid), Streams(self._seed, uid, epoch)).mask


class _Blank:
    """What `SampleReader` asks of an image codec, with pictures unread: a mask does not depend on what
    they show. All are of `model.image`'s size."""

    def __init__(self, config: Config, family: Family):
        image, self.codes = config.model.image, family.image_codes
        self._size = size = (image.height, image.width)
        self._make = (
            partial(np.zeros, size, np.int64) if self.codes else partial(np.zeros, (image.channels, *size), np.float32)
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self._size

    def encode(self, image: Image.Image) -> np.ndarray:
        return self._make()
