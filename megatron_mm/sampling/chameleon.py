"""Sampling from Chameleon: all rows advance by one token a forward pass, each in its own mode.

An image is exactly h * w codes, after which EOI is forced. A guided row has a twin, which reads BOS, BOI and the same
codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.nn.diffusion import guide
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler, column
from megatron_mm.sampling.text import Next
from megatron_mm.types import Document


class ChameleonSampler(Sampler):
    """See `Sampler`."""

    def write(self, prompts: Sequence[Document]) -> None:
        rows, hidden = self.rows, self.read(self.rows, prompts)
        if self.draws_at_once:
            for row in rows:
                row.codes = []
        while True:
            chosen = zip(rows, self.choose(rows, self._logits(rows, hidden), self._following(rows)), strict=True)
            going = [(row, token) for row, token in chosen if self._take(row, token)]
            if not going:
                break
            rows = [row for row, _ in going]
            drawing = self._drawing(rows)
            tokens = [token for _, token in going] + [going[i][1] for i in drawing]
            indices = self.indices(rows) + self.twins([rows[i] for i in drawing])
            self.report(f"writing, {int(self.decoder.lengths.max())} tokens")
            hidden = self.decoder.forward(indices, piece(column(tokens)), keep=1)[:, 0]

    def _following(self, rows: list[Row]) -> list[Next]:
        return [
            self.after_text(row) if row.codes is None else Next.CODE if len(row.codes) < self.image_length else Next.EOI
            for row in rows
        ]

    def _drawing(self, rows: list[Row]) -> list[int]:
        """Which of the rows are guided: those whose next token is a code."""
        return [i for i, kind in enumerate(self._following(rows)) if self.guided and kind == Next.CODE]

    def _logits(self, rows: list[Row], hidden: torch.Tensor) -> torch.Tensor:
        """Guided logits [b, V] from hidden states of the rows, and behind them of their twins."""
        drawing = self._drawing(rows)
        logits = self.decoder.logits(hidden[: len(rows) + len(drawing)])
        own, unconditional = logits[: len(rows)], logits[len(rows) :]
        own[drawing] = guide(own[drawing], unconditional, self.scale)
        return own

    def _take(self, row: Row, token: int) -> bool:
        """Notes the token; False when the row ends with it and need not be read further."""
        if token == self.vocab.boi:
            row.codes = []
            if self.guided:
                self.decoder.lengths[self.twins([row])] = 1  # BOS alone: an earlier image is forgotten
        elif row.codes is None:
            return self.take_text(row, token)
        elif token == self.vocab.eoi:
            row.codes = None
            return self.room(row) > 1
        else:
            row.codes.append(token - self.vocab.image_start)
            if len(row.codes) == self.image_length:
                row.add_image(np.array(row.codes, dtype=np.int64).reshape(self.model.family.grid))
                return not self.draws_at_once
        return True
