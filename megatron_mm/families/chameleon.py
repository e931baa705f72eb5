"""Chameleon (arXiv 2405.09818): everything is a token, text and image codes alike, predicted left to right.

    BOS  text ...  BOI  code ... code  EOI  text ...  EOS

Loss = cross-entropy + z_loss_weight * (log Z)^2, both over every next token, with Z the softmax's denominator.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.config.model import ChameleonConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import ONE_HEAD, Draft
from megatron_mm.documents.choices import Choices, drawing_all
from megatron_mm.documents.spans import Items, Role, Span, in_order, special, text
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.tokens import TokenBack, TokenFront, image_codes
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import LossTerm, PackedBatch


class Chameleon:
    """See `Family`."""

    name = "chameleon"
    encoder_side = None

    def __init__(self, config: ChameleonConfig, text_vocab_size: int) -> None:
        self.config, self.trunk, self.image_codes = config, config.trunk, config.image_codes
        self.vocab = Vocabulary.of(config.vocabulary, text_vocab_size, config.image_codes, config.vocab_size)
        self.terms: tuple[LossTerm, ...] = (LossTerm("ce", 1.0), LossTerm("z", config.z_loss_weight, over="ce"))
        self.fields = ONE_HEAD

    def choices(self, shape: Shape) -> Choices:
        return drawing_all(shape, 1 - self.config.image_first, self.config.condition_dropout)

    def spans(self, shape: Shape) -> Items:
        end = special(self.vocab.eos, Role.NEXT, "ce")
        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "ce"), self._image, [end])

    def fill(self, draft: Draft, streams: Streams) -> None:
        for place, segment in draft.images():
            codes = image_codes(draft.sample, segment, self.config.image, self.image_codes)
            draft.write(place.at, codes + self.vocab.image_start)

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TokenFront(self.trunk.hidden_size, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return ChameleonBack(self.trunk, self.vocab, ops)

    def _image(self, part: ImagePart) -> Items:
        role, grid = Role.next_if(part.drawn), (part.height, part.width)
        codes = Span(part.height * part.width, None, part.source, role, "ce", grid)
        return [special(self.vocab.boi, Role.next_if(part.loss), "ce"), codes, special(self.vocab.eoi, role, "ce")]


class ChameleonBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> sums of cross-entropy and squared log Z."""

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        cross_entropy, log_z = self.head.cross_entropy(hidden, batch.fields["labels"])
        return {"ce": cross_entropy.sum(), "z": log_z.square().sum()}
