"""Sampling from Uni-MoE: text, after any mix of text and images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mm.documents.builder import Opening
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler


class UniMoESampler(Sampler):
    """See `Sampler`."""

    def draw(self, rows: Sequence[Row], openings: Sequence[Opening]) -> Sequence[np.ndarray]:
        raise AssertionError("a unimoe model draws no images")
