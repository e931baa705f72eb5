"""Assembles a run's data: index, lengths, plan and reader, with every check that can be made before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_mm.config.model import ImageConfig
from megatron_mm.config.schema import DataConfig, SourceConfig
from megatron_mm.data.blend import Blend
from megatron_mm.data.chat import Chat
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.files import replacing
from megatron_mm.data.image_codec import ImageCodec
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.index import Index, build_index, joined
from megatron_mm.data.plan import Plan
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.data.shapes import shapes_of
from megatron_mm.data.tokenizer import Tokenizer
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
    def pixels(self) -> ImageConfig | None: ...
    def length(self, shape: Shape) -> int: ...
    def encoded_images(self, shape: Shape) -> float: ...
    def lay_out(self, sample: Sample, streams: Streams) -> Document: ...


@dataclass(frozen=True)
class LedgerEntry:
    """A document that is never trained on, and why."""

    uid: int
    key: str
    shard: str
    length: int
    reason: str


def measured(shapes: Sequence[Shape], inverse: np.ndarray, measure: Callable[[Shape], float]) -> np.ndarray:
    """What `measure` says of each sample, float64 [N], asked once for each different shape (see `shapes_of`)."""
    values: np.ndarray = np.array([measure(shape) for shape in shapes], dtype=np.float64)[inverse]
    return values


def open_data(
    data: DataConfig, image: ImageConfig, layout: Layout, tokenizer: Tokenizer, seed: int
) -> tuple[Plan, SampleReader, list[LedgerEntry]]:
    """The plan of `data.path` or the blend of `data.sources`, the reader of its samples, and the documents left out as
    too long.

    Raises:
        ValueError: missing or damaged shards, an image tokenizer that does not fit the model, or documents that do not
            fit into `data.seq_length`.
    """
    if data.overlong not in ("error", "skip"):
        raise ValueError(f"data.overlong={data.overlong!r} must be 'error' or 'skip'.")
    codec, chat = load_image_codec(data, image), Chat.load(data.chat_template, data.learn_turns)
    _check_codes(codec, layout, data)
    sources, parts = data.sources or (SourceConfig(str(data.path)),), []
    for number, source in enumerate(sources):
        key = f"data.sources[{number}].path" if data.sources else "data.path"
        parts.append(build_index(source.path, tokenizer, key, chat))
        if not len(parts[-1]):
            raise ValueError(f"The shards of {key}={source.path} hold no samples.")
    index = joined(parts)
    shapes = [shapes_of(part, source.task, image) for part, source in zip(parts, sources, strict=True)]
    lengths = np.concatenate([measured(*each, layout.length) for each in shapes]).astype(np.int64)
    ledger = _fit(index, lengths, data, image, layout)
    firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    tasks = [(first, source.task) for first, source in zip(firsts, sources, strict=False)]
    reader = SampleReader(index, tokenizer, codec, layout.pixels, tasks, chat)
    encoded = np.concatenate([measured(*each, layout.encoded_images) for each in shapes])
    images = encoded if encoded.any() else None
    if len(sources) == 1:
        return Plan(lengths, data.seq_length, seed, data.window, images), reader, ledger
    for number, (first, end) in enumerate(pairwise(firsts)):
        if (lengths[first:end] > data.seq_length).all():
            raise ValueError(
                f"No document of data.sources[{number}].path={sources[number].path} fits into data.seq_length="
                f"{data.seq_length}: raise it, or take the source out."
            )
    sizes, weights = [len(part) for part in parts], [source.weight for source in sources]
    blend = Blend(lengths, data.seq_length, seed, data.window, sizes, weights, data.blend_by, images)
    return blend, reader, ledger


def write_ledger(path: Path, entries: Iterable[LedgerEntry]) -> None:
    """One JSON object a line."""
    with replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)


def _check_codes(codec: ImageCodec, layout: Layout, data: DataConfig) -> None:
    expected = layout.image_codes
    if bool(codec.codes) != bool(expected):
        reads, want = (
            ("codes", "the path of a codebook (*.npz)")
            if expected
            else ("pixels or latents", "'pixels' or the path of a VAE (*.pt)")
        )
        raise ValueError(f"data.image_tokenizer={data.image_tokenizer}, but the model reads {reads}: set it to {want}.")
    if codec.codes > expected:
        raise ValueError(
            f"data.image_tokenizer={data.image_tokenizer} has {codec.codes} codes, more than "
            f"model.image_codes={expected}. Set model.image_codes={codec.codes}."
        )


def _fit(index: Index, lengths: np.ndarray, data: DataConfig, image: ImageConfig, layout: Layout) -> list[LedgerEntry]:
    """The ledger of documents longer than seq_length, or the error that says what to do about them."""
    one_image = layout.length(Shape((ImagePart(0, image.height, image.width),)))
    if one_image > data.seq_length and index.images.any():
        raise ValueError(
            f"data.seq_length={data.seq_length} is shorter than one image: model.image of {image.height} x "
            f"{image.width} takes {one_image} positions. Raise data.seq_length to that and room for text, "
            "or use smaller images."
        )
    overlong = np.flatnonzero(lengths > data.seq_length)
    if not len(overlong):
        return []
    longest = overlong[lengths[overlong].argmax()]
    told = (
        f"{len(overlong)} of {len(index)} documents are longer than data.seq_length={data.seq_length}; the longest is "
        f"{index.key(longest)!r} in {index.path(longest)} with {lengths[longest]} positions."
    )
    if data.overlong == "error":
        raise ValueError(f"{told} Raise data.seq_length, or set data.overlong=skip to leave them out.")
    if len(overlong) == len(index):
        raise ValueError(f"{told} No document is left to train on: raise data.seq_length.")
    return [
        LedgerEntry(uid, index.key(uid), index.path(uid).name, int(lengths[uid]), f"longer than {data.seq_length}")
        for uid in overlong.tolist()
    ]
