"""Sampling from Transfusion: text by token, images by DDIM over patches that stand in the sequence.

All rows write text until each has ended or is at BOI; those at BOI are then denoised together. A step overwrites the
noised patches in the cache, and the finished image is read once more, clean, before text goes on.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_mm.families.transfusion import NO_PATCH
from megatron_mm.nn.diffusion import guide
from megatron_mm.nn.patch import patchify, unpatchify
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler, column
from megatron_mm.types import PackedBatch

STEPS = 250
"""Of an image, where none are given: the paper's own."""


class TransfusionSampler(Sampler):
    """See `Sampler`."""

    def write(self, hidden: torch.Tensor) -> None:
        if self.draws_at_once:
            self._draw(self.rows)
            return
        rows, hidden = self.rows, hidden[: len(self.rows)]
        while drawing := self.write_text(rows, hidden):
            self.decoder.forward(self.indices(drawing), self.batch(column([self.vocab.boi] * len(drawing))), keep=1)
            x0 = self._draw(drawing)
            goes_on = [self.room(row) >= self.image_length + 2 for row in drawing]
            rows = [row for row, going in zip(drawing, goes_on, strict=True) if going]
            if not rows:
                break
            hidden = self._read_image(rows, x0[torch.tensor(goes_on)])

    def _draw(self, rows: list[Row]) -> torch.Tensor:
        """Makes the image of each row; returns their clean patches float [b, h * w, P]."""
        family, (h, w) = self.model.family, self.model.family.grid
        image, p = family.config.image, family.config.patch_size
        noise = [patchify(row.noise((image.channels, image.height, image.width)), p) for row in rows]
        x = torch.from_numpy(np.stack(noise)).to(self.model.device)
        timesteps = family.schedule.timesteps(self.settings.steps or min(STEPS, family.config.num_train_timesteps))
        for number, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True), 1):
            self.report(f"denoising, step {number} of {len(timesteps)}")
            x = family.schedule.step(x, self._predict(rows, x, t), t, t_prev, self.model.codec.limit)
        for row, patches in zip(rows, x.cpu().numpy(), strict=True):
            row.add_image(unpatchify(patches, h, w, p))
        return x

    def _predict(self, rows: list[Row], x: torch.Tensor, t: int) -> torch.Tensor:
        """The noise in patches `x` [b, h * w, P] at timestep `t`, guided; leaves nothing in the cache."""
        indices = self.indices(rows)
        if self.guided:
            indices, x = indices + self.twins(rows), torch.cat([x, x])
        batch = self.batch(np.full(x.shape[:2], self.vocab.pad), x, t)
        hidden = self.decoder.forward(indices, batch, keep=0)
        eps = self.model.stage.back.predict_noise(hidden, batch).to(x.dtype)
        return guide(*eps.chunk(2), self.scale) if self.guided else eps

    def _read_image(self, rows: list[Row], x0: torch.Tensor) -> torch.Tensor:
        """Caches finished images and their EOI; hidden states [b, D] at EOI."""
        tokens = np.full((len(rows), self.image_length + 1), self.vocab.pad)
        tokens[:, -1] = self.vocab.eoi
        return self.decoder.forward(self.indices(rows), self.batch(tokens, x0, 0), keep=tokens.shape[1])[:, -1]

    def batch(self, tokens: np.ndarray, patches: torch.Tensor | None = None, timestep: int = NO_PATCH) -> PackedBatch:
        """Tokens [b, n] to come, the first m of which are an image's where its patches [b, m, P] are given."""
        b, n = tokens.shape
        device = self.model.device
        fields = {
            "patches": torch.zeros(b, n, self.model.family.patch_dim, device=device),
            "timestep": torch.full((b, n), NO_PATCH, dtype=torch.int32, device=device),
        }
        if patches is None:
            return piece(tokens, fields=fields)
        m = patches.shape[1]
        fields["patches"][:, :m] = patches
        fields["timestep"][:, :m] = timestep
        hi = np.arange(1, n + 1, dtype=np.int32)
        hi[:m] = m
        return piece(tokens, hi, fields, [(row, 0, *self.model.family.grid) for row in range(b)])
