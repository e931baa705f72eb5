"""What families share whose images are codes in the vocabulary: the ids of an image, and the front."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import ImageConfig
from megatron_mm.families.base import Vocabulary
from megatron_mm.families.layout import image_codes
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import ImageSegment, PackedBatch, Sample


def image_ids(sample: Sample, segment: ImageSegment, image: ImageConfig, vocab: Vocabulary) -> np.ndarray:
    """The ids int64 [h, w] of an image's codes. Raises as `image_codes` does."""
    return image_codes(sample, segment, image, vocab.image_codes) + vocab.image_start


class TokenFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, hidden_size: int, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.embedding = ops.vocab_embedding(vocab.size, hidden_size)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.embedding(batch.tokens)
