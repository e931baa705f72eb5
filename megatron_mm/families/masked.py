"""What Show-o and MMaDA share: text and image codes in one vocabulary, some of them masked, and their objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from megatron_mm.config.masked import MaskedConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.masking import mask_image
from megatron_mm.data.shape import ImagePart
from megatron_mm.documents.builder import Draft
from megatron_mm.documents.spans import Block, Items, Role, Span, special
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.tokens import TokenBack, TokenFront, image_codes
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import LossTerm, PackedBatch

T2I, LM, MMU, CHAT, R2I = "t2i", "lm", "mmu", "chat", "r2i"
"""Loss terms: masked image codes, text alone, text that has images to go by, answers of text to text, and of text and
an image together."""

ConfigT = TypeVar("ConfigT", bound=MaskedConfig)


class MaskedFamily(Generic[ConfigT]):
    """The parts of `Family` that both have. Ids are those of `model.vocabulary`, or else text, specials, T2I, MMU,
    MASK, image codes."""

    encoder_side = None

    def __init__(self, config: ConfigT, text_vocab_size: int) -> None:
        self.config, self.trunk, self.image_codes = config, config.trunk, config.image_codes
        self.vocab = Vocabulary.of(
            config.vocabulary, text_vocab_size, config.image_codes, config.vocab_size, ("t2i", "mmu", "mask")
        )
        self.terms: tuple[LossTerm, ...] = tuple(LossTerm(name, weight) for name, weight in self.weights().items())

    def weights(self) -> dict[str, float]:
        """Of the loss terms."""
        return {T2I: self.config.t2i_weight, LM: self.config.lm_weight, MMU: self.config.mmu_weight}

    @property
    def mask_id(self) -> int:
        """The token that stands for any other."""
        return self.vocab.special["mask"]

    def image(self, part: ImagePart, boi: Role = Role.GIVEN, term: str = "", drawn: str = T2I) -> Items:
        """BOI, codes and EOI, which see each other; `term` is BOI's, if it is predicted, and `drawn` that of codes that
        are drawn, which are masked in place."""
        role, grid = Role.IN_PLACE if part.drawn else Role.GIVEN, (part.height, part.width)
        codes = Span(part.height * part.width, None, part.source, role, drawn, grid)
        return [Block((special(self.vocab.boi, boi, term), codes, special(self.vocab.eoi)))]

    def fill(self, draft: Draft, streams: Streams) -> None:
        for number, (place, segment) in enumerate(draft.images()):
            codes = image_codes(draft.sample, segment, self.config.image, self.image_codes)
            draft.write(place.at, codes + self.vocab.image_start)
            if place.span.role is Role.IN_PLACE and place.span.term == T2I:
                hidden = mask_image(codes.size, streams.generator("mask", number))
                draft.mask(np.arange(place.first, place.end), hidden, self.mask_id)

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TokenFront(self.trunk.hidden_size, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return MaskedBack(self.trunk, self.vocab, [term.name for term in self.terms], ops)


class MaskedBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> for each term the sum of cross-entropies at the positions that are its own,
    weighted where the family has a field weight [B, S]."""

    def __init__(self, trunk: TrunkConfig, vocab: Vocabulary, terms: Sequence[str], ops: ParallelOps) -> None:
        super().__init__(trunk, vocab, ops)
        self.terms = tuple(terms)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        loss, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        if "weight" in batch.fields:
            loss = loss * batch.fields["weight"]
        term = batch.fields["term"]
        return {name: torch.where(term == number, loss, 0.0).sum() for number, name in enumerate(self.terms)}
