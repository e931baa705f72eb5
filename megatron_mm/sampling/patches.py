"""Sampling where images are patches in the sequence, denoised in place: what Transfusion and Show-o2 share.

All rows write text until each has ended or is at BOI; those at BOI are then denoised together. A step overwrites the
noised patches in the cache, and the finished image is read once more, clean, before text goes on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.nn.diffusion import guide
from megatron_mm.nn.patch import patchify, unpatchify
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler, column
from megatron_mm.types import Document, PackedBatch


class PatchSampler(Sampler):
    """See `Sampler`. `clean`: the time of an image without noise."""

    clean: int

    @abstractmethod
    def denoise(self, rows: Sequence[Row], x: torch.Tensor) -> torch.Tensor:
        """The clean patches of each row's image from noise `x`, float [b, h * w, P]."""

    @abstractmethod
    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the model predicts of patches [B, n, P], from its hidden states."""

    @abstractmethod
    def fields(self, tokens: np.ndarray, patches: torch.Tensor | None, time: int) -> dict[str, torch.Tensor]:
        """The fields of tokens [b, n], which begin with an image where its patches [b, m, P] are given."""

    def write(self, prompts: Sequence[Document]) -> None:
        hidden = self.read(self.rows, prompts)
        if self.draws_at_once:
            self._draw(self.rows)
            return
        rows, hidden = self.rows, hidden[: len(self.rows)]
        while drawing := self.write_text(rows, hidden):
            self.decoder.forward(self.indices(drawing), self.batch(column([self.vocab.boi] * len(drawing))), keep=1)
            x = self._draw(drawing)
            goes_on = [self.room(row) >= self.image_length + self.before_image + 2 for row in drawing]
            rows = [row for row, going in zip(drawing, goes_on, strict=True) if going]
            if not rows:
                break
            hidden = self._read_image(rows, x[torch.tensor(goes_on)])

    def guided_prediction(self, rows: Sequence[Row], x: torch.Tensor, time: int) -> torch.Tensor:
        """What the model predicts of patches `x` [b, h * w, P] at a time, guided; leaves nothing in the cache."""
        indices = self.indices(rows)
        if self.guided:
            indices, x = indices + self.twins(rows), torch.cat([x, x])
        batch = self.batch(np.full((len(x), self.before_image + x.shape[1]), self.vocab.pad), x, time)
        hidden = self.decoder.forward(indices, batch, keep=0)
        predicted = self.predict(hidden, batch.to(self.model.device))[:, self.before_image :].to(x.dtype)
        return guide(*predicted.chunk(2), self.scale) if self.guided else predicted

    def batch(self, tokens: np.ndarray, patches: torch.Tensor | None = None, time: int = 0) -> PackedBatch:
        """Tokens [b, n] to come, which begin with an image at some time where its patches [b, m, P] are given."""
        fields = self.fields(tokens, patches, time)
        if patches is None:
            return piece(tokens, fields=fields)
        b, n = tokens.shape
        hi = np.arange(1, n + 1, dtype=np.int32)
        hi[: self.before_image + patches.shape[1]] = self.before_image + patches.shape[1]
        return piece(tokens, hi, fields, [(row, self.before_image, *self.model.family.grid) for row in range(b)])

    def _draw(self, rows: Sequence[Row]) -> torch.Tensor:
        """Makes the image of each row; returns their clean patches float [b, h * w, P]."""
        family, (h, w) = self.model.family, self.model.family.grid
        image, p = family.config.image, family.config.patch_size
        noise = [patchify(row.noise((image.channels, image.height, image.width)), p) for row in rows]
        x = self.denoise(rows, torch.from_numpy(np.stack(noise)).to(self.model.device))
        for row, patches in zip(rows, x.cpu().numpy(), strict=True):
            row.add_image(unpatchify(patches, h, w, p))
        return x

    def _read_image(self, rows: Sequence[Row], x: torch.Tensor) -> torch.Tensor:
        """Caches finished images and their EOI; hidden states [b, D] at EOI."""
        tokens = np.full((len(rows), self.before_image + self.image_length + 1), self.vocab.pad)
        tokens[:, -1] = self.vocab.eoi
        batch = self.batch(tokens, x, self.clean)
        return self.decoder.forward(self.indices(rows), batch, keep=tokens.shape[1])[:, -1]
