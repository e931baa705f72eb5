"""Sampling from Uni-MoE: text, after any mix of text and images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.types import Document, PackedBatch


class UniMoESampler(Sampler):
    """See `Sampler`."""

    modes = ("image_to_text",)

    def write(self, prompts: Sequence[Document]) -> None:
        self.write_text(self.rows, self.read(self.rows, prompts))

    def batch(self, tokens: np.ndarray) -> PackedBatch:
        width = self.model.family.fields["pixels"].shape
        return piece(tokens, fields={"pixels": torch.zeros(*tokens.shape, *width, device=self.model.device)})
