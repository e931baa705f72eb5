"""Which drawn tokens stay, and which are masked again: the choices of masked decoding."""

from __future__ import annotations

import math

import torch


def masked_after(step: int, steps: int, tokens: int) -> int:
    """How many of an image's `tokens` are masked behind step 0 .. steps - 1: the cosine schedule of MaskGIT
    (arXiv 2202.04200)."""
    return math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))


def least_confident(
    confidence: torch.Tensor, unknown: torch.Tensor, gumbel: torch.Tensor, temperature: float, count: int
) -> torch.Tensor:
    """Which tokens of each row are masked again: bool [b, n].

    Those `count` with the least log-probability plus `temperature` times Gumbel noise; at least one, at least one fewer
    than were unknown, and never one that was known (MaskGIT; Show-o, arXiv 2408.12528).

    Args:
        confidence: log-probabilities float64 [b, n] of what was drawn. unknown: bool [b, n]. gumbel: float64 [b, n].
    """
    noisy = (confidence + temperature * gumbel).masked_fill(~unknown, torch.inf)
    counts = torch.clamp(unknown.sum(-1) - 1, max=count).clamp(min=1)
    place = noisy.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (place < counts[:, None]) & unknown


def most_confident(confidence: torch.Tensor, unknown: torch.Tensor, count: int) -> torch.Tensor:
    """Which unknown tokens of each row are taken: the `count` of greatest confidence, bool [b, n] (LLaDA,
    arXiv 2502.09992)."""
    place = (-confidence.masked_fill(~unknown, -torch.inf)).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (place < count) & unknown
