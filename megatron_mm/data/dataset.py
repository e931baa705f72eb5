"""Assembles a run's data: index, lengths, plan and reader, with every check that can be made before training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_mm.config.compose import ModelConfig
from megatron_mm.config.model import ImageConfig
from megatron_mm.config.schema import DataConfig, SourceConfig
from megatron_mm.data.blend import Blend
from megatron_mm.data.chat import Chat
from megatron_mm.data.files import replacing
from megatron_mm.data.image_codec import ImageCodec
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.index import Index, build_index, joined
from megatron_mm.data.measure import Layout, Measured, joined_documents, measure
from megatron_mm.data.pieces import Pieces
from megatron_mm.data.plan import Plan
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class LedgerEntry:
    """A document that is never trained on, or in pieces, and why."""

    uid: int
    key: str
    shard: str
    length: int
    reason: str


def open_data(
    data: DataConfig, model: ModelConfig, layout: Layout, tokenizer: Tokenizer, seed: int, group: str = "data"
) -> tuple[Plan, SampleReader, list[LedgerEntry]]:
    """The plan of `data.path` or the blend of `data.sources`, the reader of its samples, and the documents left out as
    too long.

    Args:
        group: the keys' group, for errors.

    Raises:
        ValueError: missing or damaged shards, an image tokenizer that does not fit the model, or documents that do not
            fit into `data.seq_length`.
    """
    codec, chat = load_image_codec(data, model), Chat.load(data.chat_template, data.learn_turns)
    _check_codes(codec, layout, data)
    sources, parts = data.sources or (SourceConfig(str(data.path)),), []
    for number, source in enumerate(sources):
        key = f"{group}.sources[{number}].path" if data.sources else f"{group}.path"
        parts.append(build_index(source.path, tokenizer, key, chat))
        if not len(parts[-1]):
            raise ValueError(f"The shards of {key}={source.path} hold no samples.")
    limit = data.seq_length if data.overlong == "split" else None
    found = [measure(part, source.task, codec.grid, layout, limit) for part, source in zip(parts, sources, strict=True)]
    index, documents = joined(parts), joined_documents(found, [len(part) for part in parts])
    ledger = _fit(index, documents, data, model.image, layout)
    firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    tasks = [(first, source.task) for first, source in zip(firsts, sources, strict=False)]
    pieces = Pieces(documents.samples, documents.cut) if documents.cut else None
    reader = SampleReader(index, tokenizer, codec, layout.encoder_side, tasks, chat, pieces)
    lengths, images = documents.lengths, documents.encoded if documents.encoded.any() else None
    if len(sources) == 1:
        return Plan(lengths, data.seq_length, seed, data.window, images), reader, ledger
    ends = np.cumsum([0, *(len(each.samples) for each in found)]).tolist()
    for number, (first, end) in enumerate(pairwise(ends)):
        if (lengths[first:end] > data.seq_length).all():
            raise ValueError(
                f"No document of {group}.sources[{number}].path={sources[number].path} fits into data.seq_length="
                f"{data.seq_length}: raise it, or take the source out."
            )
    sizes, weights = [len(each.samples) for each in found], [source.weight for source in sources]
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


def _fit(index: Index, documents: Measured, data: DataConfig, image: ImageConfig, layout: Layout) -> list[LedgerEntry]:
    """The ledger of documents longer than seq_length, or the error that says what to do about them."""
    one_image = layout.length(Shape((ImagePart(0, image.height, image.width),)))
    if one_image > data.seq_length and index.images.any():
        raise ValueError(
            f"data.seq_length={data.seq_length} is shorter than one image: model.image of {image.height} x "
            f"{image.width} takes {one_image} positions. Raise data.seq_length to that and room for text, "
            "or use smaller images."
        )
    lengths, samples = documents.lengths, documents.samples
    overlong = np.flatnonzero(lengths > data.seq_length)
    split = np.unique(samples[list(documents.cut)]) if documents.cut else np.zeros(0, np.int64)
    counts, totals, too_long = np.bincount(samples), np.bincount(samples, lengths), f"longer than {data.seq_length}"
    ledger = [
        _entry(index, sample, int(totals[sample]), f"{too_long}: split into {counts[sample]}")
        for sample in split.tolist()
    ]
    if not len(overlong):
        return ledger
    longest = overlong[lengths[overlong].argmax()]
    told = (
        f"{len(overlong)} of {len(lengths)} documents are longer than data.seq_length={data.seq_length}; the longest "
        f"is {index.key(samples[longest])!r} in {index.path(samples[longest])} with {lengths[longest]} positions."
    )
    if data.overlong == "error":
        raise ValueError(
            f"{told} Raise data.seq_length, or set data.overlong=split to cut them up, or skip to leave them out."
        )
    if len(overlong) == len(lengths):
        raise ValueError(f"{told} No document is left to train on: raise data.seq_length.")
    left_out = [_entry(index, int(samples[uid]), int(lengths[uid]), too_long) for uid in overlong]
    return [*ledger, *left_out]


def _entry(index: Index, sample: int, length: int, reason: str) -> LedgerEntry:
    return LedgerEntry(sample, index.key(sample), index.path(sample).name, length, reason)
