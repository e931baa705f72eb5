"""Chameleon (arXiv 2405.09818): everything is a token, text and image codes alike, predicted left to right.

    BOS  text ...  BOI  code ... code  EOI  text ...  EOS

Loss = cross-entropy + z_loss_weight * (log Z)^2, both over every next token, with Z the softmax's denominator.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import ChameleonConfig, TrunkConfig, VocabularyConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import arrange, next_token_labels, open_end, prompt_end, token_sequence
from megatron_mm.families.tokens import TokenFront, image_ids
from megatron_mm.mask import causal
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import BACK, IGNORE, Document, FieldSpec, LossTerm, PackedBatch, Sample, Segment


class Chameleon:
    """See `Family`. Field of a batch: labels int64 [B, S]."""

    name = "chameleon"
    causal = True
    hides_keys = False
    pixels = None

    def __init__(self, config: ChameleonConfig, text_vocab_size: int) -> None:
        self.config = config
        self.trunk = config.trunk
        self.vocab = _vocabulary(config, text_vocab_size)
        self.image_codes = config.image_codes
        self.terms: tuple[LossTerm, ...] = (LossTerm("ce", 1.0), LossTerm("z", config.z_loss_weight))
        self.fields = {"labels": FieldSpec("int64", (), IGNORE, (BACK,))}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes in an image."""
        return self.config.image.height, self.config.image.width

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; with condition dropout it may turn out shorter."""
        return 2 + text_tokens + images * (2 + self.config.image.height * self.config.image.width)

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return 0.0

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not a grid of codes of the configured size and range.
        """
        arrangement = arrange(sample, streams, 1 - self.config.image_first, self.config.condition_dropout)
        tokens, images = self._sequence(sample, arrangement.segments)
        labels = next_token_labels(tokens)
        labels[: max(prompt_end(sample, lambda given: self._sequence(sample, given)[0]) - 1, 0)] = IGNORE
        return Document(sample.uid, tokens, causal(len(tokens)), {"labels": labels}, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`; raises as `lay_out` does."""
        tokens, images = self._sequence(sample, sample.segments)
        tokens = open_end(tokens, self.vocab, open_image)
        return Document(sample.uid, tokens, causal(len(tokens)), {}, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        labels = int((batch.fields["labels"] != IGNORE).sum())
        return {"ce": labels, "z": labels}

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TokenFront(self.trunk.hidden_size, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return ChameleonBack(self.trunk, self.vocab, ops)

    def _sequence(self, sample: Sample, segments: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray]:
        image = self.config.image
        return token_sequence(segments, self.vocab, lambda segment: image_ids(sample, segment, image, self.vocab))


def _vocabulary(config: ChameleonConfig, text_vocab_size: int) -> Vocabulary:
    if config.vocabulary == VocabularyConfig():
        return Vocabulary.after_text(text_vocab_size, config.image_codes, config.vocab_size)
    return Vocabulary.at(config.vocabulary, text_vocab_size, config.image_codes, config.vocab_size)


class ChameleonBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sums of cross-entropy and squared log Z."""

    def __init__(self, trunk: TrunkConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.ops = ops
        self.head = ops.vocab_head(trunk.hidden_size, vocab.size, trunk.head_bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        cross_entropy, log_z = self.head.cross_entropy(hidden, batch.fields["labels"])
        return {"ce": cross_entropy.sum(), "z": log_z.square().sum()}
