"""Uni-MoE (arXiv 2405.11273): a language model with experts that reads images and writes text.

    BOS  text ...  BOI  seen ... seen  EOI  text ...  EOS

Images are read as pixels by a SigLIP encoder and a linear connector. Of a caption-image pair the image comes first, and
other documents keep their order. The loss is cross-entropy over text tokens and EOS; BOI and EOI are set by rule and
never predicted. The experts are the trunk's (`model.trunk.num_experts`); the paper trains connectors first, then one
dense model a modality with adapters on its feed-forwards, and assembles these as experts.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.config.unimoe import UniMoEConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import IMAGE
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import ONE_HEAD, Draft
from megatron_mm.documents.choices import Choices, drawing_one
from megatron_mm.documents.spans import Items, Role, Span, in_order, special, text
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.patches import pixels_of
from megatron_mm.families.tokens import TokenBack
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import patchify
from megatron_mm.nn.vision import VisionIn
from megatron_mm.types import FRONT, FieldSpec, LossTerm, PackedBatch


class UniMoE:
    """See `Family`. Field of a batch besides the builder's: pixels [B, S, 3 * p * p], patch vectors of images."""

    name = "unimoe"
    image_codes = 0

    def __init__(self, config: UniMoEConfig, text_vocab_size: int) -> None:
        self.config, self.trunk, self.encoder_side = config, config.trunk, config.encoder.image_size
        self.vocab = Vocabulary.after_text(text_vocab_size, size=config.vocab_size)
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", 1.0),)
        patch = FieldSpec("float32", (3 * config.encoder.patch_size**2,), 0.0, (FRONT,))
        self.fields = ONE_HEAD | {"pixels": patch}

    def choices(self, shape: Shape) -> Choices:
        """
        Raises:
            ValueError: the sample is to teach generation.
        """
        if shape.task == "generation":
            raise ValueError("a unimoe model draws no images: give its source task=understanding.")
        return drawing_one(shape, generation_share=0.0, condition_dropout=0.0)[:1]

    def spans(self, shape: Shape) -> Items:
        end = special(self.vocab.eos, Role.next_if(shape.learns_text), "text")
        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "text"), self._image, [end])

    def fill(self, draft: Draft, streams: Streams) -> None:
        encoder = self.config.encoder
        for place, segment in draft.images():
            pixels = pixels_of(draft.sample, segment, encoder.image_size)
            draft.fields["pixels"][place.at] = patchify(pixels, encoder.patch_size)

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return UniMoEFront(self.config, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return UniMoEBack(self.trunk, self.vocab, ops)

    def _image(self, part: ImagePart) -> Items:
        side = self.config.encoder.side
        image = Span(side * side, source=part.source, grid=(side, side), encoded=True)
        return [special(self.vocab.boi), image, special(self.vocab.eoi)]


class UniMoEFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, config: UniMoEConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.vision = VisionIn(config.encoder, hidden, config.encoder_path, config.freeze_encoder, adaptor=linear)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        seen = self.vision(batch.fields["pixels"], batch.grids)
        return torch.where((batch.meta[:, 5] == IMAGE)[..., None], seen, self.embedding(batch.tokens))


class UniMoEBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> sum of cross-entropy."""

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        return {"text": self.head.cross_entropy(hidden, batch.fields["labels"])[0].sum()}
