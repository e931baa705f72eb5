"""Sampling from Show-o2: text by token, images by Euler steps along their flow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.families.showo_flow import NO_TIME
from megatron_mm.nn.flow import UNIT
from megatron_mm.sampling.patches import PatchSampler
from megatron_mm.sampling.row import Row
from megatron_mm.types import PackedBatch

STEPS = 50
"""Of an image, where none are given: the paper's own."""


class ShowoFlowSampler(PatchSampler):
    """See `Sampler`."""

    clean = UNIT
    guidance = 7.5
    before_image = beside_image = 1

    def denoise(self, rows: Sequence[Row], x: torch.Tensor) -> torch.Tensor:
        times = self.model.family.times.sampling(self.settings.steps or STEPS)
        for number, (time, following) in enumerate(zip(times[:-1], times[1:], strict=True), 1):
            self.report(f"denoising, step {number} of {len(times) - 1}")
            x = x + (following - time) / UNIT * self.guided_prediction(rows, x, time)
        limit = self.model.codec.limit
        return x if limit is None else x.clamp(-limit, limit)

    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self.model.from_back(lambda back: back.predict_velocity(hidden, batch))

    def fields(self, tokens: np.ndarray, patches: torch.Tensor | None, time: int) -> dict[str, torch.Tensor]:
        device = self.model.device
        times, clock = torch.full((2, *tokens.shape), NO_TIME, dtype=torch.int32, device=device)
        fields = {
            "patches": torch.zeros(*tokens.shape, self.model.family.patch_dim, device=device),
            "time": times,
            "clock": clock,
        }
        if patches is not None:
            fields["patches"][:, 1 : 1 + patches.shape[1]] = patches
            times[:, 1 : 1 + patches.shape[1]] = clock[:, 0] = time
        return fields
