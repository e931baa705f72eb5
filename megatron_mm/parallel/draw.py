"""Random weights, each a function of (seed, name, row, column) alone: a rank draws no more than its own part.

A row has keys of its own, from numpy's Philox. A number hashes its row's keys and its column in wrapping int32, and a
table inverts the normal distribution. Every operation is exact or rounds once, so that a GPU draws what a CPU does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.nn.dropout import lowbias32

_AT_ONCE = {"cpu": 2**17, "cuda": 2**24}
"""Numbers that fit into a cache, and that keep a GPU busy. The weights do not depend on it."""


class Normal:
    """Standard normal fp32 numbers of 32 random bits each. The distribution's inverse is a polygon over 65,536 pieces
    of one probability; it ends at 4.32 and its variance is 0.9997."""

    def __init__(self, device: torch.device):
        probabilities = (torch.arange(2**16 + 1, dtype=torch.float64, device="cpu") + 0.5) / (2**16 + 1)
        corners = torch.special.ndtri(probabilities)
        self._first, self._slope = corners[:-1].float().to(device), (corners.diff() / 2**16).float().to(device)

    def __call__(self, bits: torch.Tensor) -> torch.Tensor:
        """int32 -> fp32, of the same shape."""
        piece, along = ((bits >> 16) + 2**15).flatten(), (bits & 0xFFFF).flatten()
        return (self._first.index_select(0, piece) + self._slope.index_select(0, piece) * along).view_as(bits)


def draw(part: torch.Tensor, normal: Normal, std: float, key: str, shape: Sequence[int], offset: Sequence[int]) -> None:
    """Fills `part`, which begins at `offset` of the weight of this key (seed and name) and shape, from N(0, std)."""
    if std == 0.0:
        part.zero_()
        return
    first, inner = offset[0], zip(offset[1:], part.shape[1:], strict=True)
    row_keys = _row_keys(key, shape[0])[first : first + len(part)].to(part.device)
    columns = torch.arange(math.prod(shape[1:]), dtype=torch.int32, device=part.device).view(*shape[1:])
    columns = columns[tuple(slice(start, start + size) for start, size in inner)].flatten()
    rows = max(_AT_ONCE.get(part.device.type, 1) // len(columns), 1)
    for some, keys in zip(part.split(rows), row_keys.split(rows), strict=True):
        bits = lowbias32(lowbias32(columns + keys[:, :1]) ^ keys[:, 1:])
        some.copy_((normal(bits) * std).view_as(some))


def drawn(key: str, shape: Sequence[int]) -> torch.Tensor:
    """A whole weight of standard normal fp32 numbers, on the host."""
    whole = torch.empty(*shape, device="cpu")
    draw(whole, Normal(whole.device), 1.0, key, shape, [0] * len(shape))
    return whole


def _row_keys(key: str, rows: int) -> torch.Tensor:
    """int32 [rows, 2]."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(rows)
    return torch.from_numpy(words.view(np.int32)).view(rows, 2)
