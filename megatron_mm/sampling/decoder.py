"""Rows of documents that grow together over one KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from megatron_mm.data.pack import pack
from megatron_mm.nn.kv_cache import KVCache
from megatron_mm.parallel.attention import caching
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.stages import through_stages
from megatron_mm.sampling.held import Held
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import Document, Grids, PackedBatch


class Decoder:
    """Used inside `Decoder.open`."""

    def __init__(self, model: SamplingModel, rows: int, capacity: int, draws: bool):
        self.model, self.draws = model, draws
        self.cache = KVCache(rows, capacity + 1, model.device)  # the last slot takes padding
        self.held = [Held() for _ in range(rows)]

    @classmethod
    @contextmanager
    def open(cls, model: SamplingModel, rows: int, capacity: int, draws: bool = True) -> Iterator[Decoder]:
        """A decoder whose cache the model uses until the block ends; each row may hold `capacity` positions. `draws`:
        False where no image will be drawn, so that layers for images alone (`FurtherLayers`) need not run."""
        decoder = cls(model, rows, capacity, draws)
        with torch.inference_mode(), caching(model.stage, decoder.cache):
            yield decoder

    def read(self, rows: Sequence[int], documents: Sequence[Document]) -> torch.Tensor:
        """Makes each of `rows` hold its document; hidden states [b, D] at the last positions.

        What a row holds already, in the same place and under the same mask, is not read again.
        """
        rest = []
        for row, document in zip(rows, documents, strict=True):
            self.held[row].keep(self.held[row].common(document))
            rest.append(_behind(document, len(self.held[row])))
        lengths = np.array([len(document.tokens) for document in rest])
        family = self.model.family
        given = {name: spec for name, spec in family.fields.items() if name in documents[0].fields}
        batch = pack([[d] for d in rest], int(lengths.max()), given, family.vocab.pad, [[0]] * len(rest))
        hidden = self.forward(rows, batch, keep=lengths)
        return hidden[torch.arange(len(rows)), torch.from_numpy(lengths - 1)]

    def forward(self, rows: Sequence[int], batch: PackedBatch, keep: int | np.ndarray) -> torch.Tensor:
        """Hidden states [b, n, D] of a batch that continues `rows`, one each; its masks and positions start at 0. Only
        the last pipeline stage has them, the others something of that shape, for `SamplingModel.from_back`.

        The first `keep` positions stay cached, whatever comes next overwrites the others.
        """
        n = batch.tokens.shape[1]
        start = torch.tensor([len(self.held[row]) for row in rows])[:, None]
        slots = start + torch.arange(n)
        meta = batch.meta.clone()
        meta[:, 1] += start
        meta[:, 3] = slots
        self.cache.place(rows, slots.clamp(max=self.cache.capacity - 1))
        for i, (row, count) in enumerate(zip(rows, np.broadcast_to(keep, len(rows)).tolist(), strict=True)):
            self.held[row].add(batch.tokens[i], meta[i, 1], batch.fields, i, count)
        stage = self.model.stage
        moved = replace(batch, meta=meta).to(self.model.device, stage.config.params_dtype)
        return through_stages(stage, Part.of(moved), self.draws).transpose(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 or wider logits [..., V] of hidden states [..., D]; V includes the padding of the vocabulary."""
        return _wide(self.model.from_back(lambda back: back.ops.gather_logits(back.logits(hidden))))

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same of a head for image codes, where the family has one of its own."""
        return _wide(self.model.from_back(lambda back: back.ops.gather_logits(back.code_logits(hidden))))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _behind(document: Document, first: int) -> Document:
    """What follows a document's `first` positions, in coordinates of its own."""
    images, encoded = (
        spans[spans[:, 0] >= first] - np.array([first, 0, 0], np.int32) for spans in (document.images, document.encoded)
    )
    mask = np.maximum(document.mask[:, first:] - first, 0)
    fields = {name: values[first:] for name, values in document.fields.items()}
    return Document(document.uid, document.tokens[first:], mask, fields, images, encoded)


def piece(
    tokens: np.ndarray,
    hi: np.ndarray | None = None,
    fields: dict[str, torch.Tensor] | None = None,
    images: Sequence[tuple[int, int, int, int]] = (),
) -> PackedBatch:
    """The next n tokens of b rows, all of one shape, in coordinates that start at 0.

    Args:
        tokens: int64 [b, n]; hi: int [n], where each token's keys end; causal if None. The rest as in `PackedBatch`;
            networks over whole images read all of `images`.
    """
    b, n = tokens.shape
    meta = torch.zeros(b, 6, n, dtype=torch.int32)
    meta[:, 1] = torch.arange(1, n + 1) if hi is None else torch.from_numpy(hi)
    where = np.array(images, np.int32).reshape(-1, 4)
    return PackedBatch(torch.from_numpy(tokens), meta, fields or {}, where, b, b * n, Grids.of(images, n))
