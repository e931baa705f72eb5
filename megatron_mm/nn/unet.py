"""U-Net down and up blocks in place of the linear patch layers (Transfusion, arXiv 2408.11039, section 3.2).

The down path takes an image's latents [C, H, W] to a grid of h x w hidden states by log2(p) halvings, the up path goes
back. Two departures from a U-Net: LayerNorm over channels instead of AdaLN (as the paper has it; the timestep enters
with the patch vectors), and no skip connection from the down to the up path, because the first and the last pipeline
stage stand far apart. Both work on the images that a batch lists: they are gathered from the sequence, those of one
size in one go, and put back. Positions outside images get zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.nn.images import over_images
from megatron_mm.nn.init import conv
from megatron_mm.nn.patch import TimestepEmbedding
from megatron_mm.types import Grids


class UNetPatchIn(nn.Module):
    """Noised patches [B, S, P] and their timesteps [B, S] -> embeddings [B, S, D], zero outside images."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int, base_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.time = TimestepEmbedding(channels * patch_size**2)
        widths = _widths(patch_size, base_channels)
        blocks: list[nn.Module] = [conv(channels, widths[0]), ResBlock(widths[0])]
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            blocks += [conv(narrow, wide, stride=2), ResBlock(wide)]
        self.blocks = nn.Sequential(*blocks, LayerNorm2d(widths[-1]), conv(widths[-1], hidden_size, kernel=1))

    def forward(self, patches: torch.Tensor, timestep: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        down = lambda grid: self.blocks(F.pixel_shuffle(grid.movedim(-1, 1), self.patch_size)).movedim(1, -1)  # noqa: E731
        return over_images(down, [patches + self.time(timestep)], images, self.hidden_size, self)


class UNetPatchOut(nn.Module):
    """Hidden states [B, S, D] -> predictions [B, S, P], zero outside images. Starts at zero."""

    def __init__(self, hidden_size: int, channels: int, patch_size: int, base_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_dim = channels * patch_size**2
        widths = _widths(patch_size, base_channels)[::-1]
        blocks: list[nn.Module] = [conv(hidden_size, widths[0], kernel=1), ResBlock(widths[0])]
        for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
            blocks += [nn.Upsample(scale_factor=2), conv(wide, narrow), ResBlock(narrow)]
        self.blocks = nn.Sequential(*blocks, LayerNorm2d(widths[-1]), nn.SiLU(), conv(widths[-1], channels, std=0.0))

    def forward(self, hidden: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        up = lambda grid: F.pixel_unshuffle(self.blocks(grid.movedim(-1, 1)), self.patch_size).movedim(1, -1)  # noqa: E731
        return over_images(up, [hidden], images, self.patch_dim, self)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) on [N, channels, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            LayerNorm2d(channels),
            nn.SiLU(),
            conv(channels, channels),
            LayerNorm2d(channels),
            nn.SiLU(),
            conv(channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _widths(patch_size: int, base_channels: int) -> list[int]:
    """Channels at every resolution, from the latents' down to the patches'."""
    if patch_size < 1 or patch_size & (patch_size - 1):
        raise ValueError(f"model.patch_size={patch_size} must be a power of two for model.patch_codec=unet.")
    return [base_channels * 2**i for i in range(patch_size.bit_length())]
