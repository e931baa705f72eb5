"""Sampling from Show-o: text by token over the cached document, images by masked decoding behind it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.masked import MaskedSampler
from megatron_mm.sampling.row import Row
from megatron_mm.types import Document


class ShowoSampler(MaskedSampler):
    """See `Sampler`."""

    guidance = 6.0
    """The paper's w = 5 in (1 + w) c - w u."""

    def write(self, prompts: Sequence[Document]) -> None:
        hidden = self.read(self.rows, prompts)
        if self.draws_at_once:
            self.draw(self.rows)
            return
        rows, hidden = self.rows, hidden[: len(self.rows)]
        while drawing := self.write_text(rows, hidden):
            tokens = self.draw(drawing)
            hidden = self._read(self.indices(drawing), tokens, keep=True)[:, -1]
            goes_on = [self.room(row) > 1 for row in drawing]
            rows = [row for row, going in zip(drawing, goes_on, strict=True) if going]
            hidden = hidden[torch.tensor(goes_on)]

    def code_hidden(self, rows: Sequence[Row], indices: list[int], tokens: np.ndarray) -> torch.Tensor:
        return self._read(indices, tokens, keep=False)[:, 1:-1]

    def _read(self, indices: list[int], tokens: np.ndarray, keep: bool) -> torch.Tensor:
        """Hidden states [b, h * w + 2, D] of images from BOI to EOI, which see each other and what is cached."""
        block = self.wrapped(tokens)
        n = block.shape[1]
        return self.decoder.forward(indices, piece(block, np.full(n, n, dtype=np.int32)), keep=n if keep else 0)
