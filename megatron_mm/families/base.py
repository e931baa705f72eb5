"""The seam between a model family and everything else.

A family turns samples into sequences (host side, numpy), embeds a packed batch on the first pipeline stage, and turns
the trunk's output into loss sums on the last one. It imports no engine and no process group: what must be sharded it
asks of `ParallelOps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from megatron_mm.config.model import TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import Document, FieldSpec, LossTerm, PackedBatch, Sample


@dataclass(frozen=True)
class Vocabulary:
    """Where everything stands in one id space: text first, then the specials, then the image codes (if any)."""

    text_size: int
    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    image_start: int
    image_codes: int
    size: int

    @staticmethod
    def after_text(text_size: int, image_codes: int = 0, size: int | None = None) -> Vocabulary:
        """The default arrangement for a text tokenizer of `text_size` entries; `size` adds unused entries at the end.

        Raises:
            ValueError: `size` is smaller than what is needed.
        """
        specials = [text_size + i for i in range(5)]
        needed = text_size + 5 + image_codes
        if size is not None and size < needed:
            raise ValueError(
                f"model.vocab_size={size} is too small: {text_size} text tokens, 5 specials and {image_codes} image "
                f"codes need {needed}. Raise model.vocab_size or leave it null."
            )
        return Vocabulary(text_size, *specials, image_start=text_size + 5, image_codes=image_codes, size=size or needed)


class Family(Protocol):
    """What every family provides. `terms` and `fields` never change during a run."""

    name: str
    trunk: TrunkConfig
    vocab: Vocabulary
    terms: tuple[LossTerm, ...]
    fields: dict[str, FieldSpec]
    causal: bool
    """Whether the mask is plain packed-causal, so that a causal kernel may compute it."""

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Upper bound, and in fact the exact number, of positions of a document with so many segments and text tokens."""
        ...

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """The sample as a sequence, corrupted (noise, masking) by the sample's own streams."""
        ...

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """For every loss term the number of label positions in the batch, read from the fields alone."""
        ...

    def build_front(self, ops: ParallelOps) -> nn.Module:
        """Module: PackedBatch -> embeddings [B, S, D]."""
        ...

    def build_back(self, ops: ParallelOps) -> nn.Module:
        """Module: (hidden [B, S, D] after the final norm, PackedBatch) -> {term name: scalar sum of losses}."""
        ...


LossSums = dict[str, torch.Tensor]
