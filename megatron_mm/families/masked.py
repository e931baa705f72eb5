"""What Show-o and MMaDA share: text and image codes in one vocabulary, some of them masked, and three objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from megatron_mm.config.masked import MaskedConfig, MaskedVocabularyConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import task_sequence
from megatron_mm.families.tokens import TokenFront, image_ids
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import BACK, FieldSpec, LossTerm, PackedBatch, Sample, Segment

T2I, LM, MMU = range(3)
"""Numbers of the loss terms: masked image codes, text alone, text that has images to go by."""
NO_TERM = -1
TERM = FieldSpec("int8", (), NO_TERM, (BACK,))


class MaskedFamily:
    """The parts of `Family` that both have. Ids are those of `model.vocabulary`, or else text, specials, T2I, MMU,
    MASK, image codes."""

    causal = False
    hides_keys = False
    pixels = None

    def __init__(self, config: MaskedConfig, text_vocab_size: int) -> None:
        self.trunk, self.image, self.image_codes = config.trunk, config.image, config.image_codes
        codes, size = config.image_codes, config.vocab_size
        self.vocab = (
            Vocabulary.after_text(text_vocab_size, codes, size, ("t2i", "mmu", "mask"))
            if config.vocabulary == MaskedVocabularyConfig()
            else Vocabulary.at(config.vocabulary, text_vocab_size, codes, size)
        )
        weights = {"t2i": config.t2i_weight, "lm": config.lm_weight, "mmu": config.mmu_weight}
        self.terms: tuple[LossTerm, ...] = tuple(LossTerm(name, weight) for name, weight in weights.items())

    @property
    def mask_id(self) -> int:
        """The token that stands for any other."""
        return self.vocab.special["mask"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes in an image."""
        return self.image.height, self.image.width

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return 0.0

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TokenFront(self.trunk.hidden_size, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return MaskedBack(self.trunk, self.vocab, [term.name for term in self.terms], ops)

    def sequence(self, sample: Sample, task: str, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """See `task_sequence`.

        Raises:
            ValueError: an image is not a grid of codes of the configured size and range.
        """
        return task_sequence(
            task, segments, self.vocab, lambda segment: image_ids(sample, segment, self.image, self.vocab)
        )

    def positions(self, text_tokens: int, texts: int, images: int) -> int:
        """Those of a document that leaves nothing out."""
        names_task = images == 1
        return 2 + names_task + text_tokens + images * (2 + self.image.height * self.image.width)

    def count(self, terms: torch.Tensor) -> dict[str, int]:
        """How many positions have each term's number: int8 [B, S]."""
        return {term.name: int((terms == number).sum()) for number, term in enumerate(self.terms)}


class MaskedBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> for each term the sum of cross-entropies at the positions that are its own.

    Fields: labels int64 [B, S], term int8 [B, S] (its number), and weight [B, S] where the family has one.
    """

    def __init__(self, trunk: TrunkConfig, vocab: Vocabulary, terms: Sequence[str], ops: ParallelOps) -> None:
        super().__init__()
        self.ops, self.terms = ops, tuple(terms)
        self.head = ops.vocab_head(trunk.hidden_size, vocab.size, trunk.head_bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        loss, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        if "weight" in batch.fields:
            loss = loss * batch.fields["weight"]
        term = batch.fields["term"]
        return {name: torch.where(term == number, loss, 0.0).sum() for number, name in enumerate(self.terms)}
