"""Samples of text and images, and a way to pack a family's documents."""

import numpy as np
import pytest

from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import pack
from megatron_mm.documents.builder import Builder
from megatron_mm.types import ImageSegment, Sample, TextSegment


@pytest.fixture
def sample():
    """Call with a layout such as "tit" (text, image, text), a function making image data, a uid."""

    def make(kinds, image, uid=0):
        rng = np.random.default_rng(uid)
        text = lambda: TextSegment(rng.integers(0, 100, 5 + uid % 3))  # noqa: E731
        segments = tuple(text() if kind == "t" else ImageSegment(image(rng)) for kind in kinds)
        return Sample(uid, f"sample-{uid}", segments)

    return make


@pytest.fixture
def packed():
    """Call with a family, rows of samples and a row length: the batch and the documents in it."""

    def make(family, rows, seq_length, seed=0):
        documents = [[Builder(family).lay_out(s, Streams(seed, s.uid, 0)) for s in row] for row in rows]
        keys = [[0] * len(row) for row in rows]
        return pack(documents, seq_length, family.fields, family.vocab.pad, keys), documents

    return make
