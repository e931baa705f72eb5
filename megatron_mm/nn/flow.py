"""Flow matching (arXiv 2210.02747) on straight paths: x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1.

The model predicts the velocity x_1 - x_0. Times are whole millionths, which travel exactly through any precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

UNIT = 1_000_000
"""Time of clean data."""
FEW, MANY = (256, 0.5), (4096, 1.15)
"""(positions of an image, its shift): the line through these (Flux; diffusers' `calculate_shift`)."""


@dataclass(frozen=True)
class FlowTimes:
    """Times of images of so many positions; `shifted` moves them towards noise (arXiv 2403.03206)."""

    positions: int
    shifted: bool

    def shift(self, t: float) -> float:
        """A time in [0, 1] between noise and data, moved."""
        if not self.shifted or t in (0.0, 1.0):
            return t
        (few, low), (many, high) = FEW, MANY
        mu = low + (high - low) * (self.positions - few) / (many - few)
        return 1 - math.exp(mu) / (math.exp(mu) + 1 / (1 - t) - 1)

    def draw(self, generator: np.random.Generator) -> int:
        """A training time in 1 .. UNIT - 1: logit-normal, then shifted."""
        t = 1 / (1 + math.exp(-generator.standard_normal()))
        return min(max(round(self.shift(t) * UNIT), 1), UNIT - 1)

    def sampling(self, steps: int) -> list[int]:
        """The times that a sampler of so many Euler steps visits, from 0, and UNIT at the end.

        Raises:
            ValueError: steps is not 1 or more.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be 1 or more.")
        return [round(self.shift(step / steps) * UNIT) for step in range(steps + 1)]


def interpolate(x1: np.ndarray, x0: np.ndarray, time: int) -> np.ndarray:
    """x_t in float32."""
    t = np.float32(time / UNIT)
    return t * x1 + (1 - t) * x0
