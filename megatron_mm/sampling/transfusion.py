"""Sampling from Transfusion: text by token, images by DDIM over patches that stand in the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.families.transfusion import NO_PATCH
from megatron_mm.sampling.patches import PatchSampler
from megatron_mm.sampling.row import Row
from megatron_mm.types import PackedBatch

STEPS = 250
"""Of an image, where none are given: the paper's own."""


class TransfusionSampler(PatchSampler):
    """See `Sampler`."""

    clean = 0

    def denoise(self, rows: Sequence[Row], x: torch.Tensor) -> torch.Tensor:
        schedule, limit = self.model.family.schedule, self.model.codec.limit
        timesteps = schedule.timesteps(self.settings.steps or min(STEPS, schedule.num_train_timesteps))
        for number, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True), 1):
            self.report(f"denoising, step {number} of {len(timesteps)}")
            x = schedule.step(x, self.guided_prediction(rows, x, t), t, t_prev, limit)
        return x

    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self.model.from_back(lambda back: back.predict_noise(hidden, batch))

    def fields(self, tokens: np.ndarray, patches: torch.Tensor | None, time: int) -> dict[str, torch.Tensor]:
        device = self.model.device
        fields = {
            "patches": torch.zeros(*tokens.shape, self.model.family.patch_dim, device=device),
            "timestep": torch.full(tokens.shape, NO_PATCH, dtype=torch.int32, device=device),
        }
        if patches is not None:
            fields["patches"][:, : patches.shape[1]] = patches
            fields["timestep"][:, : patches.shape[1]] = time
        return fields
