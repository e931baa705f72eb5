"""Images of masked codes: all rows start from masks, draw every code in each step, and keep the more confident ones.

How a step's logits come about is the family's: under Show-o's mask the prompt is cached and only the image is read
again; under MMaDA's full attention the whole document is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.nn.diffusion import guide
from megatron_mm.sampling.remask import least_confident, masked_after
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.sampling.text import choose

STEPS = 50
"""Of an image, where none are given: both papers' own."""


class MaskedSampler(Sampler):
    """See `Sampler`."""

    beside_image = 2

    @abstractmethod
    def code_hidden(self, rows: Sequence[Row], indices: list[int], tokens: np.ndarray) -> torch.Tensor:
        """Hidden states [b, h * w, D] of the images of `rows`, whose tokens (codes and masks) are int64 [b, h * w].

        `indices` are those of the rows, or of their twins.
        """

    def draw(self, rows: Sequence[Row]) -> np.ndarray:
        """Makes the image of each row; returns its tokens int64 [b, h * w]."""
        n, device = self.image_length, self.model.device
        steps = min(self.settings.steps or STEPS, n)
        streams = [row.image_stream() for row in rows]
        tokens = torch.full((len(rows), n), self.model.family.mask_id, device=device)
        temperature = 1.0
        for step in range(steps):
            self.report(f"drawing, step {step + 1} of {steps}")
            unknown = tokens == self.model.family.mask_id
            logits = self._logits(rows, tokens.cpu().numpy())
            uniforms = torch.from_numpy(np.stack([stream.random((2, n)) for stream in streams])).to(device)
            everything = torch.ones_like(logits[:, 0], dtype=torch.bool).repeat_interleave(n, 0)
            drawn = choose(logits.flatten(0, 1), everything, uniforms[:, 0].flatten(), 1.0, 1.0).view_as(tokens)
            confidence = logits.double().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            tokens = torch.where(unknown, drawn + self.vocab.image_start, tokens)
            if step + 1 < steps:
                temperature *= 1 - (step + 1) / steps
                gumbel = -torch.log(-torch.log(uniforms[:, 1].clamp(1e-20, 1 - 1e-16)))
                count = masked_after(step, steps, n)
                again = least_confident(confidence, unknown, gumbel, temperature, count)
                tokens[again] = self.model.family.mask_id
        found = tokens.cpu().numpy()
        for row, codes in zip(rows, found - self.vocab.image_start, strict=True):
            row.add_image(codes.reshape(self.model.family.grid))
        return found

    def wrapped(self, tokens: np.ndarray) -> np.ndarray:
        """Images with their BOI and EOI: int64 [b, h * w + 2]."""
        return np.pad(tokens, ((0, 0), (1, 1)), constant_values=((0, 0), (self.vocab.boi, self.vocab.eoi)))

    def _logits(self, rows: Sequence[Row], tokens: np.ndarray) -> torch.Tensor:
        """Those of the codes [b, h * w, codes], guided."""
        codes = slice(self.vocab.image_start, self.vocab.image_start + self.vocab.image_codes)
        logits = self.decoder.logits(self.code_hidden(rows, self.indices(rows), tokens))[..., codes]
        if not self.guided:
            return logits
        unconditional = self.decoder.logits(self.code_hidden(rows, self.twins(rows), tokens))[..., codes]
        return guide(logits, unconditional, self.scale)
