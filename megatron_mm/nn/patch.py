"""Images as sequences of patch vectors, and the linear layers that carry them in and out of the transformer.

A patch vector holds a patch's P = C * p * p numbers in the order (channel, row, column), which is the order of torch's
pixel_shuffle. Shape legend: B rows, S positions, D hidden size, h x w patches of an image of H x W numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.nn.init import linear
from megatron_mm.types import Grids

HALF = 128
"""Frequencies of the timestep embedding; each gives a cosine and a sine."""


def patchify(image: np.ndarray, p: int) -> np.ndarray:
    """[C, H, W] -> [h * w, C * p * p], patches from left to right, then downwards; p divides H and W."""
    channels, height, width = image.shape
    grid = image.reshape(channels, height // p, p, width // p, p)
    return grid.transpose(1, 3, 0, 2, 4).reshape(-1, channels * p * p)


def unpatchify(patches: np.ndarray, h: int, w: int, p: int) -> np.ndarray:
    """[h * w, C * p * p] -> [C, h * p, w * p], the inverse of `patchify`."""
    grid = patches.reshape(h, w, -1, p, p)
    return grid.transpose(2, 0, 3, 1, 4).reshape(-1, h * p, w * p)


def sinusoids(timestep: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of timesteps [...] at `HALF` frequencies from 1 down to 1e-4: float32 [..., 2 * HALF]."""
    exponent = torch.arange(HALF, dtype=torch.float32, device=timestep.device) / HALF
    angle = timestep[..., None].float() * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def place_embedding(place: torch.Tensor, width: int) -> torch.Tensor:
    """Rows and columns of patches, int [..., 2], as sines and cosines, float32 [..., width]; a quarter of the width has
    the sines of columns, then cosines, then those of rows (DiT, arXiv 2212.09748, as MAE)."""
    exponent = torch.arange(width // 4, dtype=torch.float32, device=place.device) / (width // 4)
    angle = place.flip(-1)[..., None].float() * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class TimestepEmbedding(nn.Module):
    """Diffusion timesteps [...] -> vectors [..., P]: sinusoids, then a two-layer MLP."""

    def __init__(self, patch_dim: int) -> None:
        super().__init__()
        self.fc1 = linear(2 * HALF, 2 * HALF)
        self.fc2 = linear(2 * HALF, patch_dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1(sinusoids(timestep).to(self.fc1.weight.dtype))))


class LinearPatchIn(nn.Module):
    """Noised patches [B, S, P] and their timesteps [B, S] -> embeddings [B, S, D].

    The timestep embedding is added to every patch vector before the linear layer (Transfusion), and behind it, where
    images have many sizes, that of the patch's place, int [B, S, 2]. Positions without a patch get some finite vector,
    which the caller leaves out.
    """

    def __init__(self, patch_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.time = TimestepEmbedding(patch_dim)
        self.proj = linear(patch_dim, hidden_size)

    def forward(
        self,
        patches: torch.Tensor,
        timestep: torch.Tensor,
        images: Sequence[Grids],
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.proj(patches + self.time(timestep))
        return x if place is None else x + place_embedding(place, x.shape[-1]).to(x.dtype)


class LinearPatchOut(nn.Module):
    """Hidden states [B, S, D] -> predictions [B, S, P]. Starts at zero."""

    def __init__(self, hidden_size: int, patch_dim: int) -> None:
        super().__init__()
        self.proj = linear(hidden_size, patch_dim, std=0.0)

    def forward(self, hidden: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        return self.proj(hidden)
