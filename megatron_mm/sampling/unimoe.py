"""Sampling from Uni-MoE: text, after any mix of text and images."""

from __future__ import annotations

import numpy as np
import torch

from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.types import PackedBatch


class UniMoESampler(Sampler):
    """See `Sampler`."""

    modes = ("image_to_text",)

    def write(self, hidden: torch.Tensor) -> None:
        self.write_text(self.rows, hidden)

    def batch(self, tokens: np.ndarray) -> PackedBatch:
        width = self.model.family.fields["pixels"].shape
        return piece(tokens, fields={"pixels": torch.zeros(*tokens.shape, *width, device=self.model.device)})
