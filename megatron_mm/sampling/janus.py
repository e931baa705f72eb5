"""Sampling from Janus: text through one head, or one image code by code through the other.

A guided row has a twin, whose prompt is padding but for BOS and BOI, and which then reads the same codes. Janus is not
trained to turn from text to an image by itself, so there is no interleaved mode.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_mm.families.janus import DRAWN, NO_IMAGE
from megatron_mm.nn.diffusion import guide
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.sampler import Sampler, column
from megatron_mm.types import Document, PackedBatch


class JanusSampler(Sampler):
    """See `Sampler`."""

    modes = ("text_to_image", "image_to_text")
    guidance = 5.0

    def without_prompt(self, prompt: Document) -> Document:
        """`prompt` with padding for all but BOS and BOI, images included."""
        kept = np.isin(prompt.tokens, (self.vocab.bos, self.vocab.boi))
        tokens = np.where(kept, prompt.tokens, self.vocab.pad)
        kind = np.full_like(prompt.fields["kind"], NO_IMAGE)
        return replace(prompt, tokens=tokens, fields=prompt.fields | {"kind": kind})

    def write(self, hidden: torch.Tensor) -> None:
        if self.draws_at_once:
            self._draw(hidden)
        else:
            self.write_text(self.rows, hidden)

    def batch(self, tokens: np.ndarray) -> PackedBatch:
        return self._positions(tokens, NO_IMAGE)

    def _draw(self, hidden: torch.Tensor) -> None:
        rows, count = self.rows, self.model.family.image_codes
        indices = self.indices(rows) + (self.twins(rows) if self.guided else [])
        drawn: list[list[int]] = []
        while True:
            logits = self.decoder.code_logits(hidden)
            if self.guided:
                logits = guide(*logits.chunk(2), self.scale)
            allowed = torch.arange(logits.shape[1], device=logits.device) < count
            drawn.append(self.pick(rows, logits, allowed.expand_as(logits)))
            self.report(f"drawing, {len(drawn)} of {self.image_length} codes")
            if len(drawn) == self.image_length:
                break
            batch = self._positions(column(drawn[-1] * (1 + self.guided)), DRAWN)
            hidden = self.decoder.forward(indices, batch, keep=1)[:, 0]
        for row, codes in zip(rows, zip(*drawn, strict=True), strict=True):
            row.add_image(np.array(codes, dtype=np.int64).reshape(self.model.family.grid))

    def _positions(self, ids: np.ndarray, kind: int) -> PackedBatch:
        """The next position of each row, int64 [b, 1]: text tokens, or codes of an image."""
        device, codes = self.model.device, torch.from_numpy(ids)
        tokens = np.full_like(ids, self.vocab.pad) if kind == DRAWN else ids
        fields = {
            "kind": torch.full(ids.shape, kind, dtype=torch.int8, device=device),
            "codes": (codes if kind == DRAWN else torch.zeros_like(codes)).to(device),
            "pixels": torch.zeros(*ids.shape, *self.model.family.fields["pixels"].shape, device=device),
        }
        return piece(tokens, fields=fields)
