"""Chameleon (arXiv 2405.09818): everything is a token, text and image codes alike, predicted left to right.

    BOS  text ...  BOI  code ... code  EOI  text ...  EOS

Loss = cross-entropy + z_loss_weight * (log Z)^2, both over every next token, with Z the softmax's denominator.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import ChameleonConfig, VocabularyConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import arrange, image_codes, next_token_labels, open_end, token_sequence
from megatron_mm.mask import causal
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import IGNORE, Document, FieldSpec, ImageSegment, LossTerm, PackedBatch, Sample


class Chameleon:
    """See `Family`. Field of a batch: labels int64 [B, S]."""

    name = "chameleon"
    causal = True
    hides_keys = False
    whole_images = False
    pixels = None

    def __init__(self, config: ChameleonConfig, text_vocab_size: int) -> None:
        self.config = config
        self.trunk = config.trunk
        self.vocab = _vocabulary(config, text_vocab_size)
        self.image_codes = config.image_codes
        self.terms: tuple[LossTerm, ...] = (LossTerm("ce", 1.0), LossTerm("z", config.z_loss_weight))
        self.fields = {"labels": FieldSpec("int64", (), IGNORE)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes in an image."""
        return self.config.image.height, self.config.image.width

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; with condition dropout it may turn out shorter."""
        return 2 + text_tokens + images * (2 + self.config.image.height * self.config.image.width)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not a grid of codes of the configured size and range.
        """
        arrangement = arrange(sample, streams, 1 - self.config.image_first, self.config.condition_dropout)
        tokens, images = token_sequence(
            arrangement.segments, self.vocab, lambda segment: self._image_tokens(sample, segment)
        )
        return Document(sample.uid, tokens, causal(len(tokens)), {"labels": next_token_labels(tokens)}, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`; raises as `lay_out` does."""
        tokens, images = token_sequence(
            sample.segments, self.vocab, lambda segment: self._image_tokens(sample, segment)
        )
        tokens = open_end(tokens, self.vocab, open_image)
        return Document(sample.uid, tokens, causal(len(tokens)), {}, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        labels = int((batch.fields["labels"] != IGNORE).sum())
        return {"ce": labels, "z": labels}

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return ChameleonFront(self.trunk.hidden_size, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return ChameleonBack(self.trunk.hidden_size, self.vocab, ops)

    def _image_tokens(self, sample: Sample, segment: ImageSegment) -> np.ndarray:
        return image_codes(sample, segment, self.config.image, self.config.image_codes) + self.vocab.image_start


def _vocabulary(config: ChameleonConfig, text_vocab_size: int) -> Vocabulary:
    if config.vocabulary == VocabularyConfig():
        return Vocabulary.after_text(text_vocab_size, config.image_codes, config.vocab_size)
    return Vocabulary.at(config.vocabulary, text_vocab_size, config.image_codes, config.vocab_size)


class ChameleonFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, hidden_size: int, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.embedding = ops.vocab_embedding(vocab.size, hidden_size)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.embedding(batch.tokens)


class ChameleonBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sums of cross-entropy and squared log Z."""

    def __init__(self, hidden_size: int, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.ops = ops
        self.head = ops.vocab_head(hidden_size, vocab.size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        cross_entropy, log_z = self.head.cross_entropy(hidden, batch.fields["labels"])
        return {"ce": cross_entropy.sum(), "z": log_z.square().sum()}
