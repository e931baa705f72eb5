"""What families share whose images are codes in the vocabulary: the ids of an image, and the front."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import ImageConfig
from megatron_mm.families.base import Vocabulary
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import ImageSegment, PackedBatch, Sample


def image_ids(sample: Sample, segment: ImageSegment, image: ImageConfig, vocab: Vocabulary) -> np.ndarray:
    """The ids int64 [h, w] of an image's codes.

    Raises:
        ValueError: it is not a grid of codes of the configured size and range.
    """
    codes = segment.data
    if codes.shape != (image.height, image.width) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"Sample {sample.key!r} has an image of {codes.dtype} {list(codes.shape)}, but model.image says "
            f"integer codes [{image.height}, {image.width}]. Change model.image or data.image_tokenizer."
        )
    if codes.min() < 0 or codes.max() >= vocab.image_codes:
        raise ValueError(
            f"Sample {sample.key!r} has image codes from {codes.min()} to {codes.max()}, but "
            f"model.image_codes={vocab.image_codes}. Set it to the image tokenizer's codebook size."
        )
    return codes.astype(np.int64) + vocab.image_start


class TokenFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, hidden_size: int, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.embedding = ops.vocab_embedding(vocab.size, hidden_size)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.embedding(batch.tokens)
