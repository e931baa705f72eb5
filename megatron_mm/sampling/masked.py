"""Images of masked codes: all rows start from masks, draw every code in each step, and keep the more confident ones.

How a step's logits come about is the family's: under Show-o's mask the prompt is cached and only the image is read
again; under MMaDA's full attention the whole document is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.documents.builder import Opening
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.remask import least_confident, masked_after
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.sampling.text import choose


class MaskedSampler(Sampler):
    """See `Sampler`."""

    @abstractmethod
    def open_images(self, rows: Sequence[Row], openings: Sequence[Opening]) -> list[int]:
        """Makes ready to read images behind the rows' documents and their twins': the rows of the cache."""

    @abstractmethod
    def read_blocks(self, indices: Sequence[int], blocks: np.ndarray) -> torch.Tensor:
        """Hidden states [b, n, D] of images from BOI to EOI, int64 [b, n], behind their documents."""

    def draw(self, rows: Sequence[Row], openings: Sequence[Opening]) -> Sequence[np.ndarray]:
        block = openings[0].block
        first, h, w = block.images[0].tolist()
        n, device, mask_id = h * w, self.model.device, self.model.family.mask_id
        steps = min(self.decoding.steps, n)
        streams = [row.image_stream() for row in rows]
        indices = self.open_images(rows, openings)
        blocks = np.tile(block.tokens, (len(rows), 1))
        tokens = torch.full((len(rows), n), mask_id, device=device)
        temperature = self.decoding.image_temperature
        codes = slice(self.vocab.image_start, self.vocab.image_start + self.vocab.image_codes)
        for step in range(steps):
            self.report(f"drawing, step {step + 1} of {steps}")
            unknown = tokens == mask_id
            blocks[:, first : first + n] = tokens.cpu().numpy()
            hidden = self.read_blocks(indices, np.tile(blocks, (1 + self.twins, 1)))[:, first : first + n]
            logits = self.guide(self.decoder.logits(hidden)[..., codes])
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
                tokens[again] = mask_id
        found = tokens.cpu().numpy() - self.vocab.image_start
        return found.reshape(-1, h, w)


class ShowoSampler(MaskedSampler):
    """The document is cached, and images see it."""

    def open_images(self, rows: Sequence[Row], openings: Sequence[Opening]) -> list[int]:
        return self.read_all(rows, openings)[0]

    def read_blocks(self, indices: Sequence[int], blocks: np.ndarray) -> torch.Tensor:
        n = blocks.shape[1]
        return self.decoder.forward(indices, piece(blocks, np.full(n, n, dtype=np.int32)), keep=0)
