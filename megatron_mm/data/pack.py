"""Puts documents side by side into rows: from coordinates of a document to coordinates of a pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_mm import mask
from megatron_mm.types import MODALITIES, Document, FieldSpec, Grids, PackedBatch

TEXT, IMAGE = (1 + MODALITIES.index(name) for name in ("text", "image"))


def pack(
    rows: Sequence[Sequence[Document]],
    seq_length: int,
    fields: Mapping[str, FieldSpec],
    pad: int,
    dropout_keys: Sequence[Sequence[int]],
) -> PackedBatch:
    """One micro-batch from `rows` of documents, each row at most `seq_length` positions in all.

    Positions are each document's own. Padding behind the last one has token `pad`, the mask's padding, position,
    dropout key and kind 0, and each field's fill.

    Args:
        dropout_keys: one for each document, arranged as `rows`.
    """
    shape = (len(rows), seq_length)
    tokens = np.full(shape, pad, dtype=np.int64)
    meta = np.zeros((len(rows), 6, seq_length), dtype=np.int32)
    values = {name: np.full(shape + spec.shape, spec.fill, dtype=spec.dtype) for name, spec in fields.items()}
    images: list[Sequence[int]] = []
    encoded: list[Sequence[int]] = []
    real_tokens = 0
    for row, (documents, keys) in enumerate(zip(rows, dropout_keys, strict=True)):
        start = 0
        for document, key in zip(documents, keys, strict=True):
            end = start + len(document.tokens)
            assert end <= seq_length, f"row {row} overflows at document {document.uid}"
            span = slice(start, end)
            tokens[row, span] = document.tokens
            meta[row, 3, span] = np.arange(end - start) if document.positions is None else document.positions
            meta[row, 4, span] = key
            for name, value in values.items():
                value[row, span] = document.fields[name]
            meta[row, 5, span] = TEXT
            for first, h, w in document.images:
                meta[row, 5, start + first : start + first + h * w] = IMAGE
            for found, spans in ((images, document.images), (encoded, document.encoded)):
                found += [(row, start + first, h, w) for first, h, w in spans.tolist()]
            start = end
        meta[row, :3] = mask.concatenate([document.mask for document in documents], seq_length)
        real_tokens += start
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        meta=torch.from_numpy(meta),
        fields={name: torch.from_numpy(value) for name, value in values.items()},
        images=np.array(images, np.int32).reshape(-1, 4),
        documents=sum(len(documents) for documents in rows),
        real_tokens=real_tokens,
        grids=Grids.of(encoded, seq_length),
    )
