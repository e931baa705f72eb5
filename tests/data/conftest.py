"""A small real layout (text tokens, then one position a pixel, with noise) and shards on disk for the data tests."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.dataset import open_data
from megatron_mm.data.shape import TextPart
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.documents.builder import PREDICTED, Builder
from megatron_mm.documents.spans import Block, Span, special, text
from megatron_mm.types import FieldSpec, LossTerm

SIDE = 4
IMAGE = ImageConfig(channels=1, height=SIDE, width=SIDE)
MODEL = TransfusionConfig(image=IMAGE)


class PixelFamily:
    """BOS, text bytes, and images of SIDE x SIDE positions that see one another; each pixel gets its own noise."""

    vocab = SimpleNamespace(pad=256, bos=257)
    image_codes = 0
    encoder_side = None
    terms = (LossTerm("text", 1.0),)
    config = SimpleNamespace(image=IMAGE)
    fields = PREDICTED | {"pixels": FieldSpec("float32", (1,), 0.0)}

    def __init__(self, encodes: bool = False):
        self.encodes = encodes

    def choices(self, shape):
        return [(1.0, shape)]

    def spans(self, shape):
        items = [special(self.vocab.bos)]
        for part in shape.parts:
            if isinstance(part, TextPart):
                items += text(part, self.vocab, "text")
            else:
                grid = (part.height, part.width)
                items.append(Block((Span(SIDE * SIDE, source=part.source, grid=grid, encoded=self.encodes),)))
        return items

    def fill(self, draft, streams):
        for number, (place, segment) in enumerate(draft.images(), 1):
            noise = streams.generator("noise", number).standard_normal(SIDE * SIDE)
            draft.fields["pixels"][place.at, 0] = segment.data.reshape(-1) + noise


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
def layout() -> Builder:
    return Builder(PixelFamily())


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
        plan, reader, _ = open_data(data, MODEL, layout, ByteTokenizer(), seed=3)
        return data, plan, reader

    return open_with
