"""Sampling from Janus: text through one head, or one image code by code through the other.

A guided row has a twin, whose prompt is padding but for BOS and the image's BOI, and which then reads the same codes.
Janus is not trained to turn from text to an image by itself: in an interleaved document the two take turns, and a drawn
image is read again as any other, as pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_mm.data.image_codec import picture_of
from megatron_mm.families.janus import DRAWN, NO_IMAGE
from megatron_mm.nn.diffusion import guide
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler, column
from megatron_mm.sampling.text import Next
from megatron_mm.sampling.turns import take_turns
from megatron_mm.types import Document, PackedBatch


class JanusSampler(Sampler):
    """See `Sampler`."""

    guidance = 5.0

    def without_prompt(self, prompt: Document) -> Document:
        """`prompt` with padding for all but BOS and the BOI that it ends with, images included."""
        tokens = np.full_like(prompt.tokens, self.vocab.pad)
        tokens[[0, -1]] = self.vocab.bos, self.vocab.boi
        kind = np.full_like(prompt.fields["kind"], NO_IMAGE)
        return replace(prompt, tokens=tokens, fields=prompt.fields | {"kind": kind}, encoded=prompt.encoded[:0])

    def write(self, prompts: Sequence[Document]) -> None:
        if self.draws_at_once:
            self._draw(self.rows, self.read(self.rows, prompts))
        elif self.mode == "image_to_text":
            self.write_text(self.rows, self.read(self.rows, prompts))
        else:
            self.documents = [list(row.request.prompt.segments) for row in self.rows]
            take_turns(self.rows, self._fits, self._add_image, self._add_text)

    def after_text(self, row: Row) -> Next:
        return Next.TEXT

    def batch(self, tokens: np.ndarray) -> PackedBatch:
        return self._positions(tokens, NO_IMAGE)

    def _fits(self, row: Row) -> bool:
        """Whether there is room for an image, drawn and then read, and for text behind it."""
        image = max(self.image_length, self.model.config.model.encoder.side**2)
        return len(self._prompt(row, open_image=True).tokens) + image + 2 <= self.seq_length

    def _add_image(self, rows: list[Row]) -> None:
        prompts = [self._prompt(row, open_image=True) for row in rows]
        self._draw(rows, self.read(rows, prompts))
        for row in rows:
            drawn = self.model.codec.decode(row.finish()[-1].data)
            self.documents[row.index].append(self.model.read_image(picture_of(drawn)))

    def _add_text(self, rows: list[Row]) -> list[Row]:
        if not rows:
            return []
        before = [row.new_tokens for row in rows]
        self.write_text(rows, self.decoder.prefill(self.indices(rows), [self._prompt(row) for row in rows]))
        wrote = [row for row, count in zip(rows, before, strict=True) if row.new_tokens > count]
        for row in wrote:
            self.documents[row.index].append(row.finish()[-1])
        return [row for row in wrote if row.new_tokens < self.settings.max_new_tokens]

    def _prompt(self, row: Row, open_image: bool = False) -> Document:
        """The row's document so far, as one to go on from."""
        so_far = replace(row.request.prompt, segments=tuple(self.documents[row.index]))
        return self.model.family.lay_out_prompt(so_far, open_image)

    def _draw(self, rows: Sequence[Row], hidden: torch.Tensor) -> None:
        count = self.model.family.image_codes
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
