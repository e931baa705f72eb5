"""Images of codes that are drawn one after the other, left to right: Chameleon and Janus."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.documents.builder import Opening
from megatron_mm.families.janus import DRAWN
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import IMAGE, Row
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.types import Document, PackedBatch


class CodeSampler(Sampler):
    """See `Sampler`: all rows advance by one code a forward pass."""

    @abstractmethod
    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [b, codes or more] of hidden states [b, D]."""

    @abstractmethod
    def next_codes(self, codes: np.ndarray) -> PackedBatch:
        """Codes [b, 1] to be read."""

    def draw(self, rows: Sequence[Row], openings: Sequence[Opening]) -> Sequence[np.ndarray]:
        _, h, w = openings[0].block.images[0].tolist()
        indices, hidden = self.read_all(rows, openings)
        drawn: list[list[int]] = []
        while True:
            logits = self.guide(self.code_logits(hidden))
            allowed = torch.arange(logits.shape[1], device=logits.device) < self.model.family.image_codes
            settings = self.decoding.image_temperature, self.decoding.image_top_p
            drawn.append(self.pick(rows, logits, allowed.expand_as(logits), *settings))
            self.report(f"drawing, {len(drawn)} of {h * w} codes")
            if len(drawn) == h * w:
                return np.array(drawn, dtype=np.int64).T.reshape(-1, h, w)
            codes = np.array(drawn[-1] * (1 + self.twins))[:, None]
            hidden = self.decoder.forward(indices, self.next_codes(codes), keep=1)[:, 0]


class ChameleonSampler(CodeSampler):
    """Guidance compares with images of the document alone, and with nothing: u + s_i (i - u) + s (c - u)."""

    guides = 2

    def contexts(self, row: Row, opening: Opening) -> list[Document]:
        shape = row.shape(IMAGE)
        pictures = self.builder.open(row.document, shape.of(shape.images)).prompt
        return [*super().contexts(row, opening), pictures]

    def guide(self, predicted: torch.Tensor) -> torch.Tensor:
        if not self.twins:
            return predicted
        full, nothing, pictures = predicted.chunk(3)
        toward_pictures = self.decoding.image_cfg_scale * (pictures - nothing)
        return nothing + toward_pictures + self.decoding.cfg_scale * (full - nothing)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(hidden)[:, self.vocab.image_start :]

    def next_codes(self, codes: np.ndarray) -> PackedBatch:
        return piece(codes + self.vocab.image_start)


class JanusSampler(CodeSampler):
    """Codes have a head and an embedding of their own."""

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.code_logits(hidden)

    def next_codes(self, codes: np.ndarray) -> PackedBatch:
        fields = self.blank_fields(codes.shape)
        fields["kind"][:] = DRAWN
        fields["codes"][:] = torch.from_numpy(codes)
        return piece(np.full_like(codes, self.vocab.pad), fields=fields)
