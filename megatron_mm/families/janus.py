"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811): one causal transformer, with images encoded in two ways.

    generation      BOS  text ...  BOI  code ... code  EOI  EOS
    understanding   BOS  BOI  seen ... seen  EOI  text ...  EOS

An image to understand is read as pixels by a SigLIP encoder and an adaptor; an image to generate is a grid of codes of
an image tokenizer, with an embedding, an adaptor and an output head of their own.

loss = text_weight * cross-entropy per text token (and EOS) + image_weight * cross-entropy per image code. Captions of
generation documents have no labels; condition dropout turns them into padding in place. Where the papers are silent:
an image that ends an interleaved document is generated, all others are there to be understood; text around several
images is all labelled, and BOI and EOI are never predicted, since they are set by rule.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from megatron_mm.config.janus import JanusConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.builder import PREDICTED, Draft
from megatron_mm.documents.choices import Choices, drawing_one
from megatron_mm.documents.spans import Items, Role, Span, in_order, special, text
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.patches import pixels_of
from megatron_mm.families.tokens import TokenBack, image_codes
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import patchify
from megatron_mm.nn.vision import Adaptor, VisionIn
from megatron_mm.types import FRONT, IGNORE, FieldSpec, LossTerm, PackedBatch

NO_IMAGE, SEEN, DRAWN = -1, 0, 1
"""Kinds of positions: outside images, of an image to understand, of one to generate."""


class Janus:
    """See `Family`. Fields of a batch besides the builder's:

    kind int8 [B, S]: see above; pixels [B, S, 3 * p * p]: patch vectors of images to understand; codes int64 [B, S]:
    those of images to generate.
    """

    name = "janus"

    def __init__(self, config: JanusConfig, text_vocab_size: int) -> None:
        self.config, self.trunk, self.image_codes = config, config.trunk, config.image_codes
        self.vocab = Vocabulary.of(config.vocabulary, text_vocab_size, 0, config.vocab_size)
        self.encoder_side = config.encoder.image_size
        self.terms: tuple[LossTerm, ...] = (
            LossTerm("text", config.text_weight),
            LossTerm("image", config.image_weight),
        )
        self.fields = PREDICTED | {
            "kind": FieldSpec("int8", (), NO_IMAGE, (FRONT,)),
            "pixels": FieldSpec("float32", (3 * config.encoder.patch_size**2,), 0.0, (FRONT,)),
            "codes": FieldSpec("int64", (), 0, (FRONT,)),
        }

    def choices(self, shape: Shape) -> Choices:
        return drawing_one(shape, self.config.generation_share, self.config.condition_dropout, _blank)

    def spans(self, shape: Shape) -> Items:
        end = special(self.vocab.eos, Role.next_if(shape.learns_text), "text")
        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "text"), self._image, [end])

    def fill(self, draft: Draft, streams: Streams) -> None:
        encoder = self.config.encoder
        for place, segment in draft.images():
            draft.fields["kind"][place.at] = SEEN if place.span.encoded else DRAWN
            if place.span.encoded:
                pixels = pixels_of(draft.sample, segment, encoder.image_size)
                draft.fields["pixels"][place.at] = patchify(pixels, encoder.patch_size)
                draft.targets[place.at] = IGNORE
            else:
                codes = image_codes(draft.sample, segment, self.config.image, self.image_codes)
                draft.fields["codes"][place.at] = draft.targets[place.at] = codes.ravel()

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return JanusFront(self.config, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return JanusBack(self.config, self.vocab, ops)

    def _image(self, part: ImagePart) -> Items:
        side = self.config.encoder.side
        h, w = (part.height, part.width) if part.drawn else (side, side)
        role = Role.next_if(part.drawn)
        image = Span(h * w, None, part.source, role, "image", (h, w), encoded=not part.drawn)
        return [special(self.vocab.boi), image, special(self.vocab.eoi)]


def _blank(shape: Shape) -> Shape:
    """An image to be drawn from nothing: padding in place of its caption."""
    parts = (replace(part, blank=True) if isinstance(part, TextPart) else part for part in shape.parts)
    return shape.of(parts, conditioned=False)


class JanusFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, config: JanusConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.vision = VisionIn(config.encoder, hidden, config.encoder_path, config.freeze_encoder)
        self.code_embedding = nn.Embedding(config.image_codes, config.code_dim)
        self.code_embedding.weight.init_std = 1.0  # as the official one, for an adaptor that keeps the variance
        self.code_adaptor = Adaptor(config.code_dim, hidden)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        kind, seen = batch.fields["kind"], self.vision(batch.fields["pixels"], batch.grids)
        drawn = self.code_adaptor(self.code_embedding(batch.fields["codes"]))
        x = torch.where((kind == DRAWN)[..., None], drawn, self.embedding(batch.tokens))
        return torch.where((kind == SEEN)[..., None], seen, x)


class JanusBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its heads serve sampling as well."""

    def __init__(self, config: JanusConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__(config.trunk, vocab, ops)
        hidden = config.trunk.hidden_size
        self.code_in = nn.Sequential(linear(hidden, hidden), nn.GELU())
        self.code_head = ops.vocab_head(hidden, config.image_codes, bias=True)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits of image codes [B, S, codes / TP]."""
        return self.code_head(self.code_in(hidden))

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        labels, term = batch.fields["labels"], batch.fields["term"]
        words, codes = (torch.where(term == number, labels, IGNORE) for number in range(2))
        text, _ = self.head.cross_entropy(hidden, words)
        image, _ = self.code_head.cross_entropy(self.code_in(hidden), codes)
        return {"text": text.sum(), "image": image.sum()}
