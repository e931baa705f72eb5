"""Show-o2's image paths (arXiv 2506.15564): what reads an image's latents, and the head that predicts their flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.nn.images import over_images
from megatron_mm.nn.init import adopt, linear
from megatron_mm.nn.patch import TimestepEmbedding
from megatron_mm.nn.siglip import siglip
from megatron_mm.types import Grids


class SemanticLayers(nn.Module):
    """Patches [B, S, P] -> what they mean [B, S, W], by SigLIP's layers over each image; zero outside images.

    Args:
        grid: rows and columns of the places that are learnt, between which those of an image of another grid are
            interpolated. config: transformers' SiglipVisionConfig.
    """

    def __init__(self, patch_dim: int, grid: tuple[int, int], config: Any) -> None:
        super().__init__()
        self.width, self.grid = config.hidden_size, grid
        self.embed = linear(patch_dim, self.width)
        self.position = nn.Parameter(torch.zeros(grid[0] * grid[1], self.width))
        self.layers = adopt(siglip().SiglipEncoder(config))

    def forward(self, patches: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        return over_images(self._read, [patches], images, self.width, self)

    def _read(self, grids: torch.Tensor) -> torch.Tensor:
        places = self._places(*grids.shape[1:3])
        return self.layers(inputs_embeds=self.embed(grids.flatten(1, 2)) + places).last_hidden_state

    def _places(self, h: int, w: int) -> torch.Tensor:
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


class FlowHead(nn.Module):
    """Hidden states [B, S, D] and times [B, S] -> velocities [B, S, P], zero outside images. Starts at zero.

    Layers are adaLN-zero (DiT, arXiv 2212.09748), told of the image's time. Their attention stays within an image; the
    official code lets it reach the whole document, which the hidden states have done already.
    """

    def __init__(self, hidden_size: int, heads: int, layers: int, patch_dim: int) -> None:
        super().__init__()
        self.patch_dim = patch_dim
        self.time = TimestepEmbedding(hidden_size)
        self.layers = nn.ModuleList(AdaLayer(hidden_size, heads) for _ in range(layers))
        self.modulate = linear(hidden_size, 2 * hidden_size, std=0.0)
        self.out = linear(hidden_size, patch_dim, std=0.0)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        return over_images(self._predict, [hidden, time], images, self.patch_dim, self)

    def _predict(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x, c = hidden.flatten(1, 2), F.silu(self.time(time.amax((1, 2))))  # borrowed positions have no time
        for layer in self.layers:
            x = layer(x, c)
        shift, scale = self.modulate(c)[:, None].chunk(2, dim=-1)
        return self.out(_norm(x) * (1 + scale) + shift)


class AdaLayer(nn.Module):
    """x [N, n, D] and condition c [N, D] -> [N, n, D]: attention and MLP whose norms are shifted and scaled, and whose
    outputs are gated, by c. The gates start closed."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(hidden_size, 3 * hidden_size)
        self.proj = linear(hidden_size, hidden_size)
        self.fc1 = linear(hidden_size, 4 * hidden_size)
        self.fc2 = linear(4 * hidden_size, hidden_size)
        self.modulate = linear(hidden_size, 6 * hidden_size, std=0.0)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(c)[:, None].chunk(6, dim=-1)
        x = x + gate * self._attend(_norm(x) * (1 + scale) + shift)
        h = _norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
