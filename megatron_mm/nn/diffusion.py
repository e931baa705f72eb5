"""Denoising diffusion (DDPM, arXiv 2006.11239) with the cosine schedule, and its deterministic sampler (DDIM).

Noising runs on the host in numpy, where the data path is; sampling steps run in torch, where the model is. The schedule
itself is kept in float64. The model predicts the noise (epsilon).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

MAX_BETA = 0.999


@dataclass(frozen=True)
class DDPMSchedule:
    """Cosine schedule over timesteps 0 .. num_train_timesteps - 1 (diffusers' `squaredcos_cap_v2`)."""

    num_train_timesteps: int = 1000

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance left at each timestep: float64 [num_train_timesteps], decreasing."""
        time = np.arange(self.num_train_timesteps + 1) / self.num_train_timesteps
        signal = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], MAX_BETA)
        return np.cumprod(1 - betas)

    def add_noise(self, x0: np.ndarray, noise: np.ndarray, t: int) -> np.ndarray:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, in float32 and the shape of `x0`."""
        abar = self.alphas_cumprod[t]
        return np.float32(math.sqrt(abar)) * x0 + np.float32(math.sqrt(1 - abar)) * noise

    def timesteps(self, num_steps: int, spacing: str = "leading") -> list[int]:
        """The timesteps that a sampler of `num_steps` steps visits, falling.

        `leading` (diffusers' default): multiples of T // num_steps from 0 up. `trailing`: ends at T - 1, where the
        cosine schedule has next to no signal left, so that the first step needs `clip` to be stable.

        Raises:
            ValueError: num_steps is not in 1 .. T, or the spacing is unknown.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"steps={num_steps} must be between 1 and the model's {total} timesteps.")
        if spacing == "leading":
            return [i * (total // num_steps) for i in reversed(range(num_steps))]
        if spacing == "trailing":
            return [int(t) - 1 for t in np.round(total - np.arange(num_steps) * (total / num_steps))]
        raise ValueError(f"Unknown timestep spacing {spacing!r}: use leading or trailing.")

    def step(
        self, x_t: torch.Tensor, eps: torch.Tensor, t: int, t_prev: int, clip: float | None = None
    ) -> torch.Tensor:
        """One DDIM step (arXiv 2010.02502, eta = 0) from timestep `t` to `t_prev`; t_prev < 0 gives the clean x_0.

        Args:
            x_t: the noised image, any shape; eps: the predicted noise, the same shape.
            clip: bound on the predicted clean image's magnitude, None for none; the noise follows what was clipped
                (diffusers' `use_clipped_model_output`).
        """
        abar = float(self.alphas_cumprod[t])
        abar_prev = float(self.alphas_cumprod[t_prev]) if t_prev >= 0 else 1.0
        x0 = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        return math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev) * eps


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: `scale` 1 is the conditional prediction, more leads away from the unconditional one."""
    return unconditional + scale * (conditional - unconditional)
