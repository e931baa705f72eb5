"""A small convolutional VAE: images to a grid of latents and back, the continuous counterpart of a codebook.

It stands in the place of the 86M VAE that Transfusion uses (arXiv 2408.11039) where a laptop has to train it in a
minute: strided convolutions down, nearest-neighbour upsampling and convolutions up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConvVAE(nn.Module):
    """`halvings` times halved (rounding up): [N, C, height, width] <-> latents [N, latents, h, w]."""

    def __init__(self, channels: int, latents: int, halvings: int, base: int = 16):
        super().__init__()
        self.halvings = halvings
        widths = [base * 2**i for i in range(halvings)]
        down: list[nn.Module] = []
        for inputs, outputs in zip([channels, *widths], widths, strict=False):
            down += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.SiLU()]
        self.encoder = nn.Sequential(*down, nn.Conv2d(widths[-1], 2 * latents, 1))
        self.decoder_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        ups = [*widths[-2::-1], base]
        self.decoder = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in zip(widths[::-1], ups, strict=True)
        )
        self.decoder_out = nn.Conv2d(base, channels, 3, padding=1)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Those of an image, and of what becomes of it by each halving."""
        return [(-(-height // 2**n), -(-width // 2**n)) for n in range(self.halvings + 1)]

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the latents, each [N, latents, h, w]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)

    def decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Images [N, C, height, width], about in [-1, 1]: a squashed output would saturate on the background and learn
        nothing more."""
        x = F.silu(self.decoder_in(latents))
        for size, conv in zip(self.sizes(height, width)[-2::-1], self.decoder, strict=True):
            x = F.silu(conv(F.interpolate(x, size)))
        return self.decoder_out(x)

    def loss(self, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
        """Squared error plus `kl_weight` times the KL divergence to N(0, 1), both summed over an image; mean over N."""
        mean, log_variance = self.encode(images)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = (self.decode(latents, *images.shape[2:]) - images).square()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return (error.sum() + kl_weight * kl.sum()) / len(images)
