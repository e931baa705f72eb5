"""A small real layout (text tokens, then one position a pixel, with noise) and shards on disk for the data tests."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_mm import mask
from megatron_mm.config.model import ImageConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.dataset import open_data
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.types import Document, FieldSpec, TextSegment

SIDE = 4
IMAGE = ImageConfig(channels=1, height=SIDE, width=SIDE)


@dataclass(frozen=True)
class PixelLayout:
    """BOS, text bytes, and images of SIDE x SIDE positions that see one another; each pixel gets its own noise."""

    encodes = 0
    vocab = SimpleNamespace(pad=256, bos=257, image=258)
    image_codes = 0
    pixels = None
    fields = {"labels": FieldSpec("int64", (), -100), "pixels": FieldSpec("float32", (1,), 0.0)}

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        return 1 + text_tokens + images * SIDE * SIDE

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return self.encodes * images

    def lay_out(self, sample, streams) -> Document:
        tokens, pixels, images = [np.array([self.vocab.bos])], [np.zeros(1)], []
        for segment in sample.segments:
            if isinstance(segment, TextSegment):
                tokens.append(segment.ids)
                pixels.append(np.zeros(len(segment.ids)))
            else:
                images.append((sum(map(len, tokens)), SIDE, SIDE))
                noise = streams.generator("noise", len(images)).standard_normal(SIDE * SIDE)
                tokens.append(np.full(SIDE * SIDE, self.vocab.image))
                pixels.append(segment.data.reshape(-1) + noise)
        ids = np.concatenate(tokens).astype(np.int64)
        spans = [(first, first + h * w) for first, h, w in images]
        return Document(
            sample.uid,
            ids,
            mask.with_spans(len(ids), spans),
            {"labels": np.roll(ids, -1), "pixels": np.concatenate(pixels).astype(np.float32)[:, None]},
            np.array(images, dtype=np.int32).reshape(-1, 3),
        )


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Captions of many lengths, with no, one or two small grey images."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        segments = ["x" * int(rng.integers(1, 40))]
        for _ in range(int(rng.integers(0, 3))):
            segments.append(Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)))
        records.append(Record(f"doc-{i:04d}", tuple(segments), {"number": i}))
    return records


@pytest.fixture
def layout() -> PixelLayout:
    return PixelLayout()


@pytest.fixture
def records() -> list[Record]:
    return make_records(61)


@pytest.fixture
def shards(tmp_path, records):
    """A folder of 61 documents in four shards."""
    write_shards(tmp_path / "shards", records, samples_per_shard=17)
    return tmp_path / "shards"


@pytest.fixture
def open_shards(shards, layout):
    """Call with DataConfig keys: (data config, plan, reader) of the 61 documents, seed 3."""

    def open_with(**keys):
        data = DataConfig(**{"path": str(shards), "seq_length": 96, "window": 20, **keys})
        plan, reader, _ = open_data(data, IMAGE, layout, ByteTokenizer(), seed=3)
        return data, plan, reader

    return open_with
