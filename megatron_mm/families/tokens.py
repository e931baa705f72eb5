"""What families share whose text is tokens of a vocabulary: the embedding, the head, image codes among the ids."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import ImageSegment, PackedBatch, Sample


def image_codes(sample: Sample, segment: ImageSegment, image: ImageConfig, count: int) -> np.ndarray:
    """The codes of `segment`, int64 [h, w].

    Raises:
        ValueError: they are not a grid of `image`'s height and width with values below `count`.
    """
    codes = segment.data
    if codes.shape != (image.height, image.width) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"Sample {sample.key!r} has an image of {codes.dtype} {list(codes.shape)}, but model.image says "
            f"integer codes [{image.height}, {image.width}]. Change model.image or data.image_tokenizer."
        )
    if codes.min() < 0 or codes.max() >= count:
        raise ValueError(
            f"Sample {sample.key!r} has image codes from {codes.min()} to {codes.max()}, but "
            f"model.image_codes={count}. Set it to the image tokenizer's codebook size."
        )
    return codes.astype(np.int64)


class TokenFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, hidden_size: int, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.embedding = ops.vocab_embedding(vocab.size, hidden_size)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.embedding(batch.tokens)


class TokenBack(nn.Module):
    """The head over the vocabulary, from which every family's back begins."""

    def __init__(self, trunk: TrunkConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.ops = ops
        self.head = ops.vocab_head(trunk.hidden_size, vocab.size, trunk.head_bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)


def squared_error(predicted: torch.Tensor, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Sum over the positions `where` bool [B, S] of the mean squared error of [B, S, P], in fp32 or wider."""
    precise = torch.promote_types(predicted.dtype, torch.float32)
    error = (predicted.to(precise) - target.to(precise)).square().mean(dim=-1)
    return torch.where(where, error, 0.0).sum()
