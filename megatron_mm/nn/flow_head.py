"""Show-o2's image paths (arXiv 2506.15564): what reads an image's latents, and the head that predicts their flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config.model import TrunkConfig
from megatron_mm.nn.flow import UNIT
from megatron_mm.nn.fusion import rotary_frequencies
from megatron_mm.nn.images import over_images
from megatron_mm.nn.init import adopt, linear
from megatron_mm.nn.ops import Attended, Conditions, ParallelOps
from megatron_mm.nn.patch import HALF, sinusoids
from megatron_mm.nn.siglip import siglip
from megatron_mm.nn.vision import Adaptor
from megatron_mm.types import Grids

LLAMA3_CONTEXT, LLAMA3_FACTOR, LLAMA3_LOW, LLAMA3_HIGH = 8192, 32.0, 1.0, 4.0
"""Positions of a turn and more are stretched by the factor; of a quarter of that and less, not at all."""


class SemanticLayers(nn.Module):
    """Patches [B, S, P] -> what they mean [B, S, W], by SigLIP's layers over each image; zero outside images.

    Args:
        grid: rows and columns of the places that are learnt, between which those of an image of another grid are
            interpolated. sizes: of transformers' SiglipVisionConfig.
    """

    def __init__(self, patch_dim: int, grid: tuple[int, int], **sizes: int) -> None:
        super().__init__()
        config = siglip().SiglipVisionConfig(attn_implementation="sdpa", **sizes)
        self.width, self.grid = config.hidden_size, grid
        self.embed = linear(patch_dim, self.width)
        self.position = nn.Parameter(torch.zeros(grid[0] * grid[1], self.width))
        self.layers = adopt(siglip().SiglipEncoder(config))

    def forward(self, patches: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        return over_images(self._read, [patches], images, self.width, self)

    def _read(self, grids: torch.Tensor) -> torch.Tensor:
        places = self.places(*grids.shape[1:3])
        return self.layers(inputs_embeds=self.embed(grids.flatten(1, 2)) + places).last_hidden_state

    def places(self, h: int, w: int) -> torch.Tensor:
        """Embeddings of the places of h x w patches [h * w, W]."""
        if (h, w) == self.grid:
            return self.position
        learnt = self.position.view(1, *self.grid, -1).movedim(-1, 1)
        between = F.interpolate(learnt, (h, w), mode="bicubic", align_corners=False)
        return between.movedim(1, -1).flatten(0, 2)


class Fusion(nn.Module):
    """Two vectors of each position, [..., W] and [..., D], as one [..., D]: RMSNorm of both, then a two-layer MLP."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width + hidden_size, eps=1e-6)
        self.fc1 = linear(width + hidden_size, hidden_size)
        self.fc2 = linear(hidden_size, hidden_size)

    def forward(self, semantic: torch.Tensor, low_level: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(torch.cat([semantic, low_level], dim=-1)))))


class ClockEmbedding(nn.Sequential):
    """Times [...] in millionths -> vectors [..., width]: sinusoids of the time in [0, 1], then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__(linear(2 * HALF, width), nn.SiLU(), linear(width, width))

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        return super().forward(sinusoids(time / UNIT).to(self[0].weight.dtype))


class FlowHead(nn.Module):
    """Hidden states [B, n, D] -> velocities [B, n, P] at every position; starts at zero.

    Layers as Llama's that attend over documents as the trunk does; an image, and the position of its time before it,
    are modulated by the embedding of that time (the official code of Show-o2, `diffusion_head_a` and `_b`).
    """

    def __init__(self, hidden_size: int, layers: TrunkConfig, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__()
        width = layers.hidden_size
        self.inward = nn.Identity() if width == hidden_size else Adaptor(hidden_size, width)
        self.clock = ClockEmbedding(width)
        self.layers = ops.modulated_layers(layers, partial(llama3_frequencies, layers.head_dim, layers.rotary_base))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.modulate = linear(width, 2 * width, std=0.0)
        self.out = linear(width, patch_dim, std=0.0)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor, images: int, attended: Attended) -> torch.Tensor:
        """
        Args:
            time: int [B, n] in millionths, negative outside images. images: at least as many as there are in the rows.
        """
        number, distinct = runs(time, 2 * images + 1)
        conditions = Conditions(number, self.clock(distinct), distinct >= 0)
        x = self.layers(self.inward(hidden), conditions, attended)
        tables = torch.where(conditions.present[:, None], self.modulate(F.silu(conditions.vectors)), 0.0)
        shift, scale = F.embedding(number, tables).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift)


def runs(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which run of equal values each position of int [B, n] is in, int64 [B, n], and the value of each run, [most]; of
    runs that there are not, -1. It needs no word from the device of how many there are."""
    flat = values.flatten()
    number = F.pad((flat[1:] != flat[:-1]).long().cumsum(0), (1, 0))
    return number.view_as(values), flat.new_full((most,), -1).scatter_(0, number, flat)


def llama3_frequencies(width: int, base: float, device: torch.device) -> torch.Tensor:
    """RoPE's frequencies as Llama 3.1 stretches them from 8192 positions to 32 times as many: float64 [width / 2]."""
    frequencies = rotary_frequencies(width, base, device)
    turns = LLAMA3_CONTEXT * frequencies / (2 * math.pi)
    kept = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / LLAMA3_FACTOR)
